"""Runs from start to end: what they write and when, that cutting them changes nothing, what they train on."""

import dataclasses
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_same_state, tiny_config, train, write_dataset
from torch_utils.checkpoints.checkpoint import load_checkpoint
from torch_utils.distributed import World
from training.config import SamplesConfig, TrainingConfig
from training.encoders import StabilityVAEEncoder
from training.posthoc.inputs import list_input_pickles
from training.posthoc.reconstruction import reconstruct_phema
from training.run.run_data import batches
from training.run.run_folder import RunFolder
from training.snapshot import load_snapshot
from training.training_loop import Iteration, Saved, Status, TrainingRun, open_dataset

STATS_KEYS = {
    "Progress/kimg",
    "Timing/total_sec",
    "Timing/sec_per_tick",
    "Timing/sec_per_kimg",
    "Timing/maintenance_sec",
    "Resources/cpu_mem_gb",
    "Resources/peak_gpu_mem_gb",
    "Resources/peak_gpu_mem_reserved_gb",
    "Loss/loss",
    "Loss/learning_rate",
    "timestamp",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def make_run(config: TrainingConfig, folder: Path) -> TrainingRun:
    folder.mkdir(exist_ok=True)
    return TrainingRun(config, RunFolder(folder), world=World())


@pytest.mark.parametrize(
    ("change", "cuts"),
    [({}, [1]), ({"dropout": 0.3}, [1, 2, 3, 4]), ({"xflip": True, "batch_gpu": 2}, [3])],
    ids=["plain", "dropout", "xflip"],
)
def test_a_run_cut_at_any_checkpoint_ends_bitwise_as_one_that_was_not(
    data: Path, tmp_path: Path, change: dict, cuts: list[int]
):
    config = tiny_config(data, status=16, checkpoint=8, duration=40, **change)
    whole = make_run(dataclasses.replace(config, checkpoint=0), tmp_path / "whole")
    events = list(whole)
    for cut in cuts:
        folder = tmp_path / f"cut{cut}"
        torch.manual_seed(cut)  # whatever else has been drawn in the process
        for event in make_run(config, folder):
            if isinstance(event, Saved) and event.nimg == 8 * cut:
                break
        resumed = make_run(config, folder)
        assert resumed.state.nimg == 8 * cut
        assert len(resumed) == 5 - cut
        later = list(resumed)
        assert_same_state(resumed.state.state_dict(), whole.state.state_dict())
        assert_same_state(load_checkpoint(folder / "training-state-0000000.040.pt"), _stored(whole))
        losses = [_mean_loss(each, later[0].nimg) for each in (later, events)]
        assert losses[0] == losses[1]


def _stored(run: TrainingRun) -> dict:
    tick = {"cur_nimg": run.state.nimg, "total_elapsed_time": 0.0}
    return run.state.state_dict() | {"stats": {}, "run": {"ranks": 1, "tick": tick}}


def _mean_loss(events: list, since: int) -> list[tuple[int, float]]:
    """Losses as they are reported, from a status interval on that began before the cut."""
    return [(e.nimg, e.stats["Loss/loss"]) for e in events if isinstance(e, Status) and e.nimg >= since]


def test_a_longer_duration_continues_a_finished_run(data: Path, tmp_path: Path):
    config = tiny_config(data, checkpoint=16, duration=48)
    whole = train(make_run(config, tmp_path / "whole"))
    train(make_run(dataclasses.replace(config, duration=24), tmp_path / "parts"))
    assert len(make_run(dataclasses.replace(config, duration=24), tmp_path / "parts")) == 0
    resumed = train(make_run(config, tmp_path / "parts"))
    assert_same_state(resumed.state.state_dict(), whole.state.state_dict())


def test_events_come_at_the_multiples_of_their_intervals_and_at_the_end(data: Path, tmp_path: Path):
    # 11 iterations of 8; intervals that are no multiples of the batch.
    config = tiny_config(data, duration=85, status=20, snapshot=30, checkpoint=50, snapshot_format="both")
    run = make_run(config, tmp_path)
    assert len(run) == 11
    events = list(run)
    assert [e.nimg for e in events if isinstance(e, Iteration)] == list(range(8, 89, 8))
    assert [e.nimg for e in events if isinstance(e, Status)] == [24, 40, 64, 80, 88]
    saved = [(e.nimg, len(e.paths)) for e in events if isinstance(e, Saved)]
    assert saved == [(32, 4), (56, 1), (64, 4), (88, 4), (88, 1)]
    assert all(path.is_file() for e in events if isinstance(e, Saved) for path in e.paths)
    assert len(run) == 0
    assert list(run) == []


def test_the_statistics_have_the_published_keys(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data, status=24, rampup=1e-3, lr=0.25), tmp_path)
    stats = [event.stats for event in run if isinstance(event, Status)]
    assert [s["Progress/kimg"] for s in stats] == [0.024, 0.048]
    assert all(s.keys() == STATS_KEYS for s in stats)
    # The mean over the interval of a rate that rises by 1/1000 of 0.25 an image, and is 0 at first.
    assert [s["Loss/learning_rate"] for s in stats] == pytest.approx([0.25 * 8e-3, 0.25 * 32e-3])
    assert stats[1]["Timing/total_sec"] > stats[0]["Timing/total_sec"] > 0


def test_the_reported_loss_is_the_mean_over_the_interval(data: Path, tmp_path: Path):
    def losses(status: int) -> list[float]:
        run = make_run(tiny_config(data, status=status), tmp_path / str(status))
        return [event.stats["Loss/loss"] for event in run if isinstance(event, Status)]

    each = losses(8)
    assert losses(24) == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-9)


def test_snapshots_hold_the_averages_and_what_is_needed_to_use_them(data: Path, tmp_path: Path):
    config = tiny_config(data, duration=1024, batch=512, snapshot=512, ema_stds=(0.05, 0.2), snapshot_format="both")
    run = make_run(config, tmp_path)
    paths = [path for event in run if isinstance(event, Saved) for path in event.paths]
    assert sorted(path.name for path in paths) == sorted(
        f"network-snapshot-000000{kimg}-{std}.{extension}"
        for kimg in ("0.512", "1")
        for std in ("0.050", "0.200")
        for extension in ("pkl", "safetensors")
    )
    for (ema, suffix), extension in itertools.product(run.state.ema.get(), ("pkl", "safetensors")):
        snapshot = load_snapshot(tmp_path / f"network-snapshot-0000001{suffix}.{extension}")
        assert (snapshot.nimg, snapshot.ema_std) == (1024, float(suffix[1:]))
        assert snapshot.dataset_kwargs == {
            "class_name": "training.dataset.ImageFolderDataset",
            "path": str(data),
            "use_labels": True,
            "xflip": False,
        }
        assert not snapshot.net.training
        assert type(snapshot.encoder) is type(run.state.encoder)
        assert (snapshot.loss_fn.P_mean, snapshot.loss_fn.P_std) == (config.P_mean, config.P_std)
        for name, value in snapshot.net.state_dict().items():
            assert torch.equal(value, ema.state_dict()[name].half()), name


def test_checkpoints_are_named_by_thousands_and_the_newest_counts(data: Path, tmp_path: Path):
    run = train(make_run(tiny_config(data, batch=512, duration=2048, checkpoint=1024), tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training-state-0000001.pt", "training-state-0000002.pt"]
    assert run.folder.newest_checkpoint() == tmp_path / "training-state-0000002.pt"


@pytest.mark.parametrize("channels", [1, 8], ids=["grey", "latents"])
def test_other_kinds_of_data_train(tmp_path: Path, channels: int):
    data = write_dataset(tmp_path / "data.zip", channels=channels)
    config = tiny_config(data, snapshot=16, duration=16, snapshot_format="safetensors")
    run = train(make_run(config, tmp_path / "run"))
    snapshot = load_snapshot(next((tmp_path / "run").glob("*.safetensors")))
    assert (snapshot.net.img_channels, snapshot.net.label_dim) == ({1: 1, 8: 4}[channels], 3)
    assert isinstance(snapshot.encoder, StabilityVAEEncoder) == (channels == 8)
    assert all(param.isfinite().all() for param in run.state.net.parameters())


@pytest.mark.parametrize("labels", [True, False])
def test_an_unconditional_network_trains_with_and_without_labels(tmp_path: Path, labels: bool):
    data = write_dataset(tmp_path / "data.zip", labels=labels)
    run = train(make_run(tiny_config(data, cond=False, duration=16), tmp_path / "run"))
    assert run.state.net.label_dim == 0


def test_a_conditional_network_needs_labels(tmp_path: Path):
    data = write_dataset(tmp_path / "data.zip", labels=False)
    with pytest.raises(ConfigError, match="--cond=False"):
        make_run(tiny_config(data), tmp_path / "run")


def test_training_brings_the_loss_down(tmp_path: Path):
    data = write_dataset(tmp_path / "data.zip", num=4)
    run = make_run(tiny_config(data, batch=32, duration=32 * 40, status=32 * 10, channels=8), tmp_path / "run")
    losses = [event.stats["Loss/loss"] for event in run if isinstance(event, Status)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def replace_item(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as file:
        items = {each: file.read(each) for each in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for each, item in {**items, name: content}.items():
            file.writestr(each, item)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_another_size_ends_the_run_in_one_line(tmp_path: Path, workers: int):
    data = write_dataset(tmp_path / "data.zip")
    with zipfile.ZipFile(write_dataset(tmp_path / "large.zip", size=16)) as large:
        replace_item(data, "007.png", large.read("007.png"))
    run = make_run(tiny_config(data, workers=workers), tmp_path / "run")
    with pytest.raises(ConfigError) as failure:
        list(run)
    assert str(failure.value).startswith(f"{data}: 007.png is 16x16")
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_worker_processes_bring_the_same_batches(data: Path, tmp_path: Path):
    first, second = (
        list(itertools.islice(batches(config, open_dataset(config), World(), start=0), 6))
        for config in (tiny_config(data, workers=workers) for workers in (0, 2))
    )
    assert_same_state(first, second)
    assert all(images.dtype == torch.uint8 and labels.dtype == torch.float32 for images, labels in first)


def test_numeric_switches_are_set_while_a_run_lasts_and_restored_after(data: Path, tmp_path: Path):
    def switches() -> tuple[bool, ...]:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        reduced = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
        return cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, *reduced

    before = switches()
    during = set()
    for _ in make_run(tiny_config(data, bench=True), tmp_path):
        during.add(switches())
    assert during == {(True, False, False, False, False)}
    assert switches() == before
    stopped = iter(make_run(tiny_config(data), tmp_path))
    next(stopped)
    del stopped
    assert switches() == before


def test_init_counts_at_the_start_only(data: Path, tmp_path: Path):
    config = tiny_config(data, snapshot=16, checkpoint=16, duration=16, snapshot_format="safetensors")
    source = train(make_run(config, tmp_path / "source"))
    snapshot = next((tmp_path / "source").glob("*-0.050.safetensors"))
    options = {"seed": 1, "snapshot": 0, "duration": 32, "background_saves": False}
    tuned = dataclasses.replace(config, init=str(snapshot), **options)
    run = make_run(tuned, tmp_path / "tuned")
    expected = source.state.ema.get()[0][0].state_dict()
    assert all(torch.equal(v, expected[k].half().float()) for k, v in run.state.net.state_dict().items())
    for event in run:
        if isinstance(event, Saved):
            break
    snapshot.unlink()
    resumed = make_run(tuned, tmp_path / "tuned")
    assert_same_state(resumed.state.state_dict(), run.state.state_dict())


def test_latents_of_another_channel_count_are_refused_and_not_taken_for_pixels(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "0.npy", np.zeros([6, 8, 8], dtype=np.float32))
    with pytest.raises(ConfigError, match="latents of 6 channels, not 8"):
        make_run(tiny_config(folder, cond=False), tmp_path / "run")


def test_files_less_than_a_thousand_images_apart_have_their_own_names(data: Path, tmp_path: Path):
    samples = SamplesConfig(num=1, classes=(0,), steps=2)
    config = tiny_config(
        data, batch=256, duration=2048, snapshot=512, checkpoint=512, keep_checkpoints=0, samples=samples
    )
    paths = [path for event in make_run(config, tmp_path) if isinstance(event, Saved) for path in event.paths]
    times = ("0000000.512", "0000001", "0000001.536", "0000002")
    assert {path.name for path in tmp_path.glob("samples-*")} == {f"samples-{each}.png" for each in times}
    assert {path.name for path in tmp_path.glob("training-state-*")} == {f"training-state-{each}.pt" for each in times}
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir() if "samples" not in path.name}
    inputs = list_input_pickles(tmp_path, in_std=0.05)
    assert [file.nimg for file in inputs] == [512, 1024, 1536, 2048]
    (output,) = [o for step in reconstruct_phema(inputs, 0.1, 1536, out_dir=tmp_path / "out") for o in step.outputs]
    assert output.paths[0].name == "phema-0000001.536-0.100.pkl"
    assert load_snapshot(output.paths[0]).nimg == 1536
    resumed = make_run(dataclasses.replace(config, duration=2304), tmp_path)
    assert resumed.state.nimg == 2048
