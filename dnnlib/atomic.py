"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `dest` to write to; rename it to `dest` when the block ends well.

    The data is flushed to disk before the rename, so that a crash, a kill or a full disk leaves the old file or no
    file. When the block raises, the temporary file is removed and `dest` is untouched. The folder must exist.
    """
    dest = Path(dest)
    handle, name = tempfile.mkstemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent)
    os.close(handle)
    temp = Path(name)
    try:
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temp, 0o666 & ~_umask())
        os.replace(temp, dest)
    finally:
        temp.unlink(missing_ok=True)


def write_text(dest: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `dest` as UTF-8 with Unix line ends, whole or not at all."""
    with atomic_path(dest) as temp:
        temp.write_text(text, encoding="utf-8", newline="\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
