"""Files, folders and lines that appear whole or not at all."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dnnlib.disk import DiskFull, sync_folder, write_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The hidden names of unfinished files and folders, which a killed process leaves. Group 1 is the `short_name` of the
# final name, if any.
TEMPORARY = re.compile(r"\.(?:(.+)\.)?[0-9a-f]{12}\.tmp")
_LONGEST_KEPT = 120  # bytes: file systems take names of 143 to 255 bytes


def short_name(name: str) -> str:
    """Return `name`, or a hash of it if it is so long that a name made from it may be too long for the file system."""
    data = os.fsencode(name)
    return name if len(data) <= _LONGEST_KEPT else hashlib.sha256(data).hexdigest()[:32]


def temporary_path(dest: Path) -> Path:
    """Return a new path next to `dest` for what will become `dest`, with a name that TEMPORARY matches."""
    return dest.with_name(f".{short_name(dest.name)}.{uuid.uuid4().hex[:12]}.tmp")


def remove_leftovers(dest: Path) -> None:
    """Delete the temporary files that were to become `dest`; no process may be writing one."""
    for path in dest.parent.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match[1] == short_name(dest.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def temporary(dest: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield the path of what `make` makes next to `dest`, and remove it if the block raises.

    All processes use the same name, and hold a lock meanwhile, so that the next one that writes `dest` finds and
    removes what a killed process left. The name is random if another process writes `dest` at this time, and on file
    systems without locks.
    """
    temp = dest.with_name(f".{short_name(dest.name)}.{0:012x}.tmp")
    with ExitStack() as stack:
        try:
            stack.callback(os.close, _made_and_locked(temp, make))
        except OSError:
            temp = temporary_path(dest)
            make(temp)
        try:
            yield temp
        except BaseException:
            remove(temp)
            raise


def _made_and_locked(path: Path, make: Callable[[Path], None]) -> int:
    """Make `path`, in place of one that is not locked, and return the handle of its lock. Raises OSError otherwise."""
    with suppress(FileNotFoundError):
        abandoned = _locked(path)
        try:
            remove(path)
        finally:
            os.close(abandoned)
    make(path)
    try:
        return _locked(path)
    except (BlockingIOError, FileNotFoundError):
        raise  # another process was faster, and the path is now its own
    except OSError:
        remove(path)
        raise


def _locked(path: Path) -> int:
    """Open and lock `path`. Raises BlockingIOError if it belongs to another process, OSError if there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no such locks", str(path))
    # Network file systems lock files only if they are open for writing.
    handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise BlockingIOError(errno.EAGAIN, "it was replaced", str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def is_in_use(path: Path) -> bool:
    """Return whether a process is still at work on what `temporary` yielded; False on file systems without locks."""
    try:
        os.close(_locked(path))
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(dest: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Yield the path of a new empty file next to `dest` to write to; rename it to `dest` if the block succeeds.

    With `sync` the data is flushed to disk before the rename and the new name after it: a crash, a kill, a power cut or
    a full disk leaves the old file or no file. If the block raises, the temporary file is removed and `dest` is
    untouched. The folder must exist. Several threads may do this at once.
    """
    dest = Path(dest)
    # Not by tempfile, whose files only the owner may read, whatever the umask says.
    with temporary(dest, lambda path: path.touch(exist_ok=False)) as temp:
        mode = temp.stat().st_mode
        yield temp
        temp.chmod(mode)  # a library may have replaced the file by its own
        if sync:
            with open(temp, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temp, dest)
    if sync:
        sync_folder(dest.parent)


def write_text(dest: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `dest` atomically, as UTF-8 with Unix line ends."""
    with atomic_path(dest) as temp:
        temp.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_folder(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new folder next to `dest` to fill; rename it to `dest` if the block succeeds.

    `dest` must not exist or must be an empty folder. Raises FileExistsError, and leaves `dest` alone, if it is anything
    else by then. If the block raises, `dest` is untouched as well.
    """
    dest = Path(dest)
    with temporary(dest, Path.mkdir) as temp:
        yield temp
        if dest.is_dir() and not dest.is_symlink() and not any(dest.iterdir()):
            dest.rmdir()
        if os.path.lexists(dest):
            raise FileExistsError(errno.EEXIST, "it exists already", str(dest))
        os.rename(temp, dest)


def replace_folder(temp: Path, dest: Path) -> None:
    """Give the folder `temp` the name `dest`; a folder of that name is exchanged for it, then deleted.

    Where the system cannot exchange two names at once, a kill in between leaves both folders under hidden names.
    """
    if not dest.is_dir():
        temp.rename(dest)
        return
    if not _exchange(temp, dest):
        dest.rename(old := temporary_path(dest))
        temp.rename(dest)
        temp = old
    shutil.rmtree(temp, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(os.fsencode(one), os.fsencode(two), 2) == 0)
        return bool(libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(two), 2) == 0)  # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no CDLL(None)
        return False


class LineFile:
    """Appends whole lines to the file `path`, or nothing if the disk is full.

    If `patient`, lines that do not fit are kept and written with the next line that does; otherwise DiskFull is raised.
    Other failures raise ConfigError.
    """

    def __init__(self, path: Path, *, patient: bool = False) -> None:
        self.path = path
        self._patient = patient
        self._kept = b""

    def append(self, text: str) -> None:
        """Write `text` and a line end."""
        self._kept += (text + "\n").encode("utf-8")
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.tell()
                try:
                    written = file.write(self._kept)
                    if written < len(self._kept):  # the disk is full; the next attempt says so
                        file.write(self._kept[written:])
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            failure = write_error(self.path, error)
            if not (self._patient and isinstance(failure, DiskFull)):
                raise failure from None
        else:
            self._kept = b""
