"""The order in which a run reads a data set of shards: shards in an order of the epoch, images shuffled over a few.

As with training/run/streams.py, which image is the p-th of the run depends on p and the seed alone. An epoch has every
shard once, in an order drawn from (seed, epoch). Consecutive shards make up a window as soon as they have the images of
the shuffle buffer; the last window of an epoch takes what is left. The images of a window are in an order drawn from
(seed, epoch, window). So an image is read within its window, and only the window's shards have to be at hand.
"""

from collections.abc import Callable, Sequence

import numpy as np

# Shards of the window before, the current one and the one after.
Enter = Callable[[Sequence[int], Sequence[int], Sequence[int]], None]


class StreamOrder:
    """An endless sequence of data set indices; a drop-in for DataOrder.

    counts:  images in each shard; the data set numbers images in the order of the shards.
    buffer:  images to shuffle over, at least.
    copies:  2 where the data set has a mirrored copy of every image after all of them; a window has both.
    enter:   called when the order comes to another window, with the numbers of the shards of three windows.
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
        self._enter_window = enter
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
            self._tell()
        return int(self._items[offset - (self._ends[window] - len(self._items))])

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the shards in each window of an epoch, in the order in which they are wanted."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(np.flatnonzero(self._counts))
        windows, begin, images = [], 0, 0
        for end, shard in enumerate(shards, start=1):
            images += int(self._counts[shard])
            if images >= self._buffer or end == len(shards):
                windows.append(shards[begin:end])
                begin, images = end, 0
        return windows

    def _shuffled(self, window: int) -> np.ndarray:
        images = np.concatenate(
            [np.arange(self._starts[s], self._starts[s] + self._counts[s]) for s in self._windows[window]]
        )
        items = np.concatenate([images + copy * self._num_images for copy in range(self._copies)])
        shuffled: np.ndarray = np.random.default_rng([self._seed, self._epoch, window]).permutation(items)
        return shuffled

    def _tell(self) -> None:
        if self._enter_window is None:
            return
        last = len(self._windows) - 1
        three = range(self._window - 1, self._window + 2)
        around = [self._windows[i].tolist() if 0 <= i <= last else [] for i in three]
        if self._window == 0 and self._epoch > 0:
            around[0] = self.windows(self._epoch - 1)[-1].tolist()
        if self._window == last:
            around[2] = self.windows(self._epoch + 1)[0].tolist()
        self._enter_window(*around)


def most_in_a_window(sizes: np.ndarray, counts: np.ndarray, buffer: int) -> int:
    """A bound on the sum of `sizes` over the shards of any window, whatever order they come in; both [shards].

    Until the last shard is added there are less than `buffer` images, at most those of the largest size per image.
    """
    filled = np.flatnonzero(counts)
    sizes, counts = np.asarray(sizes)[filled], np.asarray(counts)[filled]
    order = np.argsort(-sizes / counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    shares = np.clip((buffer - 1 - before) / counts[order], 0, 1)
    return min(int(np.ceil((shares * sizes[order]).sum() + sizes.max())), int(sizes.sum()))
