"""How the network of a run is compiled for one process and for several."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.tiny import assert_close, tiny_config
from tests.helpers.training_step import RGB, batch_of, wake
from torch_utils.distributed import World
from training.fast.training_network import FastPrecond
from training.run import run_network
from training.run.run_network import compiles_as_one
from training.run.state import TrainingState

CONFIG = tiny_config(Path("none"))
EIGHT = World(size=8, device=torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("local", "gpus", "unreachable", "shard", "whole"),
    [
        ("8", 8, None, False, True),
        ("8", 8, (5, 2), False, False),  # over PCIe
        ("4", 8, None, False, False),  # two machines
        (None, 8, None, False, False),  # an unknown launcher
        ("8", 1, None, False, False),  # each process sees its own GPU only
        ("8", 8, None, True, False),
    ],
)
def test_one_graph_where_all_gpus_reach_each_other(
    local: str | None, gpus: int, unreachable: Any, shard: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != unreachable)
    assert compiles_as_one(tiny_config(Path("none"), shard=shard), EIGHT) == whole


def test_one_process_compiles_one_graph_and_cpus_compile_blocks():
    assert compiles_as_one(CONFIG, World())
    assert not compiles_as_one(CONFIG, World(size=2))


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # a DistributedDataParallel must not outlive its group
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("batch_gpu", [4, pytest.param(2, marks=pytest.mark.slow)], ids=["one round", "two rounds"])
def test_one_graph_below_distributed_data_parallel_trains_as_eager_mode_does(
    batch_gpu: int, group: None, monkeypatch: pytest.MonkeyPatch
):
    """One of two processes, alone in its group; traced by the compiler, run eagerly."""
    compile_ = FastPrecond.compile
    monkeypatch.setattr(run_network, "compiles_as_one", lambda config, world: True)
    monkeypatch.setattr(FastPrecond, "compile", lambda self, **_: compile_(self, fullgraph=True, backend="eager"))
    images, labels = batch_of(RGB, 4)
    states = []
    for compiled in (False, True):
        config = tiny_config(Path("none"), compile=compiled, batch_gpu=batch_gpu, channel_mult=(1,))
        state = TrainingState(config, RGB, World(size=2), resumed=False)
        wake(state.net)
        for _ in range(2):
            state.step(images, labels)
        assert isinstance(state.replica, DistributedDataParallel)
        assert state.replica.bucket_bytes_cap == (128 if compiled else 25) << 20
        states.append(state.net.state_dict())
        state.close()
    for name, value in states[0].items():
        assert_close(states[1][name], value, 1e-4, name)
