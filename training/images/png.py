"""PNG as bytes: a fast encoder, and a fast decoder for the plain files of data sets.

An encoder for 8-bit images: Pillow tries all five row filters on each row and compresses with a general search for
repetitions. One filter and a search for runs take a fraction of that time, nearly all of it outside Python's lock, and
give about the same size for images with some grain (docs/sampling.md). Uncompressed, unfiltered rows (`PLAIN`), as in
data sets, are the fastest to read: decoding is little more than a copy.

A decoder for 8 bits without palette or interlacing; everything else returns None and is left to Pillow. Rows may also
hold differences to their neighbors (PNG specification, section 9). `pyspng` decodes those several times faster than
Pillow where it is installed (pip install 'edm2[png]').

Shape legend: C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha), H x W pixels.
"""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError

PLAIN = 0  # compression level of data sets: no filters, no compression
FAST = 1  # default level for generated images
SMALL = 6  # Pillow's default; about six times the work of FAST

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, color type, compression, filter, interlacing
COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
CHANNELS = {color_type: channels for channels, color_type in COLOR_TYPE.items()}
_CHUNK = struct.Struct(">I4s")  # length, name
_AVERAGE = 3  # filter type: difference to the mean of the bytes to the left and above


def _chunk(name: bytes, content: bytes = b"") -> bytes:
    return _CHUNK.pack(len(content), name) + content + struct.pack(">I", zlib.crc32(name + content))


END = _chunk(b"IEND")


def require_png_channels(num_channels: int) -> None:
    """Raise ConfigError unless images of `num_channels` can be written as PNG."""
    if num_channels not in COLOR_TYPE:
        raise ConfigError(
            f"images of {num_channels} channels cannot be written as PNG files, only gray (1) and RGB (3) ones can, "
            "with alpha or without; latents need the decoder of their data set"
        )


def require_compression(level: int) -> None:
    """Raise ConfigError unless `level` is a compression level."""
    if not 0 <= level <= 9:
        raise ConfigError(f"--png-compression={level} must be from 0 (none) to 9 (smallest and slowest)")


def encode_png(image: np.ndarray, *, compression: int = FAST, texts: dict[str, str] | None = None) -> bytes:
    """Encode `image` (uint8 [C, H, W], C 1 to 4). The pixels are the same at every `compression`.

    0 (`PLAIN`) stores the pixels as they are, 1 is fast, 2 to 9 are Pillow's: smaller for smooth images, at 3 to 15
    times the work. `texts` go into tEXt chunks by their keywords (section 11.3.3), in ASCII.
    """
    require_png_channels(image.shape[0])
    require_compression(compression)
    chunks = b"".join(
        _chunk(b"tEXt", keyword.encode("ascii") + b"\0" + text.encode("ascii"))
        for keyword, text in (texts or {}).items()
    )
    if compression > FAST:
        data = _encode_by_pillow(image, compression)
        after_header = len(SIGNATURE) + len(_chunk(b"IHDR", bytes(HEADER.size)))
        return data[:after_header] + chunks + data[after_header:]
    channels, height, width = image.shape
    rows = np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(height, width * channels)
    if compression == PLAIN:
        packed = zlib.compress(np.pad(rows, [(0, 0), (1, 0)]).data, 0)  # filter type 0 in front of each row
    else:
        packer = zlib.compressobj(compression, strategy=zlib.Z_RLE)
        packed = packer.compress(_filter_rows(rows, channels).data) + packer.flush()
    header = HEADER.pack(width, height, 8, COLOR_TYPE[channels], 0, 0, 0)
    return b"".join([SIGNATURE, _chunk(b"IHDR", header), chunks, _chunk(b"IDAT", packed), END])


def _filter_rows(rows: np.ndarray, channels: int) -> np.ndarray:
    """Apply PNG's filter "average" to rows uint8 [H, W*C]; the result [H, 1 + W*C] begins with the filter type."""
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, channels:] = rows[:, :-channels]
    above[1:] = rows[:-1]
    result = np.empty([rows.shape[0], 1 + rows.shape[1]], np.uint8)
    result[:, 0] = _AVERAGE
    # (a + b) // 2 without leaving 8 bits: the bits that both have, and half of those that one has.
    np.subtract(rows, (left & above) + ((left ^ above) >> 1), out=result[:, 1:])
    return result


def _encode_by_pillow(image: np.ndarray, compression: int) -> bytes:
    import PIL.Image  # slow to import, and rarely needed

    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)  # [H, W] or [H, W, C]
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=compression)
    return file.getvalue()


def png_shape(data: Any) -> tuple[int, int, int] | None:
    """Return [C, H, W] of a PNG with 8 bits, without palette or interlacing, from its header; None for other files."""
    if data[:8] != SIGNATURE or len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, bits, color_type, *methods = HEADER.unpack_from(data, 16)
    channels = CHANNELS.get(color_type)
    return (channels, height, width) if channels and bits == 8 and not any(methods) else None


def decode_plain_png(data: Any, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Decode a plain PNG of this `shape`: a view uint8 [C, H, W], not contiguous; None for any other file."""
    if png_shape(data) != shape:
        return None
    channels, height, width = shape
    packed = _image_data(data)
    if packed is None:
        return None
    row_size = 1 + width * channels  # filter type, then the pixels
    try:
        if zlib.decompressobj().decompress(packed, 1) != b"\0":
            return _decode_filtered(data, shape)
        unpacked = zlib.decompressobj()
        pixels = unpacked.decompress(packed, height * row_size + 1)
    except zlib.error:
        return None
    if len(pixels) != height * row_size or not unpacked.eof:  # zlib compares the checksum when it reaches the end
        return None
    rows = np.frombuffer(pixels, dtype=np.uint8).reshape(height, row_size)
    if rows[:, 0].any():
        return _decode_filtered(data, shape)
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _image_data(data: Any) -> Any:
    """Join the compressed pixels of all IDAT chunks; None if another chunk may change their meaning."""
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
    except Exception:  # a damaged file, which Pillow describes better
        return None
    return pixels.transpose(2, 0, 1) if pixels.dtype == np.uint8 and pixels.shape == (*shape[1:], shape[0]) else None
