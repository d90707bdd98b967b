"""One item of a data set, from the bytes of its file to an array: a picture, or raw latents.

C channels, H x W pixels. `where` names the data set and the file in messages; its suffix tells the two kinds apart.
"""

import io
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.errors import ConfigError
from training.dataset.zip_index import one_line
from training.images.png import decode_plain_png

PICTURE_SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
LATENTS_SUFFIX = ".npy"
_ITEM_SUFFIXES = PICTURE_SUFFIXES | {LATENTS_SUFFIX}
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
    hidden = "/." in f"/{name}" or "__MACOSX" in name.split("/")
    return not hidden and _suffix(name) in _ITEM_SUFFIXES


def read_shape(data: Any, where: str) -> Shape:
    """[C, H, W] of an encoded item, from its header."""
    if is_latents(where):
        return _latents_header(data, where)
    with _open_picture(data, where) as picture:
        return _picture_shape(picture, where)


class ItemDecoder:
    """Turns the encoded items of one data set into arrays [C, H, W], all of the shape of its first item.

    Items that look as the first one did take a short way; the others, and damaged ones, are looked at in full. `data`
    is bytes or a view of them.
    """

    def __init__(self, data: Any, where: str) -> None:
        self.shape = read_shape(data, where)
        self.first = where
        self.latents = is_latents(where)
        self._size = len(data)
        self._header = _usual_header(data, self.shape) if self.latents else b""

    def decode(self, data: Any, where: Callable[[], str]) -> np.ndarray:
        """The array, a view of `data` where possible: the caller copies it. Raises ConfigError where it has no item
        like the first; `where` names the item for that."""
        if self.latents:
            start = len(self._header)
            if start and len(data) == self._size and data[:start] == self._header:
                return np.frombuffer(data, dtype="<f4", offset=start).reshape(self.shape)
        else:
            plain = decode_plain_png(data, self.shape)
            if plain is not None:
                return plain
        return self._decode_any(data, where())

    def _decode_any(self, data: Any, where: str) -> np.ndarray:
        self.check(data, where)  # before any pixel is decoded, so that a small file with an absurd size costs no memory
        try:
            if self.latents:
                array = np.load(io.BytesIO(data), allow_pickle=False)
                return array.astype(np.float32, copy=False)
            with _open_picture(data, where) as picture:
                return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
        except Exception as error:
            raise ConfigError(f"{where} is damaged: {one_line(error)}") from None

    def check(self, data: Any, where: str) -> None:
        """Raise ConfigError unless the header of an encoded item has the shape of the first one."""
        shape = read_shape(data, where)
        if shape != self.shape:
            first = self.first.rpartition(": ")[2]
            raise ConfigError(
                f"{where} is {_format_shape(shape)}, but the first image, {first}, is {_format_shape(self.shape)}; "
                f"all must be alike: {CONVERT_HINT}"
            )


def _usual_header(data: Any, shape: Shape) -> bytes:
    """What precedes the numbers of an .npy file; empty unless these are little-endian, in C order and complete."""
    num_bytes = 4 * shape[0] * shape[1] * shape[2]
    start = len(data) - num_bytes
    usual = io.BytesIO()
    np.lib.format.write_array_header_1_0(usual, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return usual.getvalue() if usual.tell() == start and bytes(data[:start]) == usual.getvalue() else b""


def _open_picture(data: Any, where: str) -> PIL.Image.Image:
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


def _latents_header(data: Any, where: str) -> Shape:
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:
        raise ConfigError(f"{where} is no readable .npy file: {one_line(error)}") from None
    if dtype != np.float32 or len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"{where} holds {dtype} {list(shape)}; raw latents are float32 [channels, height, width]")
    if math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
        raise ConfigError(f"{where} is damaged: it is cut short, its header promises float32 {list(shape)}")
    return shape


def _format_shape(shape: Shape) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
