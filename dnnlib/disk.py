"""What a disk can do to a program: to be full, read-only or gone; told in one line."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from dnnlib.errors import ConfigError, reason_of

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskFull(ConfigError):
    """There is no room for a file; with room, the same would work."""


def write_error(path: str | os.PathLike[str], error: OSError, *, kept: str = "") -> ConfigError:
    """What to raise where writing `path` failed with `error`; `kept` tells what is still there."""
    path = Path(path)
    kind = DiskFull if error.errno in _FULL else ConfigError
    reason = reason_of(error)
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        reason = f"the folder {path.parent} is gone"
    return kind(f"cannot write {path}: {reason}{kept}")


def require_space(path: Path, num_bytes: int) -> None:
    """Raise DiskFull where the disk of the future file `path` has no room for `num_bytes`.

    A quota is not seen here: it shows when the file is written.
    """
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return  # then writing it tells what is wrong
    if free < num_bytes:
        raise DiskFull(f"cannot write {path}: it needs {in_units(num_bytes)}, and the disk has {in_units(free)} left")


def in_units(num_bytes: int) -> str:
    """Bytes as people read them: 900 bytes, 12.3 MB, 2.51 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, so that a rename outlives a power cut. Does nothing where no system can."""
    if os.name == "nt":
        return  # folders cannot be opened there
    with contextlib.suppress(OSError):  # some network file systems refuse; they have their own promises
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def forget_cached(handle: int) -> None:
    """Have the system drop its copy of the open file's content, which must be flushed: reading then asks the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
