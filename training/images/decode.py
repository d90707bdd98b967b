"""One picture: from the bytes of a file in any of the usual formats to RGB, and from RGB to the PNG of a data set.

docs/datasets.md says what becomes of every kind of pixel.
"""

import functools
import io
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

from training.dataset.item_files import one_line
from training.images.png import encode_plain_png

# Formats are known by content, not by name, and no others are tried: some of Pillow's decoders start programs.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    [".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
# 400 MB as RGB. A picture that claims more is refused by its header, before memory is given to it.
MAX_PIXELS = 1 << 27
# Formats in which Pillow's 32-bit integers ("I") stand for 16-bit intensities.
_SIXTEEN_BIT = ("PNG", "PPM")


class Unreadable(Exception):
    """Why a picture cannot be read, in one line, without its name."""


def decode_rgb(data: bytes | memoryview, *, exif: bool = False) -> Image:
    """The picture in `data` as RGB; of several, the first. With `exif`, turned upright as its EXIF data says.

    Raises Unreadable.
    """
    with warnings.catch_warnings():
        # Odd metadata, palettes with transparency, sizes between Pillow's limit and ours.
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(io.BytesIO(data), formats=_available_formats()) as picture:
                _require_size(picture.width, picture.height)
                picture.load()
                rgb = _to_rgb(picture)
                return PIL.ImageOps.exif_transpose(_with_orientation(rgb, picture)) if exif else rgb
        except Unreadable:
            raise
        except PIL.UnidentifiedImageError:
            raise Unreadable(_unidentified(data)) from None
        except Exception as error:  # whatever a decoder raises on damaged bytes
            raise Unreadable(one_line(error)) from None


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has; it fails for all where one that is asked for is missing."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def rgb_from_array(pixels: np.ndarray) -> Image:
    """The picture with `pixels`: uint8 [H, W], [H, W, 1] or [H, W, 3]."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def encode_png(picture: Image) -> bytes:
    """The picture as a PNG of unfiltered, uncompressed rows, which is read many times as fast as any other."""
    return encode_plain_png(np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1))


def _to_rgb(picture: Image) -> Image:
    """Alpha is dropped, colour profiles are not applied, 16 bits are scaled to 8."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in _SIXTEEN_BIT):
        # Pillow's own conversion cuts everything above 255 to white. 65535 is 255 * 257.
        intensities = np.asarray(picture).astype(np.int64)
        return rgb_from_array(((intensities + 128) // 257).clip(0, 255).astype(np.uint8))
    if mode in ("I", "F"):
        kind = "floating point" if mode == "F" else "32-bit integer"
        raise Unreadable(f"it has {kind} pixels, whose range is not known; save it with 8 or 16 bits")
    # Not handed on by Pillow where the mode is RGB already.
    return picture.convert("RGB")


def _with_orientation(rgb: Image, picture: Image) -> Image:
    """`rgb` with the EXIF data of the picture that it was made from, for Pillow to read the orientation there."""
    rgb.getexif()[_ORIENTATION] = picture.getexif().get(_ORIENTATION, 1)
    return rgb


_ORIENTATION = 0x0112


def _require_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Unreadable(f"its header claims {width}x{height}, more than the {MAX_PIXELS} pixels that are read")


def _unidentified(data: bytes | memoryview) -> str:
    if not data:
        return "the file is empty"
    return "it is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WebP, or its first bytes are damaged"
