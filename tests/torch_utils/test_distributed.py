"""One process, several processes, and the devices they ask for."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from dnnlib.errors import ConfigError
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
    # The claims are asserted in `_member`; a failed one in either process makes spawn raise.
    torch.multiprocessing.spawn(_member, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()  # both came to the end of it
