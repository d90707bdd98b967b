"""Runs that go on with another number of processes, and what several processes agree on."""

import gc
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_members
from tests.helpers.tiny import assert_same_state, tiny_config, write_dataset
from torch_utils import distributed
from torch_utils.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from torch_utils.distributed import World
from torch_utils.processes.together import everywhere, on_main
from torch_utils.training_stats import RunningMeans
from training.dataset import ImageFolderDataset
from training.dataset.order import BatchPositions, DataOrder
from training.run.resuming import find_resumption
from training.run.run_folder import RunFolder
from training.training_loop import Saved, Status, TrainingRun

NUM = 20  # images


def train_part(folder: Path, stop: int, world: World) -> dict:
    """Train the run in `folder`, of 80 images, up to the checkpoint at `stop` images."""
    read: list[int] = []
    real = ImageFolderDataset.read_batch

    def read_batch(self, indices, out=None):
        read.extend(indices)
        return real(self, indices, out)

    folder.mkdir(exist_ok=True)
    data = folder.parent / "data.zip"
    config = tiny_config(data, status=32, checkpoint=8, duration=80, background_saves=False)
    with mock.patch.object(ImageFolderDataset, "read_batch", read_batch):
        run = TrainingRun(config, RunFolder(folder), world=world)
        begin = run.state.nimg
        losses = []
        for event in run:
            if isinstance(event, Status):
                losses.append((event.nimg, event.stats["Loss/loss"]))
            if isinstance(event, Saved) and event.nimg == stop:
                break
        run.close()
    return {"begin": begin, "read": read, "losses": losses, "notes": run.notes}


def _member(rank: int, out: Path, parts: list[tuple[str, int]]) -> None:
    """Train parts of runs, and write which images were read, for what losses, with what notes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    store = torch.distributed.FileStore(str(out / f"store-{len(parts)}"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = distributed.init("cpu")
    told = [train_part(out / name, stop, world) for name, stop in parts]
    (out / f"told-{rank}.json").write_text(json.dumps(told))
    gc.collect()  # a DistributedDataParallel that outlives the process group may end the process in an ugly way
    world.close()


def train_on_two(out: Path, *parts: tuple[str, int]) -> list[list[dict]]:
    """What the two processes tell of each part (name, stop)."""
    run_members(_member, out, parts)
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(2)]


def positions(parts: list[dict], share: int) -> dict[int, int]:
    """Which image was read for which position of the run, from what each process of a part tells."""
    found = {}
    for rank, part in enumerate(parts):
        for number, image in enumerate(part["read"]):
            iteration, offset = divmod(number, share)
            found[part["begin"] + iteration * share * len(parts) + rank * share + offset] = image
    return found


@pytest.mark.slow
def test_two_processes_then_one_then_two_see_every_image_of_every_epoch_once(tmp_path: Path):
    write_dataset(tmp_path / "data.zip", num=NUM)
    first = train_on_two(tmp_path, ("moves", 24), ("whole", 64), ("cut", 24), ("cut", 64))
    middle = train_part(tmp_path / "moves", 56, World())
    last = train_on_two(tmp_path, ("moves", 80))

    seen = positions([rank[0] for rank in first], 4)
    assert sorted(seen) == list(range(24))
    seen |= positions([middle], 8)
    assert sorted(seen) == list(range(56))
    seen |= positions([rank[0] for rank in last], 4)
    assert sorted(seen) == list(range(80))
    epochs = [[seen[position] for position in range(start, start + NUM)] for start in range(0, 80, NUM)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM))] * 4
    order = DataOrder(NUM, seed=0)
    assert [image for epoch in epochs for image in epoch] == [order[position] for position in range(80)]

    assert first[0][0]["notes"] == []
    assert "is of 2 process(es), this run has 1: it continues with the next image" in middle["notes"][0]
    assert "is of 1 process(es), this run has 2" in last[0][0]["notes"][0]

    # On as many processes as before, sums of an unfinished interval included, everything goes on bitwise.
    _, whole, _, cut = first[0]
    assert cut["begin"] == 24
    assert [nimg for nimg, _ in whole["losses"]] == [32, 64]
    assert cut["losses"] == whole["losses"]
    ends = [load_checkpoint(tmp_path / name / "training-state-0000000.064.pt") for name in ("whole", "cut")]
    assert ends[0]["state"]["cur_nimg"] == 64
    assert_same_state(*ends)
    # On another number of processes, those sums are not lost.
    (_, loss), *_ = middle["losses"]
    assert loss == pytest.approx(whole["losses"][0][1], rel=1e-5)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 2, 8, 1)])
def test_positions_of_a_run_are_dealt_out_once_whatever_the_number_of_processes(sizes: tuple[int, ...]):
    start, seen = 0, []
    for size in sizes:
        dealt = [
            iter(BatchPositions(DataOrder(NUM, 0), start=start, batch_size=8, rank=r, num_ranks=size))
            for r in range(size)
        ]
        seen += [image for _ in range(5) for rank in dealt for image in next(rank)]
        start += 5 * 8
    for epoch in range(len(seen) // NUM):
        assert sorted(seen[epoch * NUM : (epoch + 1) * NUM]) == list(range(NUM))


class Among(World):
    """A World whose other processes have given their values already."""

    def __init__(self, *, rank: int, values: list) -> None:
        super().__init__(rank=rank, size=len(values))
        object.__setattr__(self, "values", values)

    def all_gather_objects(self, value):
        return [*self.values[: self.rank], value, *self.values[self.rank + 1 :]]


def test_sums_of_an_interval_go_back_to_their_processes_or_all_to_the_first():
    means = RunningMeans(Among(rank=0, values=[None, {"a": [0.3, 5.0]}]))
    means.add("a", torch.tensor([0.1, 0.2]))
    state = means.state_dict()
    assert state["a"].shape == (2, 2)
    for rank in range(2):
        again = RunningMeans(World(rank=rank, size=2))
        again.load_state_dict(state)
        assert torch.equal(again._moments["a"], state["a"][rank])
    state["a"][1, 0] = float("nan")
    for size in (1, 3):
        rest = [RunningMeans(World(rank=rank, size=size)) for rank in range(size)]
        for each in rest:
            each.load_state_dict(state)
        assert rest[0]._moments["a"][1] == 7 and rest[0]._moments["a"][0].isnan()
        assert all(each._moments["a"].tolist() == [0, 0] for each in rest[1:])


def test_a_failure_of_one_process_is_that_of_all():
    def fail() -> int:
        raise ConfigError("mine")

    assert on_main(World(), lambda: 3) == everywhere(World(), lambda: 3) == 3
    with pytest.raises(ConfigError, match="theirs"):
        on_main(
            Among(rank=1, values=[(None, ConfigError("theirs")), None]), lambda: pytest.fail("not the main process")
        )
    assert on_main(Among(rank=1, values=[(7, None), None]), lambda: 3) == 7
    with pytest.raises(ConfigError, match="theirs"):
        everywhere(Among(rank=0, values=[None, ConfigError("theirs")]), lambda: 3)
    with pytest.raises(ConfigError, match="mine"):
        everywhere(Among(rank=0, values=[None, None]), fail)


def test_a_process_that_sees_another_file_than_the_first_is_refused(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path / "training-state-0000001.pt", {"state": {"cur_nimg": 1024}})
    theirs = tmp_path / "training-state-0000001.pt", 2048, ["a note"]
    monkeypatch.setattr("training.run.resuming.on_main", lambda world, work: theirs)
    world = World(rank=1)
    with pytest.raises(ConfigError, match="another file in process 1; all need the same --outdir"):
        find_resumption(RunFolder(tmp_path), world)
