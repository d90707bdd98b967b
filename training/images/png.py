"""A fast way into the PNG files of data sets: 8 bits, no palette, no interlacing; anything else is left to Pillow.

Uncompressed PNGs whose rows are not filtered, as dataset_tool.py writes them, are little more than a copy. Rows may
also hold differences to their neighbours (PNG specification, section 9); those are decoded by `pyspng` where it is
installed (pip install 'edm2[png]'), several times as fast as Pillow does.

C channels, H x W pixels.
"""

import struct
import zlib
from functools import cache
from typing import Any

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, kind, compression, filter, interlacing
_CHUNK = struct.Struct(">I4s")  # length, name
KIND = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's number for the kind of pixel, by channels: grey, with alpha, RGB, with alpha


def decode_plain_png(data: Any, shape: tuple[int, int, int]) -> np.ndarray | None:
    """The pixels uint8 [C, H, W] of a plain PNG of this `shape`, a view that is not contiguous; None for any other."""
    if data[:8] != SIGNATURE or len(data) < 33 or data[12:16] != b"IHDR":
        return None
    channels, height, width = shape
    if HEADER.unpack_from(data, 16) != (width, height, 8, KIND.get(channels), 0, 0, 0):
        return None
    packed = _image_data(data)
    if packed is None:
        return None
    row_size = 1 + width * channels  # the number of the filter, then the pixels
    try:
        if zlib.decompressobj().decompress(packed, 1) != b"\0":
            return _decode_filtered(data, shape)
        unpacked = zlib.decompressobj()
        pixels = unpacked.decompress(packed, height * row_size + 1)
    except zlib.error:
        return None
    if len(pixels) != height * row_size or not unpacked.eof:  # at the end, the checksum has been compared
        return None
    rows = np.frombuffer(pixels, dtype=np.uint8).reshape(height, row_size)
    if rows[:, 0].any():
        return _decode_filtered(data, shape)
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def encode_plain_png(image: np.ndarray) -> bytes:
    """A PNG of `image` (uint8 [C, H, W], C from 1 to 4), uncompressed and with unfiltered rows: the fastest to read."""
    channels, height, width = image.shape
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = image.transpose(1, 2, 0).reshape(height, -1)
    header = HEADER.pack(width, height, 8, KIND[channels], 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 0)) + chunk(b"IEND")


def chunk(name: bytes, content: bytes = b"") -> bytes:
    """A chunk of a PNG file, with its length and checksum."""
    return _CHUNK.pack(len(content), name) + content + struct.pack(">I", zlib.crc32(name + content))


def _image_data(data: Any) -> Any:
    """The compressed pixels, put together from their chunks; None where a chunk may change what they mean."""
    parts = []
    start = 8
    while start + 8 <= len(data):
        length, name = _CHUNK.unpack_from(data, start)
        if name == b"IDAT":
            parts.append(data[start + 8 : start + 8 + length])
        elif name == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
        elif name == b"tRNS":
            return None
        start += 12 + length
    return None


@cache
def _filtered_decoder() -> Any:
    try:
        import pyspng
    except ImportError:
        return None
    return pyspng.load


def _decode_filtered(data: Any, shape: tuple[int, int, int]) -> np.ndarray | None:
    decode = _filtered_decoder()
    if decode is None:
        return None
    try:
        pixels = np.atleast_3d(decode(bytes(data)))
    except Exception:  # a damaged file, for which Pillow has better words
        return None
    return pixels.transpose(2, 0, 1) if pixels.dtype == np.uint8 and pixels.shape == (*shape[1:], shape[0]) else None
