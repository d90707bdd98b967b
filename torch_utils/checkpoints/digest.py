"""A digest of a whole file, inside the file: in the comment that the ZIP format has room for at its end.

A file of torch.save is a ZIP file. Its last record gets the comment `edm2 sha256 ` + 64 hexadecimal digits; they are
the SHA-256 of every byte before them, that record and the comment's first part included. So no bit of the file can
change unnoticed, and whatever reads ZIP files, torch.load among them, reads it as before.
"""

import hashlib
import os
import struct
from pathlib import Path
from typing import IO, Any

from dnnlib.disk import forget_cached

_LABEL = b"edm2 sha256 "
_COMMENT_BYTES = len(_LABEL) + 64
_END = b"PK\x05\x06"  # the signature of the last record, of 22 bytes, the last two of which count the comment's
_END_BYTES = 22
_BLOCK_BYTES = 8 << 20


class DigestWriter:
    """A file object for torch.save, around `file`; `finish` adds the digest.

    torch.save may turn an OSError of its file into another error: it is kept in `failure`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.failure: OSError | None = None
        self._file = file
        self._hash = hashlib.sha256()
        self._held = b""  # what may be the last record

    def write(self, data: Any) -> int:
        """Take in `data`, a bytes-like object."""
        view = memoryview(data).cast("B")
        if len(view) >= _END_BYTES:
            self._emit(self._held)
            self._emit(view[:-_END_BYTES])
            self._held = bytes(view[-_END_BYTES:])
        else:
            held = self._held + bytes(view)
            self._emit(held[:-_END_BYTES])
            self._held = held[-_END_BYTES:]
        return len(view)

    def flush(self) -> None:
        """What is written stays in this program's buffers until the file is closed."""

    def finish(self) -> str:
        """Write the rest and the digest, which is also the result."""
        assert self._held[:4] == _END and self._held[-2:] == b"\0\0", "torch.save wrote no ZIP file"
        self._emit(self._held[:-2] + struct.pack("<H", _COMMENT_BYTES) + _LABEL)
        digest = self._hash.hexdigest()
        self._emit(digest.encode())
        return digest

    def _emit(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._hash.update(data)


def read_digest(path: str | os.PathLike[str]) -> str | None:
    """The digest that the file carries, unchecked; None if it has none."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END_BYTES - _COMMENT_BYTES, 0))
        tail = file.read()
    head = tail[:_END_BYTES]
    if len(tail) < _END_BYTES + _COMMENT_BYTES or head[:4] != _END or head[20:] != struct.pack("<H", _COMMENT_BYTES):
        return None
    if not tail[_END_BYTES:].startswith(_LABEL):
        return None
    return tail[-64:].decode("ascii", errors="replace")


def digest_of(path: str | os.PathLike[str], *, from_disk: bool = False) -> str:
    """The digest that the file should carry, from its content; `from_disk` reads around the system's copy of it."""
    found = hashlib.sha256()
    left = Path(path).stat().st_size - 64
    block = memoryview(bytearray(max(min(left, _BLOCK_BYTES), 0)))
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            forget_cached(file.fileno())
        while left > 0:
            count = file.readinto(block[: min(left, len(block))])
            if not count:
                break
            found.update(block[:count])
            left -= count
    return found.hexdigest()
