"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnnlib.disk import sync_folder


@contextmanager
def atomic_path(dest: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Give the path of a new empty file beside `dest` to write to; rename it to `dest` when the block ends well.

    With `sync` the data is flushed to disk before the rename, and the new name after it, so that a crash, a kill, a
    power cut or a full disk leaves the old file or no file. When the block raises, the temporary file is removed and
    `dest` is untouched. The folder must exist. Threads may do this at the same time.
    """
    dest = Path(dest)
    temp = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:12]}.tmp")
    # Made here and not by tempfile, whose files no one else may read, whatever the umask says.
    temp.touch(exist_ok=False)
    mode = temp.stat().st_mode
    try:
        yield temp
        temp.chmod(mode)  # a library may have put a file of its own in the place
        if sync:
            with open(temp, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temp, dest)
        if sync:
            sync_folder(dest.parent)
    finally:
        temp.unlink(missing_ok=True)


def write_text(dest: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `dest` as UTF-8 with Unix line ends, whole or not at all."""
    with atomic_path(dest) as temp:
        temp.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_folder(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new folder beside `dest` to fill; rename it to `dest` when the block ends well.

    `dest` must not exist, or be an empty folder. Raises FileExistsError where there is anything else by then, and
    leaves that as it is; when the block raises, too.
    """
    dest = Path(dest)
    temp = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:12]}.tmp")
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
