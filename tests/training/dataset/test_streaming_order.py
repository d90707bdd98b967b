"""The order of a data set of shards is a function of the position, and goes by windows of shards."""

import itertools
from typing import Any

import numpy as np
import pytest

from tests.helpers.shards import COUNTS, TOTAL, plain_order
from training.dataset.shard_order import StreamOrder, most_in_a_window


@pytest.mark.parametrize(("buffer", "copies"), [(1, 1), (8, 1), (8, 2), (12, 1), (1000, 2)])
def test_the_order_is_the_described_one_and_has_every_image_once_an_epoch(buffer: int, copies: int):
    order = StreamOrder(COUNTS, seed=5, buffer=buffer, copies=copies)
    size = TOTAL * copies
    for epoch in range(3):
        items = [order[epoch * size + i] for i in range(size)]
        assert items == list(itertools.chain(*plain_order(COUNTS, 5, buffer, copies, epoch)))
        assert sorted(items) == list(range(size))
        windows = order.windows(epoch)
        assert all(sum(COUNTS[s] for s in window) >= buffer for window in windows[:-1])
    backwards = StreamOrder(COUNTS, seed=5, buffer=buffer, copies=copies)
    assert [backwards[i] for i in reversed(range(3 * size))] == [order[i] for i in reversed(range(3 * size))]
    other = StreamOrder(COUNTS, seed=6, buffer=buffer, copies=copies)
    assert [other[i] for i in range(size)] != [order[i] for i in range(size)]


def test_the_order_tells_which_shards_are_needed_and_soon():
    told: list[tuple[Any, ...]] = []
    order = StreamOrder(COUNTS, seed=5, buffer=8, enter=lambda *windows: told.append(windows))
    for position in range(2 * TOTAL):
        shard = int(np.searchsorted(np.cumsum(COUNTS), order[position], side="right"))
        assert shard in told[-1][1]
    expected = [window.tolist() for epoch in range(3) for window in order.windows(epoch)]
    assert [each[1] for each in told] == expected[: len(told)]
    assert [each[2] for each in told] == expected[1 : len(told) + 1]
    assert [each[0] for each in told] == [[], *expected[: len(told) - 1]]


@pytest.mark.parametrize("buffer", [1, 4, 10, 30, 100])
def test_no_window_is_larger_than_the_bound(buffer: int):
    rng = np.random.default_rng(buffer)
    for _ in range(50):
        counts = rng.integers(0, 12, 6)
        counts[0] += 1
        sizes = rng.integers(1, 1000, 6)
        bound = most_in_a_window(sizes, counts, buffer)
        for shards in itertools.permutations(np.flatnonzero(counts)):
            needed = np.searchsorted(np.cumsum(counts[list(shards)]), buffer) + 1
            assert sizes[list(shards[:needed])].sum() <= bound
        assert bound <= sizes[np.flatnonzero(counts)].sum()
