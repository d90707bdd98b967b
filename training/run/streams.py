"""The noise of a training run as a function of the position in it.

Position p is the p-th image that the run trains on, counted over all processes. Which noise it gets (and which item
of the data set it is, see training/dataset/order.py) depends on p and the run's seed alone: not on the number of
processes, not on how a batch is split into rounds of accumulation, and not on whether the run was interrupted. There
is no random state to save.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch

# Noise is drawn for this many positions by one seeded generator: enough to make the seeding cheap on a GPU, few enough
# that a process throws little away at the ends of its share.
_CHUNK = 16


class Purpose(IntEnum):
    """Numbers of all random streams of a run. A number is part of every result: none may change or be used twice.

    The order of the data is drawn by NumPy, apart from these: see training/dataset/order.py.
    """

    SIGMA = 0  # noise levels
    NOISE = 1
    ENCODER = 2  # samples from the distributions that a VAE encodes to
    DROPOUT = 3  # inside the network; by batch and process, not by position
    MASKS = 8  # of inpainting
    LABELS = 16  # which ones are left out


def derive_seed(*numbers: int) -> int:
    """Return a seed for torch's generators, in [0, 2^63): a well-mixed function of all `numbers` (each >= 0)."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class NoiseStream:
    """Random draws on `device` for every position of a run.

    Draws for different purposes are independent of each other.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._generator = torch.Generator(device)

    def normal(self, start: int, num: int, shape: tuple[int, ...], purpose: Purpose) -> torch.Tensor:
        """Return standard normal draws for positions start .. start+num-1: float32 [num, *shape]."""
        return self._draw(torch.randn, start, num, shape, purpose)

    def uniform(self, start: int, num: int, shape: tuple[int, ...], purpose: Purpose) -> torch.Tensor:
        """Return the same, uniformly distributed in [0, 1)."""
        return self._draw(torch.rand, start, num, shape, purpose)

    def _draw(
        self, draw: Callable[..., torch.Tensor], start: int, num: int, shape: tuple[int, ...], purpose: Purpose
    ) -> torch.Tensor:
        first_chunk, last_chunk = start // _CHUNK, (start + num - 1) // _CHUNK
        chunks = []
        for chunk in range(first_chunk, last_chunk + 1):
            self._generator.manual_seed(derive_seed(self._seed, purpose, chunk))
            chunks.append(draw([_CHUNK, *shape], generator=self._generator, device=self._device))
        offset = start - first_chunk * _CHUNK
        return torch.cat(chunks)[offset : offset + num]
