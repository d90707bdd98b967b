"""One process, several processes, and the devices they ask for."""

from pathlib import Path

import pytest
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_members
from torch_utils import distributed
from torch_utils.distributed import World, resolve_device
from torch_utils.training_stats import RunningMeans


def test_one_process_is_its_own_world(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.init("cpu")
    assert world == World(rank=0, size=1, device=torch.device("cpu"))
    assert world.is_main
    world.barrier()
    assert world.all_gather_objects("x") == ["x"]
    assert world.all_reduce_sum(torch.tensor([2.0])).tolist() == [2.0]
    world.close()


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:99", "xla", "meta"], ids=repr)
def test_a_device_that_is_not_there_is_refused_by_name(name: str):
    with pytest.raises(ConfigError, match=f"--device={name} "):
        resolve_device(name)


def test_without_a_name_the_device_is_one_that_is_there():
    assert torch.zeros(1, device=resolve_device()).item() == 0
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said_so():
    with pytest.raises(ConfigError, match="--device=cuda needs GPU 0, but PyTorch sees 0 here"):
        resolve_device("cuda")


def _member(rank: int, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = distributed.init("cpu")
    assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
    world.barrier()
    assert world.all_gather_objects(rank * 10) == [0, 10]
    assert world.all_reduce_sum(torch.tensor([1.0, float(rank)])).tolist() == [2.0, 1.0]
    means = RunningMeans(world)
    means.add("a", torch.full([3 - rank], float(rank)))  # 0 0 0 and 1 1
    assert means.collect() == {"a": pytest.approx(0.4)}
    world.close()
    assert not torch.distributed.is_initialized()
    Path(folder, f"done{rank}").touch()


def test_two_processes_talk_to_each_other(tmp_path: Path):
    # The claims are asserted in `_member`; a failed one in either process makes this raise.
    run_members(_member, str(tmp_path))
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()  # both came to the end of it


def test_processes_that_srun_started_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # in a batch script, which is one process
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert distributed.init("cpu").size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match=r"srun started 4 processes .* start one torchrun on each machine"):
        distributed.init("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.init("cpu").size == 1


def _leaver(rank: int, folder: str, port: int) -> None:
    import os
    import time

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with distributed.joined("cpu"):
        if rank == 1:
            time.sleep(0.5)
            assert not Path(folder, "left").exists()
    Path(folder, "left").touch()


def test_no_process_leaves_before_the_others_are_done(tmp_path: Path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_members(_leaver, str(tmp_path), store.port)
    assert (tmp_path / "left").exists()
