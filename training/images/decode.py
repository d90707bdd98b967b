"""Image files of all usual formats: opened, and decoded as docs/datasets.md tells for every kind of pixel.

H x W pixels.
"""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
from PIL.Image import Image

from dnnlib.errors import ConfigError, one_line
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from training.images.png import SIGNATURE

# Formats are known by content, not by name. No others are tried: some of Pillow's decoders start programs.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Names of images in data sets; `convert` takes a few more.
IMAGE_SUFFIXES = frozenset([".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
_SUFFIXES = IMAGE_SUFFIXES | {".dib", ".jfif", ".jpe", ".pnm"}
# 400 MB as RGB. The header of a larger image is enough to refuse it, before any memory is allocated.
MAX_PIXELS = 1 << 27
# Pillow refuses PNG files with a text or a color profile above these limits. The image does not need them.
_MAX_TEXT_BYTES, _MAX_ALL_TEXT_BYTES = 1 << 20, 1 << 26
# Formats in which Pillow's 32-bit integers ("I") hold 16-bit intensities.
_SIXTEEN_BIT = ("PNG", "PPM")
_ORIENTATION = 0x0112  # EXIF tag
_PHOTOMETRIC = 262  # TIFF tag; 0 = white is zero
KEEP_ALPHA = "none"  # in place of a background


class Unreadable(Exception):
    """The reason why an image cannot be read, in one line, without its name."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How images become RGB with 8 bits. Raises ConfigError for values that cannot be."""

    exif: bool = False  # turn images upright by their EXIF data
    background: str | None = None  # color behind transparent pixels; KEEP_ALPHA for RGBA; None drops alpha
    value_range: tuple[float, float] | None = None  # black and white of more than 8 bits; None: the range of the format

    def __post_init__(self) -> None:
        if self.background not in (None, KEEP_ALPHA):
            try:
                PIL.ImageColor.getrgb(self.background)
            except ValueError:
                raise ConfigError(
                    f"--background={self.background} is not a color; give a name such as white, #rrggbb, or"
                    f" {KEEP_ALPHA}, which keeps transparency"
                ) from None
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            low, high = self.value_range
            raise ConfigError(f"--range={low:g},{high:g} must begin with the smaller value, which becomes black")


class Decoded(NamedTuple):
    """An image with 8 bits, RGB or RGBA, and what it was."""

    image: Image
    transparent: bool  # True if a pixel was not opaque
    largest: int | None  # largest value of a file with 16 bits; None for others


def is_image(name: str) -> bool:
    """Return whether `name`, with forward slashes, is that of an image file."""
    # File managers put previews and resource forks under such names into archives.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and Path(name).suffix.lower() in _SUFFIXES


@contextmanager
def open_image(data: bytes | memoryview) -> Iterator[Image]:
    """Open an encoded image of one of FORMATS, whose pixels are decoded on first use. A context manager.

    Nothing else calls Pillow's own opener, which tries all formats. Raises Unreadable, also for failures of the block.
    """
    try:
        with PIL.Image.open(io.BytesIO(_without_long_texts(data)), formats=_available_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise Unreadable(f"its header claims {size}, more than the limit of {MAX_PIXELS} pixels")
            yield image
    except (Unreadable, ConfigError):
        raise
    except PIL.UnidentifiedImageError:
        raise Unreadable(_why_unknown(data)) from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise Unreadable(one_line(error)) from None


def decode_image(data: bytes | memoryview | np.ndarray, options: DecodeOptions) -> Decoded:
    """Decode a file, the first of several images in it, or take pixels: uint8 [H, W] or [H, W, 1 to 4].

    Raises Unreadable.
    """
    if isinstance(data, np.ndarray):
        pixels = data[:, :, 0] if data.ndim == 3 and data.shape[2] == 1 else data
        return _decoded(PIL.Image.fromarray(np.ascontiguousarray(pixels)), options)
    with warnings.catch_warnings():
        # Odd metadata, palettes with transparency, sizes between Pillow's limit and ours.
        warnings.simplefilter("ignore")
        with open_image(data) as image:
            return _decoded(image, options)


def on_background(image: Image, color: str = "white") -> Image:
    """Return `image`, of a mode with 8 bits, as RGB with `color` behind transparent pixels."""
    alpha = alpha_channel(image)
    rgb = image.convert("RGB")
    return rgb if alpha is None else PIL.Image.composite(rgb, PIL.Image.new("RGB", image.size, color), alpha)


def alpha_channel(image: Image, stored: str = "") -> Image | None:
    """Return the alpha channel; None if all pixels are opaque. `stored`: the kind of pixels in the file."""
    key = image.info.get("transparency")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
    elif image.mode in ("PA", "La", "RGBa"):
        alpha = image.convert("RGBA").getchannel("A")
    elif image.mode.startswith("I;16") and isinstance(key, int):
        alpha = PIL.Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    elif key is not None and image.mode in ("1", "L", "P", "RGB"):
        # Pillow compares the key of the file with pixels that it has brought to 8 bits.
        if isinstance(key, tuple) and ";16" in stored:
            key = tuple(value >> 8 for value in key)
        elif image.mode == "L" and isinstance(key, int) and (";2" in stored or ";4" in stored):
            key *= 85 if ";2" in stored else 17
        image = image.copy()
        image.info["transparency"] = key
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def _why_unknown(data: bytes | memoryview) -> str:
    if is_lfs_pointer(data):
        return POINTER_HINT
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "this Pillow does not read AVIF; version 11.3 or later does"
    reason = (
        "it is not a BMP, GIF, JPEG, PNG, PPM, TIFF, WebP or AVIF that Pillow reads, or its first bytes are damaged"
    )
    return reason if data else "the file is empty"


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has; with a missing one in the list, it would open no file at all."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _without_long_texts(data: bytes | memoryview) -> bytes | memoryview:
    """Return a PNG without those texts and color profiles for whose length Pillow would refuse it; else `data`."""
    if data[:8] != SIGNATURE:
        return data
    kept: list[bytes | memoryview] = []
    begin, place, total = 0, 8, 0  # of what is kept, of the chunk, bytes of all texts
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = _text_size(name, bytes(data[place + 8 : end - 4]))
            if size > _MAX_TEXT_BYTES or total + size > _MAX_ALL_TEXT_BYTES:
                kept.append(data[begin:place])
                begin = end
            else:
                total += size
        place = end
    return b"".join([*kept, data[begin:]]) if kept else data


def _text_size(name: bytes, content: bytes) -> int:
    """Return the bytes of a text or color profile; of a compressed one those unpacked, as far as the limit."""
    text = content.partition(b"\0")[2]
    is_packed = name != b"tEXt"
    if name == b"iTXt":  # whether it is compressed, the method, the language, the translated keyword, the text
        is_packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif is_packed:
        text = text[1:]  # behind the method
    try:
        return len(zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES + 1)) if is_packed else len(text)
    except zlib.error:
        return len(text)


def _decoded(image: Image, options: DecodeOptions) -> Decoded:
    stored = str([tile[3] for tile in getattr(image, "tile", [])[:1]])  # such as I;16B, L;2 or RGB;16L; gone after load
    image.load()
    alpha = alpha_channel(image, stored)
    rgb, largest = _to_rgb(image, stored, options.value_range)
    if options.background == KEEP_ALPHA:
        result = PIL.Image.merge("RGBA", (*rgb.split(), alpha or PIL.Image.new("L", rgb.size, 255)))
    elif alpha is not None and options.background is not None:
        result = PIL.Image.composite(rgb, PIL.Image.new("RGB", rgb.size, options.background), alpha)
    else:
        result = rgb
    if options.exif:
        # `result` has no metadata: copy the tag that exif_transpose looks for.
        result.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
        result = PIL.ImageOps.exif_transpose(result)
    return Decoded(result, alpha is not None, largest)


def _to_rgb(image: Image, stored: str, value_range: tuple[float, float] | None) -> tuple[Image, int | None]:
    """Return the colors as RGB, without alpha, and the largest value if there are 16 bits. Profiles are not applied."""
    mode = image.mode
    is_gray16 = mode.startswith("I;16") or (mode == "I" and image.format in _SIXTEEN_BIT)
    if not is_gray16 and mode not in ("I", "F"):
        rgb = image.convert("RGB")
        if ";16" not in stored:
            return rgb, None
        if value_range is not None:
            raise Unreadable(
                "of 16 bits of color only the upper 8 can be read, too few for --range; save it with 8 bits"
            )
        return rgb, int(np.asarray(rgb).max()) << 8 | 255
    if not is_gray16 and value_range is None:
        kind = "floating point" if mode == "F" else "32-bit integer"
        raise Unreadable(
            f"it has {kind} pixels of unknown range; save it with 8 or 16 bits, or convert it with --range=LOW,HIGH"
        )
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("it holds numbers that are not finite")
    # Pillow's own conversion clips everything above 255 to white.
    low, high = value_range or (0, 4095 if ";12" in stored else 65535)
    gray = np.rint((values.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow leaves so
        gray = 255 - gray
    largest = int(values.max()) if is_gray16 and ";12" not in stored else None
    return PIL.Image.fromarray(gray).convert("RGB"), largest
