"""The noise of a run depends on the position in it alone."""

import itertools

import numpy as np
import pytest
import torch

from training.dataset.order import DataOrder
from training.run.streams import NoiseStream, Purpose, derive_seed

CPU = torch.device("cpu")


@pytest.mark.parametrize("cuts", [[1, 2, 3, 40], [15, 16, 17, 32, 33], [50]])
def test_noise_does_not_depend_on_how_it_is_split(cuts):
    whole = NoiseStream(0, CPU).normal(5, 60, (2, 3), purpose=Purpose.NOISE)
    stream = NoiseStream(0, CPU)
    bounds = [0, *cuts, 60]
    parts = [stream.normal(5 + a, b - a, (2, 3), purpose=Purpose.NOISE) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_noise_is_standard_normal_and_no_draw_comes_twice():
    draws = torch.cat(
        [NoiseStream(seed, CPU).normal(0, 20_000, (2,), p) for seed in (0, 1) for p in (Purpose.SIGMA, Purpose.NOISE)]
    )
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
    NoiseStream(1, CPU).normal(0, 4, (2,), Purpose.SIGMA)
    assert DataOrder(5, 0)[7] < 5
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_derived_seeds_differ_and_stay_in_range():
    seeds = [derive_seed(a, b, c) for a in range(8) for b in range(8) for c in (0, 1, 2**40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Half of the bits are set on average.
    assert sum(seed.bit_count() for seed in seeds) / len(seeds) == pytest.approx(31.5, abs=2)


def test_the_numbers_of_a_runs_random_streams_stay_as_they_are():
    numbers = {purpose.name: int(purpose) for purpose in Purpose}
    assert numbers == {"SIGMA": 0, "NOISE": 1, "ENCODER": 2, "DROPOUT": 3, "MASKS": 8, "LABELS": 16}
