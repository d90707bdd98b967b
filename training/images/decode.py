"""Decoding of image files of all usual formats to RGB. docs/datasets.md lists how every kind of pixel is converted."""

import functools
import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

from dnnlib.errors import one_line

# Formats are known by content, not by name. No others are tried: some of Pillow's decoders start programs.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = frozenset(
    [".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
# 400 MB as RGB. The header of a larger image is enough to refuse it, before any memory is allocated.
MAX_PIXELS = 1 << 27
# Formats in which Pillow's 32-bit integers ("I") hold 16-bit intensities.
_SIXTEEN_BIT = ("PNG", "PPM")
_ORIENTATION = 0x0112  # EXIF tag


class Unreadable(Exception):
    """The reason why an image cannot be read, in one line, without its name."""


def is_image(name: str) -> bool:
    """Return whether `name`, with forward slashes, is that of an image file."""
    # File managers put previews and resource forks under such names into archives.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and Path(name).suffix.lower() in _SUFFIXES


def decode_rgb(data: bytes | memoryview, *, exif: bool = False) -> Image:
    """Decode `data` to RGB, the first of several images, upright by its EXIF data if `exif`. Raises Unreadable."""
    with warnings.catch_warnings():
        # Odd metadata, palettes with transparency, sizes between Pillow's limit and ours.
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(io.BytesIO(data), formats=_available_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width}x{image.height}"
                    raise Unreadable(f"its header claims {size}, more than the limit of {MAX_PIXELS} pixels")
                image.load()
                rgb = _to_rgb(image)
                if exif:
                    # `rgb` has no metadata: copy the tag that exif_transpose looks for.
                    rgb.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
                    rgb = PIL.ImageOps.exif_transpose(rgb)
                return rgb
        except Unreadable:
            raise
        except PIL.UnidentifiedImageError:
            reason = "it is not a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, or its first bytes are damaged"
            raise Unreadable(reason if data else "the file is empty") from None
        except Exception as error:  # decoders raise anything on damaged bytes
            raise Unreadable(one_line(error)) from None


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has; with a missing one in the list, it would open no file at all."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def rgb_from_array(pixels: np.ndarray) -> Image:
    """RGB image of `pixels`: uint8 [H, W], [H, W, 1] or [H, W, 3]."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _to_rgb(image: Image) -> Image:
    """Drop alpha and scale 16 bits to 8. Color profiles are not applied."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in _SIXTEEN_BIT):
        # Pillow's own conversion clips everything above 255 to white. 65535 is 255 * 257.
        intensities = np.asarray(image).astype(np.int64)
        return rgb_from_array(((intensities + 128) // 257).clip(0, 255).astype(np.uint8))
    if mode in ("I", "F"):
        kind = "floating point" if mode == "F" else "32-bit integer"
        raise Unreadable(f"it has {kind} pixels of unknown range; save it with 8 or 16 bits")
    return image.convert("RGB")
