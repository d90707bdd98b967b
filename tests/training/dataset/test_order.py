"""The order of the data depends on the position in the run alone; that of shards goes by windows of shards."""

import itertools
from typing import Any

import numpy as np
import pytest

from tests.helpers.shards import COUNTS, TOTAL, plain_order
from training.dataset.order import BatchPositions, DataOrder, StreamOrder, largest_window


def take(positions: BatchPositions, num: int) -> list[list[int]]:
    return list(itertools.islice(positions, num))


def test_every_epoch_is_another_permutation():
    order = DataOrder(50, seed=1)
    epochs = [tuple(order[50 * epoch + i] for i in range(50)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_the_order_depends_on_the_seed_and_not_on_the_way_it_is_read():
    forward = [DataOrder(7, seed=3)[i] for i in range(30)]
    order = DataOrder(7, seed=3)
    assert [order[i] for i in reversed(range(30))] == forward[::-1]
    assert [DataOrder(7, seed=4)[i] for i in range(30)] != forward


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_divide_every_batch_among_them(num_ranks):
    whole = take(BatchPositions(DataOrder(11, 0), start=0, batch_size=8), 6)  # batches that straddle epochs
    parts = [
        take(BatchPositions(DataOrder(11, 0), start=0, batch_size=8, rank=rank, num_ranks=num_ranks), 6)
        for rank in range(num_ranks)
    ]
    joined = [list(itertools.chain.from_iterable(shares)) for shares in zip(*parts, strict=True)]
    assert joined == whole


def test_a_later_start_gives_the_batches_from_there_on():
    whole = take(BatchPositions(DataOrder(11, 0), start=0, batch_size=8, rank=1, num_ranks=2), 6)
    assert take(BatchPositions(DataOrder(11, 0), start=24, batch_size=8, rank=1, num_ranks=2), 3) == whole[3:]


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
        bound = largest_window(sizes, counts, buffer)
        for shards in itertools.permutations(np.flatnonzero(counts)):
            needed = np.searchsorted(np.cumsum(counts[list(shards)]), buffer) + 1
            assert sizes[list(shards[:needed])].sum() <= bound
        assert bound <= sizes[np.flatnonzero(counts)].sum()
