"""What a source of pictures is, whatever its kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnnlib.errors import ConfigError
from training.dataset.label_file import Label


class Reader(Protocol):
    """Gives the picture for a key; pickled once for each worker. Raises ConfigError or pictures.Unreadable."""

    def read(self, key: Any, /) -> bytes | memoryview | np.ndarray:
        """An encoded picture, or its pixels: uint8 [H, W, C] or [H, W]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """N pictures in their order."""

    path: Path
    names: Sequence[str]  # [N], for people
    keys: Sequence[Any]  # [N], what the reader takes; they travel to the workers one by one
    reader: Reader
    labels: Sequence[Label] | None  # [N], all of one kind
    classes: Sequence[str] | None = None  # what the class indices stand for


def choose_split(path: Path, splits: Sequence[str], wanted: str | None) -> str:
    """The name of the split to take: the wanted one, else the only one, else 'train'; ConfigError if it is missing."""
    if wanted is None:
        wanted = splits[0] if len(splits) == 1 else "train"
    if wanted not in splits:
        raise ConfigError(f"{path} has no split '{wanted}'; choose one by --split={'|'.join(splits)}")
    return wanted
