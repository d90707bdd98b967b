"""Signs that a file was cut, from its own format: for downloads whose server does not announce a length."""

import io
import json
import zipfile
import zlib
from typing import IO

_CHUNK_BYTES = 1 << 20
_MAX_UNPACKED = 1 << 32  # bytes of a gzip file that are unpacked to find its end
_MAX_HEADER = 100 << 20  # bytes, as the safetensors library has it
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first of several pickles, with raw data after them


def missing_end(file: IO[bytes]) -> str | None:
    """Return which end the content of `file` lacks; '' if it is there, None if the format does not tell."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "" if zipfile.is_zipfile(file) else "the ZIP end record"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if b"IEND\xaeB`\x82" in _tail(file, size, 64) else "the last chunk of a PNG"
    if head[257:262] == b"ustar":
        return "" if size % 512 == 0 and not _tail(file, size, 1024).strip(b"\0") else "the end of a tar"
    if head.startswith(b"\x1f\x8b"):
        return "" if _gzip_ends(file) else "the end of a gzip file"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and not head.startswith(_TORCH_LEGACY):
        return "" if _tail(file, size, 1) == b"." else "the STOP of a pickle"
    if head[8:9] == b"{":
        length = _safetensors_length(file)
        return None if length is None else "" if size >= length else "the last tensors of a safetensors file"
    return None


def _tail(file: IO[bytes], size: int, num_bytes: int) -> bytes:
    file.seek(max(size - num_bytes, 0))
    return file.read(num_bytes)


def _gzip_ends(file: IO[bytes]) -> bool:
    file.seek(0)
    unpacked, machine = 0, zlib.decompressobj(31)
    while unpacked < _MAX_UNPACKED:
        data = machine.unconsumed_tail or machine.unused_data.lstrip(b"\0") or file.read(_CHUNK_BYTES)
        if machine.eof:
            if not data.strip(b"\0") and len(data) < _CHUNK_BYTES:
                return True
            machine = zlib.decompressobj(31)  # another member
        elif not data:
            return False
        try:
            unpacked += len(machine.decompress(data, _CHUNK_BYTES))
        except zlib.error:
            return True  # damaged or padded, but not cut: its reader says what is wrong
    return True


def _safetensors_length(file: IO[bytes]) -> int | None:
    """Return the length that the header of a safetensors file describes; None if it is another file."""
    file.seek(0)
    num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > _MAX_HEADER:
        return None
    text = file.read(num_bytes)
    if len(text) < num_bytes:
        return 8 + num_bytes
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        return 8 + num_bytes + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return None
