"""The pictures that a network is asked to enlarge or to fill: out of files, or items of a data set.

Shape legend: C channels, H x W pixels.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.errors import ConfigError, reason_of
from training.condition.cond_source import SourcePicture
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.item_files import Files, open_files
from training.dataset.items import PICTURE_SUFFIXES, is_item, is_latents
from training.dataset.label_file import labels_array, read_file_labels
from training.images.decode import Unreadable, decode_rgb

_DIGITS = 16  # of digests
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
THRESHOLD = 128  # a mask is white, and an alpha channel opaque, from here on


class PictureFiles:
    """The pictures in a file, a folder (with subfolders) or a ZIP file, sorted by name, as `channels` (1 or 3).

    `masks` in the same forms are white where a picture is to be filled: one for all, or one for each in the order of
    their names. Transparent pixels are to be filled, too. Opening reads no picture. Raises ConfigError where there are
    none, or masks do not go with them. Classes are those of a dataset.json, where it has class indices.
    """

    def __init__(
        self, path: str | os.PathLike[str], channels: int, *, masks: str | os.PathLike[str] | None = None
    ) -> None:
        self._channels = channels
        self._files = _FileList(Path(path), "--source")
        self._masks = None if masks is None else _FileList(Path(masks), "--masks")
        if self._masks is not None and len(self._masks) not in (1, len(self._files)):
            raise ConfigError(
                f"--masks={masks} has {len(self._masks)} pictures for the {len(self._files)} of --source={path}; give"
                " one for each, or one for all"
            )
        self.classes = self._files.classes()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> SourcePicture:
        """See Pictures."""
        name = self._files.describe(index)
        data = self._files.read(index)
        pixels = _decoded(data, name, self._channels)
        hidden = _transparent_in(data, name)
        if self._masks is not None:
            place = index % len(self._masks)
            mask = _decoded(self._masks.read(place), self._masks.describe(place), 1)[0] >= THRESHOLD
            if mask.shape != pixels.shape[1:]:
                raise ConfigError(
                    f"{self._masks.describe(place)} is {_size_of(mask)} pixels, and the picture that it is for, {name},"
                    f" {_size_of(pixels)}; they must be alike"
                )
            hidden = mask if hidden is None else mask | hidden
        return SourcePicture(pixels=pixels, hidden=hidden, name=name)

    def digest(self, index: int) -> str:
        """See Pictures."""
        digest = hashlib.sha256(self._files.read(index))
        if self._masks is not None:
            digest.update(self._masks.read(index % len(self._masks)))
        return digest.hexdigest()[:_DIGITS]


class DatasetPictures:
    """Items of a data set of pictures, with what is `hidden` of each: bool [N, H, W], or None."""

    def __init__(self, dataset: ImageFolderDataset, indices: Sequence[int], *, hidden: np.ndarray | None) -> None:
        self._dataset = dataset
        self._indices = [int(index) for index in indices]
        self._hidden = hidden
        self.classes = None
        if dataset.has_labels:
            self.classes = [int(dataset.get_label(index).argmax()) for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> SourcePicture:
        """See Pictures."""
        images, _ = self._dataset.read_batch([self._indices[index]])
        hidden = None if self._hidden is None else self._hidden[index]
        return SourcePicture(pixels=images[0], hidden=hidden, name=f"image {self._indices[index]} of the data set")

    def digest(self, index: int) -> str:
        """See Pictures; here of what is in memory."""
        picture = self.read(index)
        digest = hashlib.sha256(picture.pixels.tobytes())
        digest.update(b"" if picture.hidden is None else picture.hidden.tobytes())
        return digest.hexdigest()[:_DIGITS]


class _FileList:
    """The pictures at a path; `option` is what the user gave it by."""

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        self._files: Files | None = None  # None: the path is the picture
        if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES:
            return
        if not path.exists():
            raise ConfigError(f"{option}={path} does not exist; give a picture, or a folder or ZIP file of pictures")
        self._files = open_files(path)
        names = self._files.names
        self._rows = [row for row, name in enumerate(names) if is_item(name) and not is_latents(name)]
        if not self._rows:
            raise ConfigError(f"{option}={path} holds no pictures; it has {len(names)} other files")

    def __len__(self) -> int:
        return 1 if self._files is None else len(self._rows)

    def describe(self, index: int) -> str:
        return str(self._path) if self._files is None else self._files.describe(self._rows[index])

    def read(self, index: int) -> bytes:
        if self._files is not None:
            return bytes(self._files.read(self._rows[index]))
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {reason_of(error)}") from None

    def classes(self) -> list[int] | None:
        if self._files is None:
            return None
        labels = read_file_labels(self._files, [self._files.names[row] for row in self._rows])
        array = None if labels is None else labels_array(labels)
        return array.tolist() if array is not None and array.dtype == np.int64 else None


def _decoded(data: bytes, name: str, channels: int) -> np.ndarray:
    """The pixels as uint8 [channels, H, W], grey or RGB."""
    assert channels in (1, 3)
    try:
        rgb = decode_rgb(data)
    except Unreadable as error:
        raise ConfigError(f"{name} cannot be read as a picture: {error}") from None
    pixels = np.atleast_3d(np.asarray(rgb.convert("L") if channels == 1 else rgb))
    return np.array(pixels.transpose(2, 0, 1), order="C")  # a copy: Pillow's own memory is read-only


def _transparent_in(data: bytes, name: str) -> np.ndarray | None:
    """The same for the bytes of a picture that was read before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(io.BytesIO(data)) as picture:
                return transparent(picture)
        except Exception as error:
            raise ConfigError(f"{name} cannot be read as a picture: {error}") from None


def transparent(picture: PIL.Image.Image) -> np.ndarray | None:
    """Where a picture lets through what is behind it, so that it is to be filled: bool [H, W]; None for opaque ones."""
    if picture.mode not in _WITH_ALPHA and "transparency" not in picture.info:
        return None
    return np.asarray(picture.convert("RGBA").getchannel("A")) < THRESHOLD


def white(mask: PIL.Image.Image) -> np.ndarray:
    """Where a mask says that something is to be filled: bool [H, W]."""
    return np.asarray(mask.convert("RGB").convert("L")) >= THRESHOLD


def _size_of(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
