"""Runs of networks that see a second image: they learn to use it, go on bitwise, and leave other runs alone."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.errors import ConfigError
from edm2.report import sample_grids as report_pictures
from edm2.report.record import Grid
from tests.helpers.sample_grid import cells
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import assert_close, assert_same_state, flat_state, tiny_config, train, write_dataset
from torch_utils.distributed import World
from training.condition.source_images import DatasetImages
from training.config import MetricsConfig, SamplesConfig, TrainingConfig
from training.metrics import available as plan
from training.run.run_folder import RunFolder
from training.run.state import TrainingState
from training.sampling.generation import generate_images
from training.snapshot import load_snapshot
from training.training_loop import TrainingRun

NUM_PICTURES = 24  # that are sampled from


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def run_of(config: TrainingConfig, folder: Path, world: World | None = None) -> TrainingRun:
    return TrainingRun(config, RunFolder(folder), world=world or World())


def write_pictures(path: Path, pixels: np.ndarray) -> Path:
    """Grey ones [N, H, W] as a data set."""
    with zipfile.ZipFile(path, "w") as file:
        for index, picture in enumerate(pixels.clip(0, 255).astype(np.uint8)):
            data = io.BytesIO()
            PIL.Image.fromarray(picture).save(data, format="PNG")
            file.writestr(f"{index:03d}.png", data.getvalue())
    return path


def learned(folder: Path, pixels: np.ndarray, condition: str, hidden: np.ndarray | None, *, steps: int) -> np.ndarray:
    """Samples [N, H, W] of a network that was trained on `pixels` [N, H, W], each from one of the first pictures."""
    num = 32 * steps
    config = tiny_config(
        write_pictures(folder / "data.zip", pixels), condition=condition, cond=False, channels=8, batch=32,
        duration=num, lr=0.02, decay=0, rampup=num * 1e-7, ema_stds=(0.1,), P_std=1.4,
    )  # fmt: skip
    run = train(run_of(config, folder / "run"))
    (net,) = (net for net, _ in run.state.averages())
    source = DatasetImages(run.dataset, range(NUM_PICTURES), hidden=hidden)
    batches = generate_images(
        net.eval(), seeds=range(NUM_PICTURES), source=source, condition=condition, num_steps=6, device="cpu"
    )
    return np.concatenate([batch.images.numpy() for batch in batches])[:, 0].astype(float)


def test_a_trained_network_gives_pictures_that_reduce_to_what_it_was_given(tmp_path):
    """What a network without would give, images as likely as the data's, is as far off as two pictures of the data."""
    rng = np.random.default_rng(0)
    levels = rng.choice([40, 128, 215], size=[200, 2, 2])
    pixels = levels.repeat(4, 1).repeat(4, 2) + rng.integers(-15, 16, [200, 8, 8])
    made = learned(tmp_path, pixels, "lowres:4", None, steps=90)

    def small(images: np.ndarray) -> np.ndarray:
        return images.reshape(-1, 2, 4, 2, 4).mean((2, 4))

    given = small(pixels[:NUM_PICTURES])
    independent = np.abs(given - np.roll(given, 1, 0)).mean()
    assert np.abs(small(made) - given).mean() < 0.25 * independent
    assert independent > 50


def test_a_trained_network_fills_what_is_hidden_and_keeps_the_rest_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 236, [200, 1, 1]) + rng.integers(-5, 6, [200, 8, 8])
    hidden = np.zeros([NUM_PICTURES, 8, 8], dtype=bool)
    hidden[:, 2:6, 2:6] = True
    made = learned(tmp_path, pixels, "inpaint", hidden, steps=170)
    given = pixels[:NUM_PICTURES]
    assert np.array_equal(made[~hidden], given[~hidden])
    independent = np.abs(given - np.roll(given, 1, 0))[hidden].mean()
    assert np.abs(made - given)[hidden].mean() < 0.5 * independent


@pytest.mark.parametrize("condition", ["lowres:2", "inpaint:0.2-0.6"])
def test_a_run_goes_on_bitwise_and_refuses_another_condition(condition, data, tmp_path):
    config = tiny_config(data, condition=condition, checkpoint=16, dropout=0.2)
    whole = train(run_of(config, tmp_path / "whole")).state.state_dict()
    first = dataclasses.replace(config, duration=24)
    train(run_of(first, tmp_path / "parts"))
    resumed = run_of(config, tmp_path / "parts")
    assert resumed.state.nimg == 24
    assert_same_state(train(resumed).state.state_dict(), whole)
    folder = RunFolder(tmp_path / "parts")
    folder.start(config, nimg=48)
    folder.check(config, allow_changes=False)
    for other in (None, "lowres:4"):
        with pytest.raises(ConfigError, match="condition"):
            folder.check(dataclasses.replace(config, condition=other), allow_changes=False)


def test_rounds_and_recomputation_change_rounding_only(data):
    config = tiny_config(data, condition="inpaint")
    dataset = SimpleNamespace(
        num_channels=3,
        resolution=8,
        holds_latents=False,
        label_dim=3,
        encoder_entry=None,
        class_names=None,
        path=data,
    )
    images = torch.randint(0, 256, [8, 3, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(3)[torch.arange(8) % 3]
    states = []
    for changes in ({}, {"batch_gpu": 2}, {"recompute": True}):
        state = TrainingState(dataclasses.replace(config, **changes), dataset, World(), resumed=False)
        for _ in range(2):
            state.step(images, labels)
        states.append(flat_state(state.net.state_dict()))
    for other in states[1:]:
        for name, value in states[0].items():
            assert_close(other[name], value, 1e-3, name)


def test_a_network_without_goes_on_as_one_that_sees(data, tmp_path):
    """Fine-tuning: it begins as the very function that it was, whatever it is shown."""
    config = tiny_config(data, snapshot=48, snapshot_format="safetensors", batch=24)
    plain = train(run_of(config, tmp_path / "plain"))
    snapshot = tmp_path / "plain" / "network-snapshot-0000000.048-0.100.safetensors"
    tuned = dataclasses.replace(config, condition="lowres:4", init=str(snapshot))
    state = run_of(tuned, tmp_path / "tuned").state
    assert state.has_new_condition_input and not state.uninitialized and not plain.state.has_new_condition_input
    x, labels = torch.randn(4, 3, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    net = load_snapshot(snapshot).net.float()
    with torch.no_grad():
        expected = net(x, 1.0, labels)
        ours = state.net.eval()(x, 1.0, labels, cond_images=torch.randn(4, 3, 8, 8))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    state.net.train()
    state.step(torch.randint(0, 256, [24, 3, 8, 8], dtype=torch.uint8), torch.eye(3)[torch.arange(24) % 3])
    stem = state.net.get_parameter("unet.enc.8x8_conv.weight")[:, 4:]
    assert float(stem.detach().abs().max()) > 0  # and learns to look


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"condition": "lowres:3"}, "use lowres:2, lowres:4, lowres:8"),
        ({"condition": "inpaint", "vae": "somewhere/vae"}, "without --encode-on-the-fly"),
    ],
)
def test_data_that_does_not_fit_is_refused(options, word, data, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.run_data.make_encoder", lambda config, dataset: None)
    with pytest.raises(ConfigError, match=word):
        run_of(tiny_config(data, **options), tmp_path)


def test_latents_are_refused(tmp_path):
    latents = write_dataset(tmp_path / "latents.zip", channels=8)
    with pytest.raises(ConfigError, match="is for pixels, and this run trains on a data set of latents"):
        run_of(tiny_config(latents, condition="inpaint"), tmp_path)


@pytest.mark.parametrize(("condition", "cond"), [("lowres:4", True), ("inpaint", False)])
def test_grids_show_the_picture_that_was_seen_the_samples_and_the_original(condition, cond, data, tmp_path):
    samples = SamplesConfig(num=2, std=0.1, steps=3, batch=4)
    config = tiny_config(
        data, batch=1024, duration=1024, snapshot=1024, samples=samples, condition=condition, cond=cond
    )
    run = train(run_of(config, tmp_path))
    path = tmp_path / "samples-0000001.png"
    about = json.loads(PIL.Image.open(path).info["edm2"])
    assert (about["condition"], about["pictures"]) == (str(run.state.condition), ["input", "original"])
    num_rows, gap = len(about["classes"]), about["gap"]
    sheet = np.asarray(PIL.Image.open(path))
    assert sheet.shape[:2] == (gap + num_rows * (8 + gap), gap + 4 * (8 + gap))
    tiles = [
        [sheet[t : t + 8, x : x + 8] for x in range(gap, sheet.shape[1], 8 + gap)]
        for t in range(gap, len(sheet), 8 + gap)
    ]
    originals = {dataset_image(run, index).tobytes(): index for index in range(len(run.dataset))}
    for row, (chosen, (seen, *made, original)) in enumerate(zip(about["classes"], tiles, strict=True)):
        index = originals[original.tobytes()]
        assert chosen is None or int(run.dataset.get_label(index).argmax()) == chosen
        if condition == "lowres:4":
            means = original.reshape(2, 4, 2, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
            assert np.abs(seen - means).max() <= 0.5
        else:
            known = (seen != 128).any(2)
            assert 0.2 < known.mean() < 0.95 and np.array_equal(seen[known], original[known])
            for sample in made:
                assert np.array_equal(sample[known], original[known]), row
    grids = [Grid(nimg=nimg, path=path, about=about) for nimg in (1024, 2048)]
    assert report_pictures.strip_of(grids) is not None
    with pytest.raises(AssertionError):
        cells(path)  # which is for grids without


def dataset_image(run: TrainingRun, index: int) -> np.ndarray:
    return np.ascontiguousarray(run.dataset[index][0].transpose(1, 2, 0))


def test_metrics_measure_images_made_from_those_of_the_data_set(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    seen: list[Any] = []
    real = generate_images

    def noted(**options: Any) -> Any:
        seen.append(options["source"])
        return real(**options)

    monkeypatch.setattr("training.run.run_metrics.generate_images", noted)
    ref = data_reference(tmp_path)
    metrics = MetricsConfig(names=("fd_efflite0",), ref=str(ref), num=12, batch=8, steps=2)
    config = tiny_config(data, condition="inpaint", snapshot=48, metrics=metrics)
    (tmp_path / "run").mkdir()
    run = run_of(config, tmp_path / "run")
    stats = [event.stats for event in run if hasattr(event, "stats")]
    assert any("Metrics/fd_efflite0-0.050" in each for each in stats)
    assert {len(source) for source in seen} == {12} and all(source.read(0).hidden.any() for source in seen)


def data_reference(folder: Path) -> Path:
    """Statistics of random pictures."""
    from tests.helpers.stand_in_detector import images
    from training.metrics.evaluate import StatsPass
    from training.metrics.reference import save_stats

    detectors: dict[str, Any] = {"efflite0": StandInDetector()}
    work = StatsPass([images(40)], metrics=["fd_efflite0"], detectors=detectors, world=World())
    (stats,) = [step.stats for step in work]
    save_stats(stats, folder / "ref.safetensors")
    return folder / "ref.safetensors"


def test_networks_say_in_their_files_what_they_see(data, tmp_path):
    for condition in ("inpaint", None):
        config = tiny_config(data, condition=condition, snapshot=48, snapshot_format="both")
        train(run_of(config, tmp_path / str(condition)))
        for suffix in ("pkl", "safetensors"):
            found = load_snapshot(tmp_path / str(condition) / f"network-snapshot-0000000.048-0.100.{suffix}")
            assert found.info.get("condition") == (None if condition is None else "inpaint:0.1-0.5")
            assert found.net.cond_channels == (0 if condition is None else 4)
