"""Random numbers of a batch of images from one generator for each, one for all, or PyTorch's own.

Shape legend: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Randomness:
    """What is drawn for N images. With a generator for each, image i depends on generator i alone.

    Numbers are drawn where the generator lives and copied to `device`: generators of the CPU and of GPUs give different
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
        """Standard normal numbers [N, *shape], float32."""
        return self._draw(torch.randn, (), shape, dtype=torch.float32)

    def integers(self, high: int) -> torch.Tensor:
        """Integers [N] from 0 to below `high`."""
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
