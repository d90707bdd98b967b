"""Data order and noise depend on the position in the run alone."""

import itertools

import numpy as np
import pytest
import torch

from training.run.streams import BatchPositions, DataOrder, NoiseStream, derive_seed

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("cuts", [[1, 2, 3, 40], [15, 16, 17, 32, 33], [50]])
def test_noise_does_not_depend_on_how_it_is_split(cuts):
    whole = NoiseStream(0, CPU).normal(5, 60, (2, 3), purpose=1)
    stream = NoiseStream(0, CPU)
    bounds = [0, *cuts, 60]
    parts = [stream.normal(5 + a, b - a, (2, 3), purpose=1) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_noise_is_standard_normal_and_no_draw_comes_twice():
    draws = torch.cat([NoiseStream(seed, CPU).normal(0, 20_000, (2,), p) for seed in (0, 1) for p in (0, 1)])
    assert draws.mean().item() == pytest.approx(0, abs=0.01)
    assert draws.std().item() == pytest.approx(1, abs=0.01)
    assert len(torch.unique(draws, dim=0)) == len(draws)
    columns = draws.reshape(4, -1)  # a stream a row
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.03


def test_drawing_leaves_the_global_streams_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    NoiseStream(1, CPU).normal(0, 4, (2,), 0)
    assert DataOrder(5, 0)[7] < 5
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_derived_seeds_differ_and_stay_in_range():
    seeds = [derive_seed(a, b, c) for a in range(8) for b in range(8) for c in (0, 1, 2**40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Half of the bits are set on average.
    assert sum(seed.bit_count() for seed in seeds) / len(seeds) == pytest.approx(31.5, abs=2)
