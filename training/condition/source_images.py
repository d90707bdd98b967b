"""The images that a network is asked to enlarge or to fill: from files, from a data set, or each of others repeated.

Shape legend: N images, C channels, H x W pixels.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image

from dnnlib.errors import ConfigError, reason_of
from training.dataset.contract import ImageDataset
from training.dataset.item_files import Files, open_files
from training.dataset.items import is_item, is_latents
from training.dataset.label_file import labels_array, read_file_labels
from training.images.decode import IMAGE_SUFFIXES, KEEP_ALPHA, DecodeOptions, Unreadable, alpha_channel, decode_image

_DIGITS = 16  # of digests
_THRESHOLD = 128  # a mask is white, and an alpha channel opaque, from this value up


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceImage:
    """One image."""

    pixels: np.ndarray  # uint8 [C, H, W]
    hidden: np.ndarray | None  # bool [H, W], True where it is to be filled; None = not known
    name: str  # for messages

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def mask(self) -> np.ndarray:
        """`hidden`, with nothing hidden if it is not known: bool [H, W]."""
        return np.zeros(self.size, dtype=bool) if self.hidden is None else self.hidden


class SourceImages(Protocol):
    """Images in an order."""

    classes: list[int] | None  # of each image; None = not known

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, index: int) -> SourceImage:
        """Return an image. Raises ConfigError if it cannot be read."""

    def digest(self, index: int) -> str:
        """Return a digest of the files that it is in, or of its pixels."""


class FileImages:
    """The images in a file, a folder (with subfolders) or a ZIP file, sorted by name, as `channels` (1 or 3).

    `masks`, in the same forms, are white where an image is to be filled: one for all, or one for each in the order of
    their names. Transparent pixels are to be filled, too. Opening reads no image. Raises ConfigError if there are no
    images, or masks do not match them. Classes are those of a dataset.json with class indices.
    """

    def __init__(
        self, path: str | os.PathLike[str], channels: int, *, masks: str | os.PathLike[str] | None = None
    ) -> None:
        self._channels = channels
        self._files = _FileList(Path(path), "--source")
        self._masks = None if masks is None else _FileList(Path(masks), "--masks")
        if self._masks is not None and len(self._masks) not in (1, len(self._files)):
            raise ConfigError(
                f"--masks={masks} has {len(self._masks)} images for the {len(self._files)} of --source={path}; give"
                " one for each, or one for all"
            )
        self.classes = self._files.classes()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> SourceImage:
        """See SourceImages."""
        name, data = self._files.describe(index), self._files.read(index)
        pixels, hidden = _decoded(data, name, self._channels)
        image = SourceImage(pixels=pixels, hidden=hidden, name=name)
        if self._masks is None:
            return image
        place = index % len(self._masks)
        mask_name = self._masks.describe(place)
        mask = _decoded(self._masks.read(place), mask_name, 1)[0][0] >= _THRESHOLD
        return masked(image, mask, mask_name)

    def digest(self, index: int) -> str:
        """See SourceImages."""
        digest = hashlib.sha256(self._files.read(index))
        if self._masks is not None:
            digest.update(self._masks.read(index % len(self._masks)))
        return digest.hexdigest()[:_DIGITS]


class DatasetImages:
    """Items of a data set of images, with what is `hidden` of each: bool [N, H, W], or None."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], *, hidden: np.ndarray | None) -> None:
        self._dataset = dataset
        self._indices = [int(index) for index in indices]
        self._hidden = hidden
        self.classes = None
        if dataset.has_labels:
            self.classes = [int(dataset.get_label(index).argmax()) for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> SourceImage:
        """See SourceImages."""
        images, _ = self._dataset.read_batch([self._indices[index]])
        hidden = None if self._hidden is None else self._hidden[index]
        return SourceImage(pixels=images[0], hidden=hidden, name=f"image {self._indices[index]} of the data set")

    def digest(self, index: int) -> str:
        """See SourceImages; here of the pixels."""
        image = self.read(index)
        hidden = b"" if image.hidden is None else image.hidden.tobytes()
        return hashlib.sha256(image.pixels.tobytes() + hidden).hexdigest()[:_DIGITS]


class RepeatedImages:
    """Each of `images`, `times` times in a row."""

    def __init__(self, images: SourceImages, times: int) -> None:
        self._images = images
        self._times = times
        self.classes = None if images.classes is None else [c for c in images.classes for _ in range(times)]

    def __len__(self) -> int:
        return len(self._images) * self._times

    def read(self, index: int) -> SourceImage:
        """See SourceImages."""
        return self._images.read(index // self._times)

    def digest(self, index: int) -> str:
        """See SourceImages."""
        return self._images.digest(index // self._times)


def masked(image: SourceImage, mask: np.ndarray, mask_name: str) -> SourceImage:
    """Return `image` with the pixels of `mask` (bool [H, W]) to be filled, too. Raises ConfigError for other sizes."""
    if mask.shape != image.size:
        raise ConfigError(
            f"{mask_name} is {size_text(mask.shape)} pixels and its image, {image.name}, {size_text(image.size)}; the"
            " sizes must be equal"
        )
    return SourceImage(pixels=image.pixels, hidden=mask | image.mask, name=image.name)


def transparent(image: PIL.Image.Image) -> np.ndarray | None:
    """Return the transparent pixels of an image, which are to be filled: bool [H, W]; None for opaque images."""
    alpha = alpha_channel(image)
    return None if alpha is None else np.asarray(alpha) < _THRESHOLD


def white(mask: PIL.Image.Image) -> np.ndarray:
    """Return the pixels that a mask says are to be filled: bool [H, W]."""
    return np.asarray(mask.convert("RGB").convert("L")) >= _THRESHOLD


def size_text(size: Sequence[int]) -> str:
    """Return (height, width) as 'WIDTHxHEIGHT'."""
    return f"{size[1]}x{size[0]}"


class _FileList:
    """The image files at a path; `option` is the option that named it."""

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        self._files: Files | None = None  # None: the path is the image
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            return
        if not path.exists():
            raise ConfigError(f"{option}={path} does not exist; give an image, or a folder or ZIP file of images")
        self._files = open_files(path)
        names = self._files.names
        self._rows = [row for row, name in enumerate(names) if is_item(name) and not is_latents(name)]
        if not self._rows:
            raise ConfigError(f"{option}={path} contains no images; it has {len(names)} other files")

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
        if labels is None or labels.named:  # names are numbered differently than in the network's data set
            return None
        array = labels_array(labels.values)
        return array.tolist() if array.dtype == np.int64 else None


def _decoded(data: bytes, name: str, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the pixels as uint8 [channels, H, W], grayscale or RGB, and which are transparent; see `transparent`."""
    assert channels in (1, 3)
    try:
        image = decode_image(data, DecodeOptions(background=KEEP_ALPHA)).image
    except Unreadable as error:
        raise ConfigError(f"{name} cannot be read as an image: {error}") from None
    rgb = image.convert("RGB")
    pixels = np.atleast_3d(np.asarray(rgb.convert("L") if channels == 1 else rgb))
    # A copy: Pillow's own memory is read-only.
    return np.array(pixels.transpose(2, 0, 1), order="C"), transparent(image)
