"""Images to be measured, from files or an array: a random choice of them, in batches over all processes.

N images, C channels, H x W pixels.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.utils.data

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.processes.data_workers import prepare_worker, worker_batches
from torch_utils.processes.dealing import split_batches
from training.dataset.item_files import open_files
from training.dataset.items import is_item, is_latents
from training.dataset.sample_array import SampleArray, holds_array
from training.images.decode import KEEP_ALPHA, MAX_PIXELS, DecodeOptions, Unreadable, decode_image, open_image
from training.images.png import decode_plain_png, png_shape


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSetBatch:
    """Some of the chosen images."""

    images: torch.Tensor | list[torch.Tensor]  # uint8 [N, C, H, W]; a list of [C, H, W] if they differ in shape
    indices: np.ndarray  # int64 [N], positions in the choice


class ImageSet(torch.utils.data.Dataset[torch.Tensor]):
    """All images below a folder, in a ZIP file or in an array of samples, by name; item i is uint8 [C, H, W].

    They may have any size and shape, also different ones; C is 1 (gray) or 3 (RGB), and one more with alpha. Opening
    decodes no pixels. Raises ConfigError if there are no images; reading does for damaged ones.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._array = SampleArray(self.path) if holds_array(self.path) else None
        if self._array is not None:
            self.names: Sequence[str] = self._array.names
            return
        self._files = open_files(self.path)
        found = self._files.names
        self._rows = [row for row, name in enumerate(found) if is_item(name)]
        self.names = [found[row] for row in self._rows]
        if not self._rows:
            raise ConfigError(f"{self.path} holds no images; it has {len(found)} other files")
        latents = next((row for row in self._rows if is_latents(found[row])), None)
        if latents is not None:
            where = self._files.describe(latents)
            raise ConfigError(
                f"{where} holds latents, and metrics compare images; give the images themselves, as files or as uint8"
                " [N, H, W, 3] in one .npz or .npy file"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._array is not None:
            pixels = self._array.pixels[index].transpose(2, 0, 1)
        else:
            pixels = self._read(self._rows[index])
        return torch.from_numpy(pixels.copy(order="C"))

    def _read(self, row: int) -> np.ndarray:
        data = self._files.read(row)
        shape = png_shape(data)
        plain = decode_plain_png(data, shape) if shape and shape[1] * shape[2] <= MAX_PIXELS else None
        if plain is not None:
            return plain
        try:
            with open_image(data) as opened:
                if opened.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in opened.info:
                    return np.atleast_3d(np.asarray(opened)).transpose(2, 0, 1)
            image, is_transparent, _ = decode_image(data, DecodeOptions(background=KEEP_ALPHA))
        except Unreadable as error:
            raise ConfigError(f"{self._files.describe(row)} cannot be read: {error}") from None
        return np.asarray(image if is_transparent else image.convert("RGB")).transpose(2, 0, 1)


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
            worker_init_fn=prepare_worker,
            collate_fn=_stacked,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )
        with worker_batches(loader) as items:
            for part, images in zip(self._batches, items, strict=True):
                yield ImageSetBatch(images=images, indices=part)


def _stacked(images: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images
