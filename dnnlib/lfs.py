"""Git LFS pointers: the small text files that a repository has in place of large ones until these are fetched."""

from pathlib import Path
from typing import Any

POINTER_HINT = "it is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned"
_BEGIN = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(content: Any) -> bool:
    """Return whether a file is a pointer: its first bytes (at least 40), or its path, which may lead nowhere."""
    if not isinstance(content, Path):
        return bytes(content[: len(_BEGIN)]) == _BEGIN
    if not content.is_file():
        return False
    try:
        with open(content, "rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False
