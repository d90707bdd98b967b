"""The order in which a run reads its data set, as a function of the position in the run.

Position p is the p-th image that the run trains on, counted over all processes. Which item of the data set it is
depends on p and the run's seed alone: not on the number of processes, and not on whether the run was interrupted. A
run has no random state to save.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

# BalancedOrder draws rounds in blocks of at least this many images and rounds, which makes drawing cheap.
_BLOCK_IMAGES, _BLOCK_ROUNDS = 4096, 16

# Numbers of BalancedOrder's random streams: classes within a round, images within a class.
_ROUNDS, _IMAGES = 1, 2


class Order(Protocol):
    """The data set index for every position of a run."""

    def __getitem__(self, position: int) -> int: ...


class DataOrder:
    """An endless sequence of data set indices; every epoch is a new permutation of all of them."""

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


class BalancedOrder:
    """An endless sequence of data set indices in which every class comes equally often (--balance).

    A round has every class once, in an order of its own. Each class runs through its own epochs, one image a round;
    every epoch is a new permutation of the images of the class. So after any number of images, the counts of two
    classes differ by at most one, and so do the counts of two images of one class.

    Keeps all items in memory twice, sorted by class and as currently shuffled: 8 MB for a million items.

    labels:  the class of every item, int [N]. Classes without items are left out.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        assert labels.ndim == 1 and len(labels) > 0
        by_class = np.argsort(labels, kind="stable").astype(np.min_scalar_type(len(labels)))
        _, starts = np.unique(labels[by_class], return_index=True)
        self._items = np.split(by_class, starts[1:])  # of each class
        self._seed = seed
        self._num_classes = len(self._items)
        self._num_rounds = max(-(-_BLOCK_IMAGES // self._num_classes), _BLOCK_ROUNDS)  # in a block
        self._shuffled: list[tuple[int, np.ndarray]] = [(-1, items) for items in self._items]
        self._block = -1
        self._drawn = np.empty(0, dtype=by_class.dtype)  # the items of the block, in order

    def __getitem__(self, position: int) -> int:
        block, offset = divmod(position, self._num_rounds * self._num_classes)
        if block != self._block:
            self._block, self._drawn = block, self._draw(block)
        return int(self._drawn[offset])

    def _draw(self, block: int) -> np.ndarray:
        classes = np.tile(np.arange(self._num_classes), (self._num_rounds, 1))
        classes = np.random.default_rng([self._seed, _ROUNDS, block]).permuted(classes, axis=1)
        first = block * self._num_rounds
        items = np.stack([self._of_class(index, first) for index in range(self._num_classes)])  # [classes, rounds]
        drawn: np.ndarray = items[classes, np.arange(self._num_rounds)[:, None]].ravel()
        return drawn

    def _of_class(self, index: int, first: int) -> np.ndarray:
        """Return the items of a class in the rounds of the block that begins with round `first`."""
        parts, missing = [], self._num_rounds
        while missing:
            span = self._span(index, first)
            parts.append(span[:missing])
            first, missing = first + len(parts[-1]), missing - len(parts[-1])
        return np.concatenate(parts)

    def _span(self, index: int, first: int) -> np.ndarray:
        """Return the items of a class from round `first` on, up to the end of what is shuffled together."""
        items = self._items[index]
        if len(items) == 1:
            return np.repeat(items, self._num_rounds)
        num_epochs = -(-self._num_rounds // len(items))  # a small class shuffles several at once
        group, offset = divmod(first, num_epochs * len(items))
        if self._shuffled[index][0] != group:
            rng = np.random.default_rng([self._seed, _IMAGES, index, group])
            self._shuffled[index] = group, rng.permuted(np.tile(items, (num_epochs, 1)), axis=1).ravel()
        return self._shuffled[index][1][offset:]


# Called with the shards of the window before, of the current one and of the one after.
Enter = Callable[[Sequence[int], Sequence[int], Sequence[int]], None]


class StreamOrder:
    """An endless sequence of data set indices for a data set of shards, of which only a few are at hand at a time.

    An epoch has every shard once, in an order drawn from (seed, epoch). Consecutive shards form a window as soon as
    they have the images of the shuffle buffer; the last window of an epoch takes the rest. The images of a window are
    in an order drawn from (seed, epoch, window). So only the shards of the current window are read.

    counts:  images in each shard; the data set numbers images in the order of the shards.
    buffer:  images to shuffle over, at least.
    copies:  2 if the data set has a mirrored copy of every image after all of them; a window has both.
    enter:   called on the first position of another window, with the numbers of the shards of three windows.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, *, seed: int, buffer: int, copies: int = 1, enter: Enter | None = None
    ) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._num_images = int(self._counts.sum())
        assert self._num_images > 0 and buffer > 0
        self._seed = seed
        self._buffer = buffer
        self._copies = copies
        self._enter = enter
        self._epoch = -1
        self._windows: list[np.ndarray] = []
        self._ends = np.empty(0, dtype=np.int64)  # of the windows, in images with their copies
        self._window = -1
        self._items = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_images * self._copies)
        if epoch != self._epoch:
            self._epoch, self._window = epoch, -1
            self._windows = self.windows(epoch)
            self._ends = np.cumsum([self._counts[window].sum() for window in self._windows]) * self._copies
        window = int(np.searchsorted(self._ends, offset, side="right"))
        if window != self._window:
            self._window = window
            self._items = self._shuffled(window)
            if self._enter is not None:
                self._enter(*self._three_windows())
        return int(self._items[offset - (self._ends[window] - len(self._items))])

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Return the numbers of the shards in each window of an epoch, in the order in which they are read."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(np.flatnonzero(self._counts))
        windows, begin, images = [], 0, 0
        for end, shard in enumerate(shards, start=1):
            images += int(self._counts[shard])
            if images >= self._buffer or end == len(shards):
                windows.append(shards[begin:end])
                begin, images = end, 0
        return windows

    def _shuffled(self, window: int) -> np.ndarray:
        shards = self._windows[window]
        images = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._counts[s]) for s in shards])
        items = np.concatenate([images + copy * self._num_images for copy in range(self._copies)])
        shuffled: np.ndarray = np.random.default_rng([self._seed, self._epoch, window]).permutation(items)
        return shuffled

    def _three_windows(self) -> list[list[int]]:
        """Return the shards of the windows before, at and after the current one, also across epochs."""
        last = len(self._windows) - 1
        three = range(self._window - 1, self._window + 2)
        shards = [self._windows[i].tolist() if 0 <= i <= last else [] for i in three]
        if self._window == 0 and self._epoch > 0:
            shards[0] = self.windows(self._epoch - 1)[-1].tolist()
        if self._window == last:
            shards[2] = self.windows(self._epoch + 1)[0].tolist()
        return shards


def largest_window(sizes: np.ndarray, counts: np.ndarray, buffer: int) -> int:
    """Return a bound on the sum of `sizes` over the shards of any window, in any order of shards; both [shards].

    Before its last shard, a window has less than `buffer` images: at most those of the largest size per image.
    """
    filled = np.flatnonzero(counts)
    sizes, counts = np.asarray(sizes)[filled], np.asarray(counts)[filled]
    order = np.argsort(-sizes / counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    shares = np.clip((buffer - 1 - before) / counts[order], 0, 1)
    return min(int(np.ceil((shares * sizes[order]).sum() + sizes.max())), int(sizes.sum()))
