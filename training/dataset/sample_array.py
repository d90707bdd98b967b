"""Images in one array: an .npz batch of samples, as other programs write and measure them, or an .npy file.

N images, H x W pixels, C channels: gray or RGB, with alpha or without.
"""

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from training.dataset.item_files import ZipFiles

KEY, LABELS_KEY = "arr_0", "arr_1"  # as numpy.savez names arrays that were given without names
_WANTED = "uint8 [N, H, W, 3]"
_MAX_HEADER_BYTES = 1 << 16


class SampleArray:
    """The array `arr_0` of an .npz file, or that of an .npy file: uint8 [N, H, W, C].

    It is mapped into memory; compressed arrays, of at most 1 GiB, are unpacked. Raises ConfigError for other files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels: np.ndarray | None = None
        self.names = [f"{path.name}[{i}]" for i in range(len(self.pixels))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> np.ndarray:
        """The images, uint8 [N, H, W, C]."""
        if self._pixels is None:
            self._pixels = self._open()
        return self._pixels

    def labels(self) -> list[Any] | None:
        """Return `arr_1` of an .npz file, one entry for each image; None if it is missing."""
        array = _arrays(self.path, LABELS_KEY).get(LABELS_KEY)
        return None if array is None else array.tolist()

    def _open(self) -> np.ndarray:
        if self.path.suffix.lower() == ".npy":
            try:
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):  # NumPy's own text advises to unpickle the file
                reason = POINTER_HINT if is_lfs_pointer(self.path) else "it is damaged, or not an array of numbers"
                raise ConfigError(f"{self.path} is not a readable .npy file: {reason}") from None
        else:
            found = _arrays(self.path, KEY)
            if KEY not in found:
                names = ", ".join(name.removesuffix(".npy") for name in ZipFiles(self.path).names)
                hint = "give statistics by --ref" if "mu" in names else f"images are in an array {KEY}, {_WANTED}"
                raise ConfigError(f"{self.path} holds the arrays {names}; {hint}")
            array = found[KEY]
        if array.dtype != np.uint8 or array.ndim != 4 or not 1 <= array.shape[3] <= 4 or 0 in array.shape:
            raise ConfigError(f"{self.path} holds {array.dtype} {list(array.shape)}; images are {_WANTED}")
        return array


@dataclass(frozen=True)
class ArrayHead:
    """Shape and type of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz_arrays(path: Path) -> dict[str, ArrayHead]:
    """Return the arrays of an .npz file by name; {} for a ZIP file of anything else. Raises ConfigError if damaged."""
    names = list(ZipFiles(path).names)
    if not names or not all(name.endswith(".npy") and "/" not in name for name in names):
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            heads = {}
            for name in names:
                with archive.open(name) as file:
                    heads[name.removesuffix(".npy")] = _read_head(file)[0]
            return heads
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise ConfigError(f"{path} is damaged, or not a file of arrays: {one_line(error)}") from None


def holds_array(path: Path) -> bool:
    """Return whether `path` is a file of arrays, by its name."""
    return path.suffix.lower() in (".npy", ".npz") and path.is_file()


def _arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    """Return the array `name` of an .npz file, by its name; {} if it is missing, or the file is an .npy file."""
    if path.suffix.lower() == ".npy":
        return {}
    files = ZipFiles(path)
    row = files.names.find(f"{name}.npy")
    return {} if row is None else {name: _array(files.read(row), files.describe(row))}


def _array(data: Any, where: str) -> np.ndarray:
    """Return the array in an .npy file, a view of `data`."""
    try:
        stream = io.BytesIO(bytes(data[:_MAX_HEADER_BYTES]))
        head, is_fortran = _read_head(stream)
        array = np.frombuffer(data, head.dtype, math.prod(head.shape), stream.tell())
        return array.reshape(head.shape, order="F" if is_fortran else "C")
    except Exception as error:  # NumPy raises many kinds on damaged headers
        raise ConfigError(f"{where} is damaged, or not an array of numbers: {one_line(error)}") from None


def _read_head(stream: IO[bytes]) -> tuple[ArrayHead, bool]:
    """Return the header of an .npy file, and whether its array is in Fortran's order."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    return ArrayHead(shape, dtype), is_fortran
