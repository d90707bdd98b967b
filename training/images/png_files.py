"""Pictures as PNG files, fast: bytes of an image, with a text; and what the files that are there say.

Pillow tries all five row filters on each row and packs with a general search for repetitions. One filter and a search
for runs alone take a fraction of the time, nearly all of it where other Python threads can run, and give about the same
size where there is some grain (see docs/sampling.md).

Shape legend: C channels (1 grey, 3 RGB), H x W pixels.
"""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, reason_of
from training.images.png import HEADER, KIND, SIGNATURE, chunk

FAST = 1  # the level of compression that is used where none is asked for
SMALL = 6  # Pillow's default; about six times the work

# PNG specification, section 9.2: what stands in front of a row whose bytes were replaced by their difference to the
# mean of the bytes to the left and above.
_AVERAGE = 3
_END = chunk(b"IEND")
_MAX_TEXT = 1 << 16  # of what is read


def require_png_channels(num_channels: int) -> None:
    """Raise ConfigError unless images of `num_channels` can be written as PNG."""
    if num_channels not in (1, 3):
        raise ConfigError(
            f"images of {num_channels} channels cannot be written as PNG files, only grey (1) and RGB (3) ones can; "
            "latents need the decoder of their data set"
        )


def require_compression(level: int) -> None:
    """Raise ConfigError unless there is this level of compression."""
    if not 0 <= level <= 9:
        raise ConfigError(f"--png-compression={level} is no level; there are 0 (none) to 9 (smallest and slowest)")


def write_png(path: Path, image: np.ndarray, *, compression: int = FAST, texts: dict[str, str] | None = None) -> None:
    """Write `image` (uint8 [C, H, W]) to `path`, whole or not at all; the folder must exist. See `encode_png`.

    Not flushed to disk file by file, which would cost more than the encoding: an image lost to a power cut is made
    again from its seed.
    """
    data = encode_png(image, compression=compression, texts=texts)
    try:
        with atomic_path(path, sync=False) as temp:
            temp.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None


def encode_png(image: np.ndarray, *, compression: int = FAST, texts: dict[str, str] | None = None) -> bytes:
    """The PNG file of `image` (uint8 [C, H, W], C 1 or 3). The pixels are the same at every `compression`.

    0 stores them as they are, 1 is fast, 2 to 9 are Pillow's: smaller for smooth images, at 3 to 15 times the work.
    `texts` go into tEXt chunks by their keywords (section 11.3.3), in ASCII.
    """
    require_png_channels(image.shape[0])
    require_compression(compression)
    chunks = b"".join(
        chunk(b"tEXt", keyword.encode("ascii") + b"\0" + text.encode("ascii"))
        for keyword, text in (texts or {}).items()
    )
    if compression > FAST:
        data = _by_pillow(image, compression)
        return data[: len(SIGNATURE) + 25] + chunks + data[len(SIGNATURE) + 25 :]  # after the header's chunk
    channels, height, width = image.shape
    rows = np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(height, width * channels)
    packer = zlib.compressobj(compression, strategy=zlib.Z_RLE)
    prepared = _filtered(rows, channels) if compression else _unfiltered(rows)
    packed = packer.compress(prepared.data) + packer.flush()
    header = chunk(b"IHDR", HEADER.pack(width, height, 8, KIND[channels], 0, 0, 0))
    return b"".join([SIGNATURE, header, chunks, chunk(b"IDAT", packed), _END])


def _unfiltered(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros([len(rows), 1], np.uint8), rows], axis=1)


def _filtered(rows: np.ndarray, channels: int) -> np.ndarray:
    """Rows uint8 [H, W*C] as PNG's filter "average" leaves them, each behind the filter's number: [H, 1 + W*C]."""
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, channels:] = rows[:, :-channels]
    above[1:] = rows[:-1]
    result = np.empty([rows.shape[0], 1 + rows.shape[1]], np.uint8)
    result[:, 0] = _AVERAGE
    # (a + b) // 2 in 8 bits: what both have, and half of what one has.
    np.subtract(rows, (left & above) + ((left ^ above) >> 1), out=result[:, 1:])
    return result


def _by_pillow(image: np.ndarray, compression: int) -> bytes:
    import PIL.Image  # takes a moment to load, which few need

    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)  # [H, W] or [H, W, C]
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=compression)
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class PngHead:
    """What a PNG file says of itself without its pixels."""

    shape: tuple[int, int, int] | None  # C, H, W of a grey or RGB picture of 8 bits; None for other kinds
    texts: dict[str, str]  # in front of the pixels, by keyword


def read_png_head(path: Path) -> PngHead | None:
    """The head of the PNG file `path`; None where there is no file or it is no PNG file with a beginning and an end."""
    try:
        with open(path, "rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return None
            head = _read_chunks(file)
            file.seek(-len(_END), os.SEEK_END)
            return head if file.read() == _END else None
    except (OSError, struct.error, ValueError):
        return None


def _read_chunks(file: io.BufferedReader) -> PngHead | None:
    """From a file behind its signature: the chunks in front of the pixels."""
    shape = None
    texts = {}
    while True:
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IHDR" and length == HEADER.size:
            width, height, bits, kind, *_ = HEADER.unpack(file.read(length))
            channels = {KIND[c]: c for c in (1, 3)}.get(kind)
            shape = (channels, height, width) if channels and bits == 8 else None
            file.seek(4, os.SEEK_CUR)
        elif name == b"tEXt" and length <= _MAX_TEXT:
            keyword, _, text = file.read(length).partition(b"\0")
            texts[keyword.decode("latin1")] = text.decode("latin1")
            file.seek(4, os.SEEK_CUR)
        elif name in (b"IDAT", b"IEND"):
            return PngHead(shape=shape, texts=texts) if name == b"IDAT" else None
        else:
            file.seek(length + 4, os.SEEK_CUR)


def read_png(path: Path) -> np.ndarray:
    """The pixels of a grey or RGB picture, uint8 [C, H, W]. Raises ConfigError where there is none."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim > 3:
        raise ConfigError(f"{path} is no picture of 8 bits")
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
