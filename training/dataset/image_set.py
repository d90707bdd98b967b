"""Pictures to be measured, out of a folder or a ZIP file: which of them, and in batches over all processes.

Shape legend: N images, C channels, H x W pixels.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.utils.data

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.processes.dealing import split_batches
from training.dataset.item_files import open_files
from training.dataset.items import ItemDecoder, is_item, is_latents


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureBatch:
    """Some of the chosen pictures."""

    images: torch.Tensor  # uint8 [N, C, H, W], C = 1 or 3
    indices: np.ndarray  # int64 [N], positions in the choice


class PictureSet(torch.utils.data.Dataset[torch.Tensor]):
    """All pictures below a folder, subfolders included, or in a ZIP file, sorted by name; item i is uint8 [C, H, W].

    They may have any size and shape, grey or colour, all the same. Opening decodes no pixels. Raises ConfigError where
    there are none, or where the first has other channels than 1 or 3; reading does for damaged or differing ones.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = open_files(self.path)
        names = self._files.names
        self._rows = [row for row, name in enumerate(names) if is_item(name)]
        if not self._rows:
            raise ConfigError(f"{self.path} holds no pictures; it has {len(names)} other files")
        for row in self._rows:
            if is_latents(names[row]):
                where = self._files.describe(row)
                raise ConfigError(f"{where} holds latents, and metrics compare pictures; give the pictures themselves")
        where = self._files.describe(self._rows[0])
        self._decoder = ItemDecoder(self._files.read(self._rows[0]), where)
        if self._decoder.shape[0] not in (1, 3):
            raise ConfigError(f"{where} has {self._decoder.shape[0]} channels; metrics take grey (1) or colour (3)")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        row = self._rows[index]
        decoded = self._decoder.decode(self._files.read(row), lambda: self._files.describe(row))
        return torch.from_numpy(decoded.copy(order="C"))

    @property
    def names(self) -> list[str]:
        """The pictures' names, below the folder or in the ZIP file, in the order of the items."""
        return [self._files.names[row] for row in self._rows]


def choose_pictures(
    pictures: PictureSet, num: int, *, seed: int, repeat: int = 1, allow_fewer: bool = False
) -> list[np.ndarray]:
    """`repeat` disjoint random choices of `num` pictures each, as indices; the seed determines them.

    Raises ConfigError where there are too few; with `allow_fewer`, shares out those that there are, at least two each.
    """
    have, share = len(pictures), min(num, len(pictures) // repeat)
    if share < num and not allow_fewer:
        times = f" {repeat} times" if repeat > 1 else ""
        raise ConfigError(
            f"{pictures.path} holds {have} pictures and{times} {num} are asked for; generate more, or use"
            f" --allow-fewer for a quick look that is not comparable to other results"
        )
    if share < 2:
        raise ConfigError(f"{repeat} x {share} pictures of {pictures.path} cannot be measured; two each are the least")
    order = np.random.default_rng(seed).permutation(have)
    return [order[i * share : (i + 1) * share] for i in range(repeat)]


class PictureBatches:
    """The batches of this process of a choice of pictures; iterate as often as you like.

    `workers`: processes that decode; 0 decodes in this one.
    """

    def __init__(self, pictures: PictureSet, choice: np.ndarray, *, batch: int, workers: int, world: World) -> None:
        self._pictures = pictures
        self._choice = choice
        self._batches = [part for part in split_batches(len(choice), batch, world) if len(part)]
        self._workers = workers
        self._pin = world.device.type == "cuda"

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PictureBatch]:
        loader = torch.utils.data.DataLoader(
            self._pictures,
            batch_sampler=[self._choice[part].tolist() for part in self._batches],
            num_workers=self._workers,
            pin_memory=self._pin,
            multiprocessing_context="spawn" if self._workers else None,
            generator=torch.Generator(),  # the loader draws a seed for its workers, and not from the global generator
        )
        try:
            for part, images in zip(self._batches, loader, strict=True):
                yield PictureBatch(images=images, indices=part)
        except ConfigError as error:
            # A worker's exception arrives with the worker's traceback as its message, ending in the original.
            raise ConfigError(str(error).rpartition(f"{ConfigError.__name__}: ")[2].strip()) from None
