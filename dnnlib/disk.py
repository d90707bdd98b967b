"""Disks that are full, read-only or gone, explained in one line; output folders; flushing."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import format_bytes

# Names with these suffixes are meant for files, and are not made into folders.
_IMAGES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FILES = _IMAGES | {".csv", ".html", ".json", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".tar", ".zip"}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskFull(ConfigError):
    """The disk has no room for a file; the same write would succeed with more room."""


def write_error(path: str | os.PathLike[str], error: OSError, *, kept: str = "") -> ConfigError:
    """Return the exception to raise if writing `path` failed with `error`; `kept` says what is still intact."""
    path = Path(path)
    kind = DiskFull if error.errno in _FULL else ConfigError
    reason = reason_of(error)
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        reason = f"the folder {path.parent} is gone"
    return kind(f"cannot write {path}: {reason}{kept}")


def require_plain(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError for a pipe, a device or a socket: opening one may wait for ever, and some have no end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ConfigError(f"{path} is a pipe, a device or a socket, not a file; remove it, or name another path")


def require_space(path: Path, num_bytes: int) -> None:
    """Raise DiskFull if the disk has no room for `num_bytes` more; quotas show only when the file is written."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return  # writing the file will tell the reason
    if free < num_bytes:
        raise DiskFull(
            f"cannot write {path}: it needs {format_bytes(num_bytes)}, and the disk has {format_bytes(free)} left"
        )


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, so that a rename survives a power cut; does nothing on Windows."""
    if os.name == "nt":
        return  # it cannot open folders
    with contextlib.suppress(OSError):  # some network file systems refuse, and guarantee something else
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def forget_cached(handle: int) -> None:
    """Drop the system's cached content of the open file, which must be flushed, so that reading asks the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def require_folder(path: Path) -> None:
    """Raise ConfigError if `path` is not a folder and cannot become one; creates nothing."""
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        for name in path.parts[len(nearest.parts) :]:
            (nearest / name).exists()  # raises if the file system forbids the name
    except OSError as error:
        raise ConfigError(f"the output folder {path} cannot be made: {error.strerror}") from None
    if not nearest.is_dir():
        raise ConfigError(f"the output folder {path} cannot be made: {nearest} is a file")
    if path.suffix.lower() in _FILES and nearest != path:
        raise ConfigError(f"the output folder {path} has the name of a file; name a folder, such as {path.stem}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        if hasattr(os, "statvfs") and os.statvfs(nearest).f_flag & os.ST_RDONLY:
            raise ConfigError(f"the output folder {path} cannot be written to: {nearest} is on a read-only file system")
        raise ConfigError(f"the output folder {path} cannot be written to: no permission for {nearest}")


def require_file_place(path: Path) -> None:
    """Raise ConfigError if no file can be written to `path`; creates nothing."""
    require_folder(path.parent)
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder; name a file")


def make_folder(path: Path) -> None:
    """Create the folder `path` and its missing parents. Raises ConfigError if that fails."""
    require_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output folder {path} cannot be made: {error.strerror}") from None
