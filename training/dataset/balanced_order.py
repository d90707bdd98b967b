"""The order of a run that sees every class equally often (--balance).

As with training/run/streams.py, which image is the p-th of the run depends on p, the seed and the labels alone. The run
goes by rounds: a round has every class once, in an order of its own. The images of a class come by its own epochs, one
image a round: every epoch is a new permutation of them. So after any number of images the classes differ by one at the
most, and the images of one class among each other, too.
"""

import numpy as np

# Rounds are drawn together until they have so many images, and at least so many rounds: enough to make that cheap.
_BLOCK_IMAGES, _BLOCK_ROUNDS = 4096, 16

# Of the random streams: of the classes in a round, and of the images in a class.
_ROUNDS, _IMAGES = 1, 2


class BalancedOrder:
    """An endless sequence of data set indices; a drop-in for DataOrder.

    labels:  the class of every item, int [N]. Numbers that no item has are no classes.

    In memory are all items twice, once sorted by class and once as they are shuffled for now: 8 MB for a million,
    and what comes with a class.
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
        """The items of a class in the rounds of a block, which begins with round `first`."""
        parts, missing = [], self._num_rounds
        while missing:
            span = self._span(index, first)
            parts.append(span[:missing])
            first, missing = first + len(parts[-1]), missing - len(parts[-1])
        return np.concatenate(parts)

    def _span(self, index: int, first: int) -> np.ndarray:
        """The items of a class from round `first` on, as far as they were shuffled together."""
        items = self._items[index]
        if len(items) == 1:
            return np.repeat(items, self._num_rounds)
        num_epochs = -(-self._num_rounds // len(items))  # several at once of a small class
        group, offset = divmod(first, num_epochs * len(items))
        if self._shuffled[index][0] != group:
            rng = np.random.default_rng([self._seed, _IMAGES, index, group])
            self._shuffled[index] = group, rng.permuted(np.tile(items, (num_epochs, 1)), axis=1).ravel()
        return self._shuffled[index][1][offset:]
