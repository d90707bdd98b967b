"""One item of a data set, from the bytes of its file to an array: an image, or raw latents.

C channels, H x W pixels. `where` names the data set and the file in messages; its suffix tells the two kinds apart.
"""

import io
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from training.images.decode import IMAGE_SUFFIXES, Unreadable, open_image
from training.images.png import decode_plain_png

LATENTS_SUFFIX = ".npy"
_ITEM_SUFFIXES = IMAGE_SUFFIXES | {LATENTS_SUFFIX}
CONVERT_HINT = "dataset_tool.py convert makes a data set of one kind and size"

Shape = tuple[int, int, int]  # [C, H, W]

# Pixel modes whose values are intensities. The indices of a palette, for example, are not.
_CHANNELS_OF_MODE = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_latents(name: str) -> bool:
    """Return whether the file holds raw latents, not an image."""
    return _suffix(name) == LATENTS_SUFFIX


def is_item(name: str) -> bool:
    """Return whether the file is an image or raw latents, judged by its name."""
    # File managers add previews and resource forks to archives under such names.
    hidden = "/." in f"/{name}" or "__MACOSX" in name.split("/")
    return not hidden and _suffix(name) in _ITEM_SUFFIXES


def require_one_kind(names: Iterable[str], where: str) -> None:
    """Raise ConfigError if some of the items `names` are raw latents and some are images."""
    latents = [is_latents(name) for name in names]
    if 0 < sum(latents) < len(latents):
        raise ConfigError(
            f"{where} mixes {sum(latents)} .npy files and {len(latents) - sum(latents)} images; "
            f"give a data set of one kind"
        )


def read_shape(data: Any, where: str) -> Shape:
    """Return [C, H, W] of an encoded item, from its header."""
    if is_latents(where):
        return _latents_header(data, where)
    try:
        with open_image(data) as image:
            if image.mode not in _CHANNELS_OF_MODE:
                known = ", ".join(_CHANNELS_OF_MODE)
                raise ConfigError(f"{where} has pixels of the kind {image.mode}, not one of {known}: {CONVERT_HINT}")
            return _CHANNELS_OF_MODE[image.mode], image.height, image.width
    except Unreadable as error:
        raise ConfigError(f"{where} is not a readable image: {error}") from None


class ItemDecoder:
    """Decodes the items of one data set into arrays [C, H, W], all of the shape of its first item.

    Items encoded as usual take a fast path; others, and damaged ones, are parsed in full. `data` is bytes or a view.

    first:  location of the first item, for messages.
    """

    def __init__(self, shape: Shape, first: str) -> None:
        self.shape = shape
        self.first = first
        self.latents = is_latents(first)
        self._header = _usual_header(shape) if self.latents else b""
        self._size = len(self._header) + 4 * math.prod(shape)  # of an .npy file

    def decode(self, data: Any, where: Callable[[], str]) -> np.ndarray:
        """Return the array, possibly a view of `data`. Raises ConfigError, with `where()`, for one unlike the first."""
        if self.latents:
            start = len(self._header)
            if len(data) == self._size and data[:start] == self._header:
                return np.frombuffer(data, dtype="<f4", offset=start).reshape(self.shape)
        else:
            plain = decode_plain_png(data, self.shape)
            if plain is not None:
                return plain
        return self._decode_any(data, where())

    def _decode_any(self, data: Any, where: str) -> np.ndarray:
        self.check(data, where)  # before decoding, so that a small file that claims an absurd size costs no memory
        try:
            if self.latents:
                array = np.load(io.BytesIO(data), allow_pickle=False)
                return array.astype(np.float32, copy=False)
            with open_image(data) as image:
                return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        except Exception as error:
            raise ConfigError(f"{where} is damaged: {one_line(error)}") from None

    def check(self, data: Any, where: str) -> None:
        """Raise ConfigError unless the header of an encoded item states the shape of the first one."""
        shape = read_shape(data, where)
        if shape != self.shape:
            first = self.first.rpartition(": ")[2]
            raise ConfigError(
                f"{where} is {_format_shape(shape)}, but the first image, {first}, is {_format_shape(self.shape)}; "
                f"all must be alike: {CONVERT_HINT}"
            )


def _usual_header(shape: Shape) -> bytes:
    """Return the header that NumPy writes to an .npy file of little-endian numbers in C order."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _latents_header(data: Any, where: str) -> Shape:
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:
        reason = POINTER_HINT if is_lfs_pointer(data) else one_line(error)
        raise ConfigError(f"{where} is not a readable .npy file: {reason}") from None
    if dtype != np.float32 or len(shape) != 3 or min(shape) < 1:
        hint = "; dataset_tool.py convert makes a data set of images in an array" if dtype == np.uint8 else ""
        raise ConfigError(
            f"{where} holds {dtype} {list(shape)}; raw latents are float32 [channels, height, width]{hint}"
        )
    if math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
        raise ConfigError(f"{where} is damaged: it is cut short, its header promises float32 {list(shape)}")
    return shape


def _format_shape(shape: Shape) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
