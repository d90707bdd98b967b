"""Means over an interval."""

import pytest
import torch

from torch_utils.distributed import World
from torch_utils.training_stats import RunningMeans


def test_the_mean_is_that_of_all_elements_since_the_last_collect():
    means = RunningMeans(World())
    means.add("a", torch.tensor([1.0, 2.0]))
    means.add("a", torch.tensor([[6.0]]))
    means.add("b", torch.tensor(4))
    assert means.collect() == {"a": 3.0, "b": 4.0}
    means.add("a", torch.tensor(5.0))
    assert means.collect() == {"a": 5.0}
    assert means.collect() == {}


def test_sums_keep_what_float32_would_lose():
    means = RunningMeans(World())
    for _ in range(10):
        means.add("a", torch.full([1 << 20], 0.1))
    assert means.collect()["a"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_an_interval_continues_from_its_stored_state():
    first, second = RunningMeans(World()), RunningMeans(World())
    first.add("a", torch.tensor([1.0, 2.0]))
    second.load_state_dict(first.state_dict())
    second.add("a", torch.tensor(6.0))
    assert second.collect() == {"a": 3.0}
    assert first.collect() == {"a": 1.5}


def test_adding_needs_no_gradient():
    means = RunningMeans(World())
    means.add("a", torch.ones(2, requires_grad=True) * 2)
    assert not means.state_dict()["a"].requires_grad
