"""Sessions that end before their run: by request, by a hook, after a slice, and where numbers are numbers no more."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_members
from tests.helpers.tiny import assert_same_state, tiny_config, train, write_dataset
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.processes import stopping
from torch_utils.processes.together import DelayedMaximum
from training.config import TrainingConfig
from training.dataset import ImageFolderDataset
from training.run.resuming import require_same
from training.run.run_folder import RunFolder
from training.training_loop import Cause, Ended, Iteration, Saved, Status, TrainingRun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


@pytest.fixture(autouse=True)
def _no_request_is_left():
    yield
    assert not stopping.REQUEST.asked


def make_run(config: TrainingConfig, folder: Path, world: World | None = None) -> TrainingRun:
    folder.mkdir(exist_ok=True)
    return TrainingRun(config, RunFolder(folder), world=world or World())


def test_a_request_ends_the_session_after_the_iteration_and_the_next_goes_on(data: Path, tmp_path: Path):
    config = tiny_config(data, dropout=0.3, status=32)
    whole = train(make_run(config, tmp_path / "whole"))
    events = []
    for event in make_run(config, tmp_path / "run"):
        events.append(event)
        if event == Iteration(nimg=16):
            distributed.request_suspend()
    path = tmp_path / "run" / "training-state-0000000.016.pt"
    assert events[-2:] == [Saved(nimg=16, paths=[path]), Ended(nimg=16, cause=Cause.SUSPEND)]
    assert [e.nimg for e in events if isinstance(e, Iteration)] == [8, 16]
    resumed = make_run(config, tmp_path / "run")
    assert resumed.state.nimg == 16
    assert_same_state(train(resumed).state.state_dict(), whole.state.state_dict())


def test_a_request_before_the_start_trains_nothing_and_writes_nothing(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data), tmp_path)
    distributed.request_suspend()
    assert list(run) == [Ended(nimg=0, cause=Cause.SUSPEND)]
    assert list(tmp_path.iterdir()) == []


def test_slices_add_up_to_the_run(data: Path, tmp_path: Path):
    config = tiny_config(data, xflip=True)
    whole = train(make_run(config, tmp_path / "whole"))
    slices = [list(make_run(dataclasses.replace(config, slice=17), tmp_path / "run")) for _ in range(3)]
    assert slices[0][-1] == Ended(nimg=24, cause=Cause.SLICE)
    # The end of the run is no end of a slice, and leaves a state that says so, in spite of --checkpoint=0.
    assert slices[1][-1] == Saved(nimg=48, paths=[tmp_path / "run" / "training-state-0000000.048.pt"])
    assert slices[2] == []
    assert_same_state(make_run(config, tmp_path / "run").state.state_dict(), whole.state.state_dict())


def test_the_hooks_can_be_replaced_by_a_clusters_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr(distributed, "update_progress", lambda cur, total: told.append((cur, total)))
    monkeypatch.setattr(distributed, "should_suspend", lambda: len(told) >= 2)
    *_, end = make_run(tiny_config(data, status=16), tmp_path / "suspended")
    assert end == Ended(nimg=24, cause=Cause.SUSPEND)
    assert told == [(0, 48), (16, 48)]
    monkeypatch.setattr(distributed, "should_suspend", lambda: False)
    monkeypatch.setattr(distributed, "should_stop", lambda: len(told) >= 4)
    events = list(make_run(tiny_config(data, status=8, snapshot=1024), tmp_path / "stopped"))
    assert events[-1] == Ended(nimg=16, cause=Cause.STOP)
    # It ends with all that a run ends with.
    names = {path.name for e in events if isinstance(e, Saved) for path in e.paths}
    assert names == {f"network-snapshot-0000000.016-{std}.pkl" for std in ("0.050", "0.100")} | {
        "training-state-0000000.016.pt"
    }


def spoil_loss(run: TrainingRun, since: int, until: int = 1 << 30) -> None:
    """Make the loss NaN in the iterations that start at `since` .. `until` images."""
    loss_fn = run.state.loss_fn

    def spoilt(*args, **kwargs):
        return loss_fn(*args, **kwargs) * (math.nan if since <= run.state.nimg < until else 1)

    run.state.loss_fn = spoilt


def test_a_loss_that_stays_nan_stops_the_run_with_a_checkpoint(data: Path, tmp_path: Path):
    config = tiny_config(data, status=16, duration=160)
    run = make_run(config, tmp_path)
    spoil_loss(run, since=24)
    events = list(run)
    assert isinstance(events[-1], Ended) and events[-1].cause == Cause.NONFINITE
    assert events[-1].nimg == 64  # intervals that end at 32, 48, 64
    assert "last 3 status intervals" in events[-1].explanation and "the mean loss was nan" in events[-1].explanation
    assert events[-2] == Saved(nimg=64, paths=[tmp_path / "training-state-0000000.064.pt"])
    assert all(p.isfinite().all() for p in run.state.net.parameters())


@pytest.mark.parametrize("change", [{"on_nonfinite": "continue"}, {"nonfinite_limit": 6}])
def test_a_run_goes_on_where_that_is_wanted(data: Path, tmp_path: Path, change: dict):
    run = make_run(tiny_config(data, status=8, duration=40, **change), tmp_path)
    spoil_loss(run, since=0)
    events = list(run)
    assert not any(isinstance(event, Ended) for event in events)
    assert all(math.isnan(event.stats["Loss/loss"]) for event in events if isinstance(event, Status))


def test_intervals_count_only_in_a_row(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data, status=8, duration=80, nonfinite_limit=4), tmp_path)
    spoil_loss(run, since=16, until=40)  # three of ten
    assert not any(isinstance(event, Ended) for event in run)


def test_a_parameter_without_any_finite_gradient_stops_the_run_and_is_named(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data, status=8, duration=80), tmp_path)
    name, param = next((n, p) for n, p in run.state.net.named_parameters() if p.ndim == 4)
    param.register_hook(lambda grad: grad * math.inf)
    *_, end = run
    assert end.cause == Cause.NONFINITE and end.nimg == 24
    assert f"the gradient of {name} had no finite element" in end.explanation


def test_single_elements_that_overflow_are_no_reason_to_stop(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data, status=8, duration=80), tmp_path)
    param = next(p for p in run.state.net.parameters() if p.ndim == 4)
    spoilt = torch.zeros_like(param)
    spoilt[0, 0, 0, 0] = math.inf
    param.register_hook(lambda grad: grad + spoilt)
    assert not any(isinstance(event, Ended) for event in run)


def test_weights_that_are_no_numbers_do_not_take_the_place_of_a_checkpoint(data: Path, tmp_path: Path):
    config = tiny_config(data, status=8, checkpoint=24, duration=80)
    run = make_run(config, tmp_path)
    saved = []
    for event in run:
        saved += [event.nimg] if isinstance(event, Saved) else []
        if event == Iteration(nimg=32):
            next(run.state.net.parameters()).data.fill_(math.nan)
    assert isinstance(event, Ended) and event.nimg >= 48
    assert saved == [24]


@pytest.mark.parametrize(("name", "value"), [("slice", 0), ("nonfinite_limit", 0)])
def test_options_that_cannot_work_are_refused(name: str, value: int):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}=0"):
        tiny_config(Path("none"), **{name: value})


def test_a_process_alone_agrees_with_itself_at_once():
    agreement = DelayedMaximum(World())
    assert [agreement.exchange(value) for value in (0, 3, 0)] == [0, 3, 0]
    assert agreement.settle() == 0


def _member(rank: int, folder: str, data: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(rank=rank, size=2)
    agreement = DelayedMaximum(world)
    answers = [agreement.exchange(value) for value in ((0, 5, 0, 0) if rank else (0, 2, 1, 0))]
    assert answers == [0, 0, 5, 1]
    assert agreement.settle() == 0

    # One of two is asked, in the middle of an iteration: both end after the one that follows.
    run = make_run(tiny_config(Path(data), duration=160), Path(folder, "run"), world)
    for event in run:
        if event == Iteration(nimg=24) and rank == 1:
            distributed.request_suspend()
    assert event == Ended(nimg=32, cause=Cause.SUSPEND)
    run.close()

    config = tiny_config(Path(data), seed=rank)
    with pytest.raises(ConfigError, match="differ in option seed: 0 in process 0, 1 in process 1"):
        make_run(config, Path(folder, "options"), world)
    for change in ({"num": 19 + rank}, {"size": 8 * (1 + rank)}, {"num_classes": 2 + rank}, {"labels": rank == 0}):
        theirs = write_dataset(Path(folder, f"data{rank}.zip"), **change)
        (name,) = change
        fact = {"num": "number of images", "size": "resolution"}.get(name, "length of labels")
        with pytest.raises(ConfigError, match=f"differ in {fact}: "):
            require_same(world, tiny_config(theirs), ImageFolderDataset(theirs), resumed_from="")
    # The group is left by both at once: gloo may abort a process whose peer is gone.
    store.set(f"ends {rank}", "")
    store.wait(["ends 0", "ends 1"])
    torch.distributed.destroy_process_group()
    Path(folder, f"done{rank}").touch()


def test_two_processes_end_together_and_refuse_to_differ(data: Path, tmp_path: Path):
    run_members(_member, str(tmp_path), str(data))  # raises if a member does
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
