"""A sharded run (FSDP2, over gloo) computes what a run without sharding does, and its files are read by any run."""

import dataclasses
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from dnnlib.atomic import temporary_path
from tests.helpers.ranks import run_members
from tests.helpers.tiny import assert_close, flat_state, tiny_config, train, write_dataset
from tests.helpers.training_step import RGB, batch_of, wake
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.loss_scale import LossScale
from training.config import TrainingConfig
from training.run.run_folder import RunFolder
from training.run.sharding import whole_like
from training.run.state import TrainingState
from training.snapshot import load_snapshot
from training.training_loop import TrainingRun

NUM_STEPS = 2
# Tracing takes seconds for a network of many blocks.
FEW_BLOCKS: dict[str, Any] = {"channel_mult": (1,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "replicated, rounds": {"batch_gpu": 2},
    "sharded": {"shard": True},
    "sharded, recomputed": {"shard": True, "recompute": True, "batch_gpu": 2, "ls": "auto"},
    "sharded in two copies": {"shard": True, "shard_group": 1, "batch_gpu": 2},
    "replicated, compiled": {"compile": True, **FEW_BLOCKS},
    "sharded, compiled": {"compile": True, "shard": True, "recompute": True, **FEW_BLOCKS},
    "replicated, dropout": {"dropout": 0.5},
    "sharded, dropout": {"shard": True, "dropout": 0.5},
    "replicated, inpainting": {"condition": "inpaint"},
    "sharded, inpainting": {"condition": "inpaint", "shard": True, "recompute": True, "batch_gpu": 2},
}


def run_config(data: Path, **changes: Any) -> TrainingConfig:
    return tiny_config(data, **{"checkpoint": 8, "snapshot": 16, "duration": 16, **changes})


def whole(state: Any) -> dict[str, Any]:
    """All leaves of a state dictionary, DTensors gathered."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in flat_state(state).items()
    }


def steps(config: TrainingConfig, world: World) -> dict[str, Any]:
    """What a few steps give: losses, gradients of the first, and everything that a checkpoint holds."""
    state = TrainingState(config, RGB, world, resumed=False)
    wake(state.local)
    seen: list[dict[str, torch.Tensor]] = []

    def note(*_: Any) -> None:
        pairs = zip(state.net.named_parameters(), state.local.parameters(), strict=True)
        grads = {name: whole_like(rows.grad, param) for (name, param), rows in pairs}
        seen.append({name: value.clone() for name, value in whole(grads).items()})

    state.optimizer.register_step_pre_hook(note)
    images, labels = batch_of(RGB)
    share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    losses = [state.step(images[share], labels[share]).mean() for _ in range(NUM_STEPS)]
    averages = [(suffix, net.state_dict()) for net, suffix in state.averages()]
    result = {
        "averages": {f"{suffix}/{name}": value.half() for suffix, net in averages for name, value in net.items()},
        "loss": world.all_reduce_sum(torch.stack(losses)) / world.size,
        "state": {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in whole(state.state_dict()).items()},
        "gradients": seen[0],
        "numel": sum(p.numel() for p in state.local.parameters()),
    }
    state.close()
    return result


def _join(rank: int, store: str) -> World:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    return distributed.init("cpu")


def _first_member(rank: int, folder: str, data: str) -> None:
    """Steps of all variants, a loss scale, and the first part of a run."""
    world = _join(rank, f"{folder}/store")
    # The graphs are traced, whole or with an error, and not turned into kernels, which takes long.
    torch.compile = functools.partial(torch.compile, backend="eager")
    results: dict[str, Any] = {
        name: steps(tiny_config(Path("none"), **changes), world) for name, changes in VARIANTS.items()
    }
    scale = LossScale("auto", world.device, shared=world)
    scale.unscale_([torch.tensor([float("inf") if rank else 1.0])])
    results["scale after an overflow elsewhere"] = float(scale.factor)
    config = run_config(Path(data), shard=True, snapshot_format="both", batch_gpu=2)
    train_to_end(config, Path(folder, "run"), world)
    torch.save(results, f"{folder}/results{rank}.pt")
    world.close()


def _second_member(rank: int, folder: str, data: str) -> None:
    """The last part of the run, sharded again; and the first part's continuation without sharding."""
    world = _join(rank, f"{folder}/store2")
    config = run_config(Path(data), duration=32, shard=True)
    train_to_end(config, Path(folder, "run"), world)
    train_to_end(dataclasses.replace(config, shard=False), Path(folder, "other"), world)
    world.close()


def train_to_end(config: TrainingConfig, folder: Path, world: World) -> dict[str, Any]:
    run = TrainingRun(config, RunFolder(folder), world=world)
    folder.mkdir(exist_ok=True)
    train(run)
    state = whole(run.state.state_dict())
    run.close()
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what the tests look at."""
    path = tmp_path_factory.mktemp("sharding")
    data = write_dataset(path / "data.zip")
    run_members(_first_member, str(path), str(data))
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return steps(tiny_config(Path("none")), World())


def tolerance_of(value: torch.Tensor) -> float:
    """What sums in another order may change. Of a scalar's, which are over all pixels, there may be little left."""
    return 1e-3 if value.ndim == 0 else 1e-5


def assert_agree(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_close(actual["loss"], expected["loss"], 1e-5)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, value in expected["gradients"].items():
        assert_close(actual["gradients"][name], value, tolerance_of(value), name)
    assert actual["averages"].keys() == expected["averages"].keys()
    for name, value in expected["averages"].items():
        assert_close(actual["averages"][name].float(), value.float(), 1e-3, name)  # a last digit of float16
    # A constant scale of the loss has no state.
    theirs = {k: v for k, v in actual["state"].items() if not k.startswith("/loss_scale")}
    assert theirs.keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        if isinstance(value, torch.Tensor):
            assert_close(theirs[name], value, tolerance_of(value), name)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "dropout" not in name and "inpainting" not in name])
def test_two_processes_compute_what_one_does(results: list[dict[str, Any]], alone: dict[str, Any], name: str):
    """Losses, gradients, weights, moments and both averages, with and without accumulation."""
    expected = steps(tiny_config(Path("none"), **FEW_BLOCKS), World()) if "compiled" in name else alone
    for result in results:
        assert_agree(result[name], expected)
        assert any(key.startswith("/ema/emas/1/") for key in result[name]["state"])


def test_two_processes_hide_what_one_does(results: list[dict[str, Any]]):
    """Masks go by the position in the run, like noise."""
    expected = steps(tiny_config(Path("none"), condition="inpaint"), World())
    for name in ("replicated, inpainting", "sharded, inpainting"):
        assert_agree(results[0][name], expected)


def test_dropout_drops_the_same_with_and_without_sharding(results: list[dict[str, Any]]):
    assert_agree(results[0]["sharded, dropout"], results[0]["replicated, dropout"])


def test_each_process_keeps_half_of_the_weights(results: list[dict[str, Any]], alone: dict[str, Any]):
    kept = [result["sharded"]["numel"] for result in results]
    assert [result["replicated"]["numel"] for result in results] == [alone["numel"]] * 2
    assert alone["numel"] <= sum(kept) < 1.01 * alone["numel"]  # gains are in both
    assert max(kept) < 0.55 * alone["numel"]


def test_an_overflow_in_one_process_lowers_the_loss_scale_of_all(results: list[dict[str, Any]]):
    expected = float(LossScale("auto", torch.device("cpu")).factor) / 2
    assert [result["scale after an overflow elsewhere"] for result in results] == [expected] * 2


def test_a_run_goes_from_two_processes_to_one_to_two_and_from_sharded_to_not(folder: Path, tmp_path: Path):
    data = folder / "data.zip"
    whole_run = train_to_end(run_config(data, duration=32), tmp_path / "whole", World())
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "run", tmp_path / "other")
    saved = sorted(path.name for path in (tmp_path / "run").glob("training-state-*"))
    assert saved == ["training-state-0000000.008.dcp", "training-state-0000000.016.dcp"]

    middle = train_to_end(run_config(data, duration=24), tmp_path / "run", World())
    assert middle["/state/cur_nimg"] == 24
    assert (tmp_path / "run" / "training-state-0000000.024.pt").is_file()
    run_members(_second_member, str(tmp_path), str(data))
    for name in ("run", "other"):
        end = train_to_end(run_config(data, duration=32), tmp_path / name, World())  # nothing is left to do
        assert end["/state/cur_nimg"] == 32
        assert end.keys() == whole_run.keys()
        for key, value in whole_run.items():
            if isinstance(value, torch.Tensor):
                assert_close(end[key], value, tolerance_of(value), f"{name}: {key}")


def test_a_whole_checkpoint_folder_without_its_name_gets_it_and_a_damaged_one_goes(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "run", tmp_path / "run")
    early, late = (tmp_path / "run" / f"training-state-0000000.{nimg}.dcp" for nimg in ("008", "016"))
    content = sorted(path.name for path in late.iterdir())
    for state in (early, late):
        state.rename(temporary_path(state))
    max((tmp_path / "run").glob(".*008.dcp*/*.distcp"), key=lambda path: path.stat().st_size).write_bytes(b"cut short")
    notes: list[str] = []
    run_folder = RunFolder(tmp_path / "run")
    with run_folder.held(World(), say=notes.append):
        assert run_folder.checkpoints() == [late]
    assert sorted(path.name for path in late.iterdir()) == content
    assert [note for note in notes if "was complete" in note] == [
        f"{late.name} was complete when a process was killed, and gets its name."
    ]
    assert not [*(tmp_path / "run").glob(".training-state-*")]
    assert (
        train_to_end(run_config(folder / "data.zip", duration=24), tmp_path / "run", World())["/state/cur_nimg"] == 24
    )


def test_snapshots_of_a_sharded_run_are_the_ordinary_ones(folder: Path, tmp_path: Path):
    train_to_end(run_config(folder / "data.zip", snapshot_format="both"), tmp_path / "run", World())
    expected = sorted(path.name for path in (tmp_path / "run").glob("network-snapshot-*"))
    assert len(expected) == 4
    assert sorted(path.name for path in (folder / "run").glob("network-snapshot-*")) == expected
    for name in expected:
        ours, theirs = (load_snapshot(path / "run" / name) for path in (folder, tmp_path))
        assert (ours.nimg, ours.ema_std, ours.info) == (theirs.nimg, theirs.ema_std, theirs.info)
        for (key, value), (other, reference) in zip(
            ours.net.state_dict().items(), theirs.net.state_dict().items(), strict=True
        ):
            assert (key, value.dtype) == (other, torch.float16)
            assert_close(value.float(), reference.float(), 1e-3, key)  # a last digit of float16
