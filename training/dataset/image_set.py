"""Images to be measured, from a folder or a ZIP file: a random choice of them, in batches over all processes.

N images, C channels, H x W pixels.
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
from torch_utils.processes.failures import worker_errors
from training.dataset.item_files import open_files
from training.dataset.items import ItemDecoder, is_item, is_latents, read_shape


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSetBatch:
    """Some of the chosen images."""

    images: torch.Tensor  # uint8 [N, C, H, W], C = 1 or 3
    indices: np.ndarray  # int64 [N], positions in the choice


class ImageSet(torch.utils.data.Dataset[torch.Tensor]):
    """All images below a folder or in a ZIP file, sorted by name; item i is uint8 [C, H, W].

    They may have any size and shape, gray or color, but all the same. Opening decodes no pixels. Raises ConfigError if
    there are no images, or if the first has other channels than 1 or 3; reading does for damaged or differing ones.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = open_files(self.path)
        names = self._files.names
        self._rows = [row for row, name in enumerate(names) if is_item(name)]
        if not self._rows:
            raise ConfigError(f"{self.path} holds no images; it has {len(names)} other files")
        for row in self._rows:
            if is_latents(names[row]):
                where = self._files.describe(row)
                raise ConfigError(f"{where} holds latents, and metrics compare images; give the images themselves")
        where = self._files.describe(self._rows[0])
        shape = read_shape(self._files.read(self._rows[0]), where)
        if shape[0] not in (1, 3):
            raise ConfigError(f"{where} has {shape[0]} channels; metrics take gray (1) or color (3)")
        self._decoder = ItemDecoder(shape, where)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        row = self._rows[index]
        decoded = self._decoder.decode(self._files.read(row), lambda: self._files.describe(row))
        return torch.from_numpy(decoded.copy(order="C"))

    @property
    def names(self) -> list[str]:
        """Names of the items, in their order, below the folder or in the ZIP file."""
        return [self._files.names[row] for row in self._rows]


def choose_images(
    images: ImageSet, num: int, *, seed: int, repeat: int = 1, allow_fewer: bool = False
) -> list[np.ndarray]:
    """Return `repeat` disjoint random choices of `num` images each, as indices; the seed determines them.

    Raises ConfigError if there are too few; `allow_fewer` shares out the existing ones instead, at least two each.
    """
    have, share = len(images), min(num, len(images) // repeat)
    if share < num and not allow_fewer:
        times = f" {repeat} times" if repeat > 1 else ""
        raise ConfigError(
            f"{images.path} holds {have} images and{times} {num} are asked for; generate more, or use"
            f" --allow-fewer for a quick look that is not comparable to other results"
        )
    if share < 2:
        raise ConfigError(f"{repeat} x {share} images of {images.path} cannot be measured; two each are the least")
    order = np.random.default_rng(seed).permutation(have)
    return [order[i * share : (i + 1) * share] for i in range(repeat)]


class ImageSetBatches:
    """This process's batches of a choice of images, decoded by `workers` processes (0: by this one); repeatable."""

    def __init__(self, images: ImageSet, choice: np.ndarray, *, batch: int, workers: int, world: World) -> None:
        self._images = images
        self._choice = choice
        self._batches = [part for part in split_batches(len(choice), batch, world) if len(part)]
        self._workers = workers
        self._pin = world.device.type == "cuda"

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ImageSetBatch]:
        loader = torch.utils.data.DataLoader(
            self._images,
            batch_sampler=[self._choice[part].tolist() for part in self._batches],
            num_workers=self._workers,
            pin_memory=self._pin,
            multiprocessing_context="spawn" if self._workers else None,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )
        with worker_errors():
            for part, images in zip(self._batches, loader, strict=True):
                yield ImageSetBatch(images=images, indices=part)
