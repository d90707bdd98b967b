"""The host reads nothing in a training step, and collectives see tensors of the run's device: shown on the meta device.

Tensors there have no values, so that whatever reads one raises, and every one that is elsewhere is noticed.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim.adam as adam

from tests.helpers.no_host_reads import NoHostReads
from tests.helpers.tiny import tiny_config
from torch_utils.distributed import World
from torch_utils.loss_scale import LossScale
from torch_utils.training_stats import RunningMeans
from training.metrics.statistics import Moments
from training.run import state as state_module
from training.run.monitor import Monitor
from training.run.sharding import scatter_gradients
from training.run.state import TrainingState

META = torch.device("meta")
DATA = SimpleNamespace(resolution=16, num_channels=3, label_dim=3, holds_latents=False, class_names=None)


class MetaNoise:
    """Stands for the stream of noise, which is drawn on the CPU and copied without waiting."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device

    def normal(self, start: int, num: int, shape: tuple[int, ...], purpose: int) -> torch.Tensor:
        return torch.empty([num, *shape], device=self._device)

    uniform = normal


def meta_state(monkeypatch: pytest.MonkeyPatch, **options: Any) -> TrainingState:
    monkeypatch.setattr(state_module, "NoiseStream", MetaNoise)
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    shape = {"attn_resolutions": (8,), "channels_per_head": 4, "dropout": 0.1, "label_dropout": 0.1}
    config = tiny_config(Path("none"), compile=False, **shape, **options)
    return TrainingState(config, DATA, World(device=META), resumed=True)


@pytest.mark.parametrize(
    ("precision", "ls", "rounds"),
    [("fp32", 1.0, 1), ("fp32", "auto", 2), ("bf16", 1.0, 2), ("bf16", "auto", 1)],  # every pair of two of them
)
def test_a_step_reads_nothing_on_the_host(precision: str, ls: Any, rounds: int, monkeypatch: pytest.MonkeyPatch):
    state = meta_state(monkeypatch, precision=precision, ls=ls, batch_gpu=8 // rounds)
    images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device=META)
    means = RunningMeans(state.world)
    for _ in range(rounds):  # the first step makes the optimizer's state
        with NoHostReads():
            loss = state.step(images, torch.empty(8, 3, device=META))
            means.add("loss", loss)
        assert loss.shape == images.shape
    assert all(average.unet.out_gain.device == META for average, _ in state.ema.get())


def test_a_read_on_the_host_is_found_and_named():
    with pytest.raises(AssertionError, match=r"test_on_device\.py:\d+: .* a value is read"), NoHostReads():
        torch.ones([], device=META).item()
    with pytest.raises(AssertionError, match=r"test_on_device\.py:\d+: .* makes a CPU tensor"), NoHostReads():
        torch.ones(2)


class Collective(World):
    """Two processes of which only this one exists; sums are checked for their device."""

    calls: list[torch.Size]

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == self.device, f"a tensor on {tensor.device} in a sum of processes on {self.device}"
        type(self).calls.append(tensor.shape)
        return tensor

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value, value]


@pytest.fixture
def world() -> Collective:
    Collective.calls = []
    return Collective(size=2, device=META)


def test_an_adaptive_loss_scale_is_shared_on_the_device(world: Collective):
    scale = LossScale("auto", META, shared=world)
    with NoHostReads():
        scale.unscale_([torch.empty(3, device=META)])
    assert Collective.calls == [torch.Size([])]


def test_scattered_gradients_stay_on_the_device(world: Collective):
    net, local = (torch.nn.ParameterList([torch.empty([], device=META), torch.empty(2, 3, device=META)]) for _ in "ab")
    for param in net:
        param.grad = torch.empty_like(param)
    with NoHostReads():
        scatter_gradients(net, local, world)
    assert Collective.calls == [torch.Size([1])]


def test_sums_of_statistics_are_taken_on_the_device(world: Collective, monkeypatch: pytest.MonkeyPatch):
    """They are read there, which meta tensors refuse: only what comes before is looked at."""
    means = RunningMeans(world)
    means.add("loss", torch.empty(4, device=META))
    with pytest.raises(NotImplementedError):
        means.collect()
    net = torch.nn.Linear(3, 2, device=META)
    for param in net.parameters():
        param.grad = torch.empty_like(param)
    monitor = Monitor(net, world, everything=False)
    monitor.arm()
    with NoHostReads():
        monitor.see_gradients()
    monkeypatch.setattr(monitor, "_summary", lambda gradients, names: {})
    assert monitor.collect(torch.nn.functional.mse_loss) == {}
    assert Collective.calls == [torch.Size([2]), torch.Size([2, 3])]


def test_moments_are_merged_on_the_device(world: Collective, monkeypatch: pytest.MonkeyPatch):
    moments = Moments()
    moments.add(torch.ones(2, 3))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: np.zeros(0))
    moments.merge(world)
    assert Collective.calls == [torch.Size([3]), torch.Size([3, 3])]
