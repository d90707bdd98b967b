"""The data order and the noise of a training run as functions of the position in it.

Position p is the p-th image that the run trains on, counted over all processes. Which data set item it is and which
noise it gets depend on p and the run's seed alone: not on the number of processes, not on how a batch is split into
rounds of accumulation, and not on whether the run was interrupted. There is no random state to save.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

# Noise is drawn for this many positions by one seeded generator: enough to make the seeding cheap on a GPU, few enough
# that a process throws little away at the ends of its share.
_CHUNK = 16


def derive_seed(*numbers: int) -> int:
    """A seed for torch's generators, in [0, 2^63), that is a well-mixed function of all `numbers` (each >= 0)."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Order(Protocol):
    """Which data set item every position of a run is."""

    def __getitem__(self, position: int) -> int: ...


class DataOrder:
    """An endless sequence of data set indices, every epoch a new permutation of all of them."""

    def __init__(self, num_items: int, seed: int) -> None:
        assert num_items > 0
        self._num_items = num_items
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_items)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._num_items)
            self._epoch = epoch
        return int(self._permutation[offset])


class BatchPositions:
    """Batch sampler for torch's DataLoader: this process's share of each batch, from position `start` on, endlessly."""

    def __init__(self, order: Order, *, start: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        assert batch_size % num_ranks == 0
        self._order = order
        self._start = start
        self._batch_size = batch_size
        self._share = batch_size // num_ranks
        self._rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        first = self._start + self._rank * self._share
        while True:
            yield [self._order[position] for position in range(first, first + self._share)]
            first += self._batch_size


class NoiseStream:
    """Random draws on `device` for every position of a run.

    Draws for different `purpose` numbers are independent of each other.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._generator = torch.Generator(device)

    def normal(self, start: int, num: int, shape: tuple[int, ...], purpose: int) -> torch.Tensor:
        """Standard normal draws for positions start .. start+num-1: float32 [num, *shape]."""
        return self._draw(torch.randn, start, num, shape, purpose)

    def uniform(self, start: int, num: int, shape: tuple[int, ...], purpose: int) -> torch.Tensor:
        """Likewise, evenly distributed in [0, 1)."""
        return self._draw(torch.rand, start, num, shape, purpose)

    def _draw(
        self, draw: Callable[..., torch.Tensor], start: int, num: int, shape: tuple[int, ...], purpose: int
    ) -> torch.Tensor:
        first_chunk, last_chunk = start // _CHUNK, (start + num - 1) // _CHUNK
        chunks = []
        for chunk in range(first_chunk, last_chunk + 1):
            self._generator.manual_seed(derive_seed(self._seed, purpose, chunk))
            chunks.append(draw([_CHUNK, *shape], generator=self._generator, device=self._device))
        offset = start - first_chunk * _CHUNK
        return torch.cat(chunks)[offset : offset + num]
