"""One item of a data set, from the bytes of its file to an array: a picture, or raw latents.

C channels, H x W pixels. `where` names the data set and the file in messages; its suffix tells the two kinds apart.
"""

import io
import os

import numpy as np
import PIL.Image

from dnnlib.errors import ConfigError
from training.dataset_files import one_line

PICTURE_SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
LATENTS_SUFFIX = ".npy"
CONVERT_HINT = "dataset_tool.py convert makes a data set of one kind and size"

Shape = tuple[int, int, int]  # [C, H, W]

# Pixel modes whose values are intensities as they stand. A palette's indices, for one, are not.
_CHANNELS_OF_MODE = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_latents(name: str) -> bool:
    """Whether the file holds raw latents rather than a picture."""
    return _suffix(name) == LATENTS_SUFFIX


def is_item(name: str) -> bool:
    """Whether the file is a picture or raw latents, to go by its name."""
    # Archives made by file managers carry previews and resource forks under such names.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and (_suffix(name) in PICTURE_SUFFIXES or is_latents(name))


def read_shape(data: bytes, where: str) -> Shape:
    """[C, H, W] of an encoded item, from its header."""
    if is_latents(where):
        return _latents_header(data, where)
    with _open_picture(data, where) as picture:
        return _picture_shape(picture, where)


def decode(data: bytes, where: str, shape: Shape, first: str) -> np.ndarray:
    """The array [C, H, W] of an encoded item; ConfigError unless it has the `shape` of the item named `first`."""
    if is_latents(where):
        _check_shape(_latents_header(data, where), shape, where, first)
        try:
            return np.ascontiguousarray(np.load(io.BytesIO(data), allow_pickle=False))
        except Exception as error:
            raise ConfigError(f"{where} is damaged: {one_line(error)}") from None
    with _open_picture(data, where) as picture:
        # Before any pixel is decoded, so that a small file with an absurd size costs no memory.
        _check_shape(_picture_shape(picture, where), shape, where, first)
        try:
            pixels = np.asarray(picture)  # [H, W] or [H, W, C]
        except Exception as error:
            raise ConfigError(f"{where} is damaged: {one_line(error)}") from None
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def check_header(data: bytes, where: str, shape: Shape, first: str) -> None:
    """Raise ConfigError unless the header of an encoded item has the `shape` of the item named `first`."""
    _check_shape(read_shape(data, where), shape, where, first)


def _check_shape(shape: Shape, expected: Shape, where: str, first: str) -> None:
    if shape != expected:
        raise ConfigError(
            f"{where} is {_format_shape(shape)}, but the first image, {first}, is {_format_shape(expected)}; "
            f"all must be alike: {CONVERT_HINT}"
        )


def _open_picture(data: bytes, where: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError:
        raise ConfigError(f"{where} is no readable image") from None
    except Exception as error:  # whatever a decoder raises on damaged bytes
        raise ConfigError(f"{where} is no readable image: {one_line(error)}") from None


def _picture_shape(picture: PIL.Image.Image, where: str) -> Shape:
    if picture.mode not in _CHANNELS_OF_MODE:
        known = ", ".join(_CHANNELS_OF_MODE)
        raise ConfigError(f"{where} has pixels of the kind {picture.mode}, which is none of {known}: {CONVERT_HINT}")
    return _CHANNELS_OF_MODE[picture.mode], picture.height, picture.width


def _latents_header(data: bytes, where: str) -> Shape:
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:
        raise ConfigError(f"{where} is no readable .npy file: {one_line(error)}") from None
    if dtype != np.float32 or len(shape) != 3 or 0 in shape:
        raise ConfigError(f"{where} holds {dtype} {list(shape)}; raw latents are float32 [channels, height, width]")
    return shape


def _format_shape(shape: Shape) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
