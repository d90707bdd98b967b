"""What a request is conditioned on: pictures in an order, wherever they come from.

Shape legend: C channels, H x W pixels.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class SourcePicture:
    """One picture."""

    pixels: np.ndarray  # uint8 [C, H, W]
    hidden: np.ndarray | None  # bool [H, W], True where it is to be filled; None where nothing says
    name: str  # for messages


class Pictures(Protocol):
    """Some pictures in an order."""

    classes: list[int] | None  # the class of each, where it is known

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int) -> SourcePicture:
        """The picture. Raises ConfigError where it cannot be read."""

    def digest(self, index: int) -> str:
        """A digest of the files that it is in."""


class RepeatedPictures:
    """Each of some pictures so many times in a row."""

    def __init__(self, pictures: Pictures, times: int) -> None:
        self._pictures = pictures
        self._times = times
        classes = pictures.classes
        self.classes = None if classes is None else [chosen for chosen in classes for _ in range(times)]

    def __len__(self) -> int:
        return len(self._pictures) * self._times

    def read(self, index: int) -> SourcePicture:
        """See Pictures."""
        return self._pictures.read(index // self._times)

    def digest(self, index: int) -> str:
        """See Pictures."""
        return self._pictures.digest(index // self._times)
