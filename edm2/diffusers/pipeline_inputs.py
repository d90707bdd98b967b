"""Arguments of a pipeline: how many images, from which random numbers, from which source images.

Shape legend: N images, C channels, H x W pixels.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import ConfigError
from training.condition.source_images import FileImages, SourceImage, SourceImages, masked, transparent, white


class MemoryImages:
    """Images of PIL as `channels` (1 or 3) with their masks, one for all or one for each; see SourceImages."""

    def __init__(self, images: Sequence[PIL.Image.Image], masks: Sequence[PIL.Image.Image], channels: int) -> None:
        if not images:
            raise ConfigError("image is an empty list; give at least one image")
        if len(masks) not in (0, 1, len(images)):
            raise ConfigError(f"{len(masks)} masks do not match {len(images)} images; give one for each, or for all")
        self.classes: list[int] | None = None
        self._images, self._masks, self._mode = images, masks, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> SourceImage:
        """See SourceImages."""
        source = self._images[index]
        pixels = np.atleast_3d(np.array(source.convert("RGB").convert(self._mode))).transpose(2, 0, 1)
        image = SourceImage(pixels=np.ascontiguousarray(pixels), hidden=transparent(source), name=f"image {index}")
        if not self._masks:
            return image
        return masked(image, white(self._masks[index % len(self._masks)]), f"mask {index}")

    def digest(self, index: int) -> str:
        """See SourceImages."""
        return hashlib.sha256(self.read(index).pixels.tobytes()).hexdigest()


def source_images(image: Any, mask_image: Any, channels: int) -> SourceImages | None:
    """Return the images in the arguments of a pipeline; None without `image`.

    Raises ConfigError for anything but an image, a list of images, or a path.
    """
    if image is None:
        if mask_image is not None:
            raise ConfigError("mask_image says what to fill of images; give image, too")
        return None
    if isinstance(image, str | os.PathLike):
        if not isinstance(mask_image, str | os.PathLike | None):
            raise ConfigError("image is a path, so mask_image must be one, too")
        return FileImages(image, channels, masks=mask_image)
    lists: list[list[PIL.Image.Image]] = []
    for name, value in (("image", image), ("mask_image", [] if mask_image is None else mask_image)):
        images = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, PIL.Image.Image) for item in images):
            raise ConfigError(f"{name} must be a PIL image, a list of them, or a path")
        lists.append(images)
    return MemoryImages(lists[0], lists[1], channels)


def count_images(
    class_labels: Any, generator: Any, latents: torch.Tensor | None, batch_size: int | None, default: int
) -> int:
    """Return the number of images that the arguments agree on. Raises ConfigError if they do not."""
    counts = {"batch_size": batch_size}
    if isinstance(class_labels, list | tuple | np.ndarray | torch.Tensor) and np.ndim(class_labels) > 0:
        counts["class_labels"] = len(class_labels)
    if isinstance(generator, list | tuple):
        counts["generator"] = len(generator)
    if latents is not None:
        counts["latents"] = len(latents)
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        each = ", ".join(f"{count} from {name}" for name, count in given.items())
        raise ConfigError(f"the number of images is not clear: {each}; give one of each for every image")
    num_images = next(iter(given.values()), default)
    if num_images < 1:
        raise ConfigError(f"{num_images} images are impossible; ask for 1 or more")
    return num_images


class Randomness:
    """Random numbers for N images. With a generator for each, image i depends on generator i alone.

    Numbers are drawn on the generator's device and copied to `device`: generators of the CPU and of GPUs give different
    ones for the same seed.
    """

    def __init__(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int, device: torch.device
    ) -> None:
        each = list(generator) if isinstance(generator, list | tuple) else [generator] * (num_images == 1)
        assert len(each) in (0, num_images)
        self._each = each
        self._shared = generator if not each else None
        self._num_images = num_images
        self._device = device

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return standard normal numbers [N, *shape], float32."""
        return self._draw(torch.randn, (), shape, dtype=torch.float32)

    def integers(self, high: int) -> torch.Tensor:
        """Return integers [N] from 0 to below `high`."""
        return self._draw(torch.randint, (high,), ())

    def _draw(
        self, draw: Callable[..., torch.Tensor], args: tuple[int, ...], shape: tuple[int, ...], **kwargs: Any
    ) -> torch.Tensor:
        def one(generator: Any, size: tuple[int, ...]) -> torch.Tensor:
            device = self._device if generator is None else generator.device
            return draw(*args, size=size, generator=generator, device=device, **kwargs)

        if self._each:
            return torch.stack([one(generator, shape) for generator in self._each]).to(self._device)
        return one(self._shared, (self._num_images, *shape)).to(self._device)
