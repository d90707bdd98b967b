"""The contract of a data set: what a run, its conditions and its metrics may ask of one.

N items, C channels, H x W pixels. Two classes keep the contract: `ImageFolderDataset` (files on the disk) and
`StreamedDataset` (shards behind URLs). Both number their stored images; this index is called `raw_idx`.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.utils.data

from dnnlib.errors import ConfigError
from training.dataset.items import CONVERT_HINT, ItemDecoder
from training.dataset.order import BalancedOrder, DataOrder, Order


@dataclass(frozen=True, kw_only=True)
class ItemDetails:
    """The origin of an item of a data set."""

    raw_idx: int  # index among all stored images, before max_size and xflip
    xflip: bool  # whether the item is the mirrored copy
    raw_label: np.ndarray  # as stored: a class index (int64, no axes) or a vector (float32)


class ImageDataset(torch.utils.data.Dataset[tuple[np.ndarray, np.ndarray]], ABC):
    """Square images or raw latents with labels; item i is (array [C, H, W], label [label_dim]).

    Arrays are uint8 for images (gray ones have one channel) and float32 for latents, contiguous and the caller's own.
    Labels are float32: class indices come one-hot, as wide as the largest index + 1. Without labels, label_dim is 0.
    A data set may be shared with threads and with DataLoader workers, forked or spawned.

    name:        a short name, for messages.
    decoder:     decodes the stored images; made from the first one.
    raw_labels:  labels of all stored images: class indices int64 [N] or vectors float32 [N, label_dim]; None without.
    class_names: names of the classes, in the order of their indices; None if unknown.
    num_images:  number of images in the data set, without mirrored copies.
    raw_idx:     the stored images in the data set, int64 [num_images]; None for the first `num_images`.
    xflip:       append a mirrored copy of every image after all of them.
    """

    def __init__(
        self,
        *,
        name: str,
        decoder: ItemDecoder,
        raw_labels: np.ndarray | None,
        class_names: Sequence[str] | None = None,
        num_images: int,
        raw_idx: np.ndarray | None = None,
        xflip: bool,
    ) -> None:
        _, height, width = decoder.shape
        if height != width:
            raise ConfigError(f"{decoder.first} is {width}x{height}; images must be square: {CONVERT_HINT}")
        self.name = name
        self.image_shape = decoder.shape
        self._decoder = decoder
        self._raw_labels = raw_labels
        self._label_dim = label_width(raw_labels)
        self.class_names = None if class_names is None else list(class_names)
        self._num_images = num_images
        self._raw_idx = raw_idx
        self._copies = 2 if xflip else 1
        self._cache: dict[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    def __len__(self) -> int:
        return self._copies * self._num_images

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        raw_idx, mirrored = self._source(idx)
        image = self._load(raw_idx)
        return (image[:, :, ::-1] if mirrored else image).copy(order="C"), self._label(raw_idx)

    def read_batch(self, indices: Sequence[int], out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return items `indices` as one array [N, C, H, W], each copied once, and their labels [N, label_dim].

        `out` is such an array to use, of `image_dtype`.
        """
        if out is None:
            out = np.empty((len(indices), *self.image_shape), dtype=self.image_dtype)
        sources = [self._source(idx) for idx in indices]
        for target, (raw_idx, mirrored) in zip(out, sources, strict=True):
            image = self._load(raw_idx)
            np.copyto(target, image[:, :, ::-1] if mirrored else image)
        if self._raw_labels is None:
            return out, np.zeros((len(sources), 0), dtype=np.float32)
        raw_labels: np.ndarray = self._raw_labels[[raw_idx for raw_idx, _ in sources]]
        return out, onehot(raw_labels, self._label_dim) if self.has_onehot_labels else raw_labels

    def get_label(self, idx: int) -> np.ndarray:
        """Return the label of item `idx` as the network takes it: float32 [label_dim], one-hot for class indices."""
        return self._label(self._source(idx)[0])

    def item_labels(self) -> np.ndarray:
        """Return the label of every item, as stored: class indices int64 [N], or vectors float32 [N, label_dim]."""
        assert self._raw_labels is not None
        labels = self._raw_labels if self._raw_idx is None else self._raw_labels[self._raw_idx]
        return np.concatenate([labels] * self._copies)

    def get_details(self, idx: int) -> ItemDetails:
        """Return which stored image item `idx` is, whether it is mirrored, and its label as stored."""
        raw_idx, mirrored = self._source(idx)
        raw_label = np.zeros(0, dtype=np.float32) if self._raw_labels is None else self._raw_labels[raw_idx]
        return ItemDetails(raw_idx=int(raw_idx), xflip=bool(mirrored), raw_label=np.array(raw_label))

    @contextmanager
    def order(self, seed: int, *, balance: bool = False) -> Iterator[Order]:
        """Yield the order in which a run reads the items; with `balance`, every class comes equally often."""
        yield BalancedOrder(self.item_labels(), seed) if balance else DataOrder(len(self), seed)

    @abstractmethod
    def check_headers(self, max_items: int = 10_000) -> None:
        """Check the headers of `max_items` items, spread evenly. Raises ConfigError for the first that does not fit."""

    @abstractmethod
    def fingerprint(self) -> int:
        """Return a number that almost certainly differs for other files."""

    def items_fingerprint(self) -> int:
        """Return a number that almost certainly differs for other items, whatever else is in their files."""
        return self.fingerprint()

    def labels_fingerprint(self) -> int:
        """Return a number that almost certainly differs for other labels."""
        return 0 if self._raw_labels is None else zlib.crc32(self._raw_labels.tobytes())

    def keep_items(self) -> None:
        """Keep decoded images in memory from now on."""
        if self._cache is None:
            self._cache = {}

    def drop_labels(self) -> None:
        """Leave the labels out from now on, as if the data set had none."""
        self._raw_labels, self._label_dim, self.class_names = None, 0, None

    def append_mirrored(self) -> None:
        """Append a mirrored copy of every image, unless `xflip` has done so."""
        self._copies = 2

    @abstractmethod
    def close(self) -> None:
        """Release the open files; the next read opens them again."""

    @property
    @abstractmethod
    def encoder_entry(self) -> dict[str, Any] | None:
        """Description in dataset.json of the encoder that made the latents; None if missing."""

    @property
    def holds_latents(self) -> bool:
        """True for raw latents (.npy files), False for images."""
        return self._decoder.latents

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """float32 for raw latents, uint8 for images."""
        return np.dtype(np.float32 if self.holds_latents else np.uint8)

    @property
    def num_channels(self) -> int:
        """Channels of the stored arrays: 1 for gray images, 3 for color, 8 for the usual raw latents."""
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        """Height and width of the stored arrays."""
        return self.image_shape[1]

    @property
    def decoded_bytes(self) -> int:
        """Memory for all items, decoded."""
        return len(self) * int(np.prod(self.image_shape)) * self.image_dtype.itemsize

    @property
    def label_dim(self) -> int:
        """Length of one label, taken over all stored images; 0 without labels."""
        return self._label_dim

    @property
    def label_shape(self) -> list[int]:
        """Shape of one label, `[label_dim]`."""
        return [self.label_dim]

    @property
    def has_labels(self) -> bool:
        """True if the items have labels."""
        return self.label_dim != 0

    @property
    def has_onehot_labels(self) -> bool:
        """True if the stored labels are class indices."""
        return self._raw_labels is not None and self._raw_labels.dtype == np.int64

    @abstractmethod
    def _read(self, raw_idx: int) -> Any:
        """Return the encoded bytes of a stored image, possibly a view of its file."""

    @abstractmethod
    def _describe(self, raw_idx: int) -> str:
        """Return the file of a stored image, for messages."""

    def _source(self, idx: int) -> tuple[int, bool]:
        """Return the `raw_idx` of item `idx`, and whether it is mirrored. Indices below 0 count from the end."""
        num_items = self._copies * self._num_images
        if not -num_items <= idx < num_items:
            raise IndexError(f"item {idx} of {num_items}")
        item = idx + num_items if idx < 0 else idx
        mirrored = item >= self._num_images
        image = item - self._num_images if mirrored else item
        return image if self._raw_idx is None else int(self._raw_idx[image]), mirrored

    def _label(self, raw_idx: int) -> np.ndarray:
        label = np.zeros(self._label_dim, dtype=np.float32)
        if self._raw_labels is not None:
            raw_label = self._raw_labels[raw_idx]
            if raw_label.ndim:
                label[:] = raw_label
            else:
                label[raw_label] = 1
        return label

    def _load(self, raw_idx: int) -> np.ndarray:
        """Return a stored array [C, H, W], which the caller must not change; it may be a view of the file."""
        if self._cache is not None and raw_idx in self._cache:
            return self._cache[raw_idx]
        image = self._decoder.decode(self._read(raw_idx), lambda: self._describe(raw_idx))
        if self._cache is not None:
            image = self._cache[raw_idx] = np.ascontiguousarray(image)
        return image


class BatchReader(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set of batches, for a DataLoader with `batch_size=None` and a sampler of index lists.

    A batch is assembled where it is read: in a worker it lies in shared memory, and is not copied again.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images [N, C, H, W] and labels [N, label_dim] of the items `indices`."""
        dtype = torch.float32 if self.dataset.holds_latents else torch.uint8
        images = torch.empty((len(indices), *self.dataset.image_shape), dtype=dtype)
        if torch.utils.data.get_worker_info() is not None:
            images.share_memory_()
        _, labels = self.dataset.read_batch(indices, out=images.numpy())
        return images, torch.from_numpy(labels)


def label_width(raw_labels: np.ndarray | None) -> int:
    """Length of a label as the network takes it: classes of indices int64 [N], or L of vectors float32 [N, L]."""
    if raw_labels is None:
        return 0
    return int(raw_labels.max()) + 1 if raw_labels.dtype == np.int64 else raw_labels.shape[1]


def onehot(classes: np.ndarray, label_dim: int) -> np.ndarray:
    """Return class indices int64 [N] as float32 [N, label_dim]."""
    labels = np.zeros((len(classes), label_dim), dtype=np.float32)
    labels[np.arange(len(classes)), classes] = 1
    return labels
