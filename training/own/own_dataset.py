"""A data set of the user's own: a subclass of `ImageDataset`, or any class with a length and items.

N items, C channels, H x W pixels, L labels. Item i is an array, or a pair (array, label): the array [C, H, W] is uint8
for images and float32 for raw latents; the label is a class index or a vector [L].
"""

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError
from dnnlib.own_part import OwnPart
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset

_CHECKED = 16  # items that are read before the training, spread evenly


def open_own_dataset(config: TrainingConfig) -> ImageDataset:
    """Import the class and open its data set. Raises ConfigError if it does not keep the contract."""
    assert config.dataset_class is not None
    part, given = OwnPart(option="dataset", name=config.dataset_class), config.dataset_args or {}
    cls = part.load()
    if isinstance(cls, type) and issubclass(cls, ImageDataset):
        dataset = part.make(config.data, use_labels=config.uses_labels, xflip=config.xflip, **given)
        assert isinstance(dataset, ImageDataset)
        return dataset
    with part.calls("the signature"):
        takes_path = "path" in inspect.signature(cls).parameters
    items = part.make(**({"path": config.data} if takes_path else {}), **given)
    return OwnItems(part, items, use_labels=config.uses_labels, xflip=config.xflip)


class OwnItems(ImageDataset):
    """The items of an object of the user's, with a length and items, as an ImageDataset.

    Labels are read from its attribute `labels`, of a value or a row for each item, or else from all its items once.
    """

    def __init__(self, part: OwnPart, items: Any, *, use_labels: bool, xflip: bool) -> None:
        self._part, self._items = part, items
        with part.calls("len(dataset)"):
            num = len(items)
        if num < 1:
            raise part.error("has no items")
        first, _ = self._item(0)
        if not (isinstance(first, np.ndarray) and first.ndim == 3 and first.dtype in (np.uint8, np.float32)):
            what = (
                f"{first.dtype} {list(first.shape)}" if isinstance(first, np.ndarray) else f"a {type(first).__name__}"
            )
            raise part.error(
                f"does not fit: its item 0 is {what}; needed is an array [channels, height, width], uint8 for images or"
                " float32 for raw latents, alone or in a pair with its label"
            )
        decoder: Any = _Arrays(first, part.name)
        super().__init__(
            name=part.name,
            decoder=decoder,
            raw_labels=self._read_labels(num) if use_labels else None,
            num_images=num,
            xflip=xflip,
        )

    def check_headers(self, max_items: int = _CHECKED) -> None:
        """See ImageDataset. Reads the items themselves."""
        for raw_idx in self._sample(max_items):
            self._load(raw_idx)

    def fingerprint(self) -> int:
        """Return a number that almost certainly differs for other items: of a few of them, spread evenly."""
        crc = zlib.crc32(f"{self._num_images} {self.image_shape} {self.image_dtype}".encode())
        for raw_idx in self._sample(_CHECKED):
            crc = zlib.crc32(np.ascontiguousarray(self._load(raw_idx)).tobytes(), crc)
        return crc

    def keep_items(self) -> None:
        """Keep nothing: what the user's items are made of may be in memory already."""

    def close(self) -> None:
        """Release nothing: the items are the user's."""

    @property
    def encoder_entry(self) -> dict[str, Any] | None:
        """Description of the encoder that made the latents: an attribute of the user's object, if it has one."""
        return getattr(self._items, "encoder_entry", None)

    def _sample(self, num: int) -> list[int]:
        return [int(i) for i in np.linspace(0, self._num_images - 1, min(self._num_images, num, _CHECKED))]

    def _item(self, index: int) -> tuple[Any, Any]:
        """Return the array and the label of an item, None without one."""
        with self._part.calls(f"dataset[{index}]"):
            item = self._items[index]
            image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
            return (np.asarray(image) if hasattr(image, "__array__") else image), label

    def _read_labels(self, num: int) -> np.ndarray | None:
        labels = getattr(self._items, "labels", None)
        if labels is None:
            labels = [self._item(index)[1] for index in range(num)]
            if any(label is None for label in labels):
                return None
        with self._part.calls("the conversion of its labels to an array"):
            found = np.asarray(labels)
        if len(found) == num and found.ndim == 1 and np.issubdtype(found.dtype, np.integer) and found.min() >= 0:
            return found.astype(np.int64)
        if len(found) == num and found.ndim == 2 and np.issubdtype(found.dtype, np.number):
            return found.astype(np.float32)
        raise self._part.error(
            f"does not fit: its labels are {found.dtype} {list(found.shape)}; needed is a class index from 0 on, or a"
            f" vector, for each of {num} items"
        )

    def _read(self, raw_idx: int) -> Any:
        return self._item(raw_idx)[0]

    def _describe(self, raw_idx: int) -> str:
        return f"item {raw_idx} of --dataset={self._part.name}"


class _Arrays:
    """In place of an ItemDecoder: items are arrays already, and all must be like the first."""

    def __init__(self, first: np.ndarray, name: str) -> None:
        self.shape = first.shape
        self.dtype = first.dtype
        self.latents = first.dtype == np.float32
        self.first = f"item 0 of --dataset={name}"

    def decode(self, data: Any, where: Callable[[], str]) -> np.ndarray:
        """Return the array. Raises ConfigError if it is unlike the first."""
        if not isinstance(data, np.ndarray) or data.shape != self.shape or data.dtype != self.dtype:
            found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
            raise ConfigError(f"{where()} is {found}, but item 0 is {self.dtype} {list(self.shape)}; all must be alike")
        return data
