"""Files, folders and lines that appear whole or not at all."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnnlib.disk import DiskFull, sync_folder, write_error

# The hidden names of unfinished files and folders, which a killed process leaves. Group 1 is the final name, if any.
TEMPORARY = re.compile(r"\.(?:(.+)\.)?[0-9a-f]{12}\.tmp")


def temporary_path(dest: Path) -> Path:
    """Return a new path next to `dest` for what will become `dest`, with a name that TEMPORARY matches."""
    return dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:12]}.tmp")


def remove_leftovers(dest: Path) -> None:
    """Delete the temporary files that were to become `dest`; no process may be writing one."""
    for path in dest.parent.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match[1] == dest.name and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def atomic_path(dest: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Yield the path of a new empty file next to `dest` to write to; rename it to `dest` if the block succeeds.

    With `sync` the data is flushed to disk before the rename and the new name after it: a crash, a kill, a power cut or
    a full disk leaves the old file or no file. If the block raises, the temporary file is removed and `dest` is
    untouched. The folder must exist. Several threads may do this at once.
    """
    dest = Path(dest)
    temp = temporary_path(dest)
    # Not by tempfile, whose files only the owner may read, whatever the umask says.
    temp.touch(exist_ok=False)
    mode = temp.stat().st_mode
    try:
        yield temp
        temp.chmod(mode)  # a library may have replaced the file by its own
        if sync:
            with open(temp, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temp, dest)
        if sync:
            sync_folder(dest.parent)
    finally:
        temp.unlink(missing_ok=True)


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
    temp = temporary_path(dest)
    temp.mkdir()
    try:
        yield temp
        if dest.is_dir() and not dest.is_symlink() and not any(dest.iterdir()):
            dest.rmdir()
        if os.path.lexists(dest):
            raise FileExistsError(errno.EEXIST, "it exists already", str(dest))
        os.rename(temp, dest)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


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
