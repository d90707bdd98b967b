"""The contract of an image source, whatever its kind, and the choice among its images."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean
from training.dataset.label_file import Label, Labels

SPLIT_OF = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing"),
    }.items()
    for word in words
}
"""The usual names of the parts of a data set."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""The usual names of the column of labels in tables; the first that exists counts."""


class ImageReader(Protocol):
    """Reads the image of a key; pickled once for each worker. Raises ConfigError or Unreadable."""

    def read(self, key: Any, /) -> bytes | memoryview | np.ndarray:
        """Return an encoded image, or its pixels: uint8 [H, W, C] or [H, W]."""
        ...


class ArrayReader:
    """Reader of sources whose keys are the pixels themselves, which travel to the workers with their task."""

    def read(self, key: np.ndarray) -> np.ndarray:
        """Return `key`."""
        return key


@dataclass(frozen=True, kw_only=True)
class Source:
    """N images in their order."""

    path: Path
    names: Sequence[str]  # [N], for messages
    keys: Sequence[Any]  # [N], arguments of the reader; they travel to the workers one by one
    reader: ImageReader
    labels: Sequence[Label] | None  # [N], all of one kind
    classes: Sequence[str] | None = None  # names of the class indices
    notes: Sequence[str] = ()  # on the labels, for the user

    @classmethod
    def of(cls, *, labels: Labels | None, **others: Any) -> "Source":
        """Return a source with checked labels."""
        if labels is None:
            return cls(labels=None, **others)
        return cls(labels=labels.values, classes=labels.classes, **others)

    @property
    def checked_labels(self) -> Labels | None:
        """The labels with the names of their classes."""
        classes = None if self.classes is None else list(self.classes)
        return None if self.labels is None else Labels(values=list(self.labels), classes=classes)


def import_optional(module: str, what: str) -> Any:
    """Import a module of the extra `formats`, which reading `what` needs. Raises ConfigError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(
            f"reading {what} needs the package {package}; install it by pip install -e '.[formats]'"
        ) from None


def choose_split(path: Path, splits: Sequence[str], split: str | None) -> str:
    """Return `split`, by default the only one of `splits`, else 'train'. Raises ConfigError if it does not exist."""
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        meant = did_you_mean(split, splits)
        raise ConfigError(f"{path} has no split '{split}'; choose one by --split={'|'.join(splits)}{meant}")
    return split


def choose_images(source: Source, max_images: int | None, *, balanced: bool = False) -> Source:
    """Take the first max_images images of `source`; with `balanced`, the first of every class, in source order.

    A class with fewer images than its share gives all of them, and the others give more. A remainder goes to the
    classes of the smallest index.
    """
    count = len(source.names)
    if balanced:
        if source.labels is None or isinstance(source.labels[0], list):
            kind = "no labels" if source.labels is None else "labels that are vectors"
            raise ConfigError(
                f"--balanced takes images evenly over classes, but {source.path} has {kind}; leave it out"
            )
        classes = np.asarray(source.labels)
        by_class = np.argsort(classes, kind="stable")
        starts = np.searchsorted(classes[by_class], classes[by_class])
        rank = np.empty(count, dtype=np.int64)  # position of each image within its class
        rank[by_class] = np.arange(count) - starts
        rows: Sequence[int] = np.sort(np.lexsort((classes, rank))[:max_images]).tolist()
    elif max_images is None or max_images >= count:
        return source
    else:
        rows = range(max_images)
    return replace(
        source,
        names=[source.names[row] for row in rows],
        keys=[source.keys[row] for row in rows],
        labels=None if source.labels is None else [source.labels[row] for row in rows],
    )
