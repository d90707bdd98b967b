"""Sample grids during training: the snapshot's images, the same seeds each time, no trace in what is learned."""

import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dnnlib.cli
import train_edm2 as script
from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.sample_grid import cells
from tests.helpers.tiny import assert_same_state, global_random_states, tiny_config, train, write_dataset
from torch_utils.distributed import World
from training import encoders
from training.config import SamplesConfig, TrainingConfig
from training.fast.prepare import PrepareNetwork
from training.run import run_samples
from training.run.run_folder import RunFolder
from training.run.run_samples import check_samples, grid_rows, preferred_std, with_class_numbers
from training.sampling.generation import generate_images
from training.snapshot import load_snapshot
from training.training_loop import Notice, Sampled, TrainingRun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def sampled(data: Path, **changes: Any) -> TrainingConfig:
    samples = SamplesConfig(num=2, std=0.1, steps=3, batch=4)
    defaults: dict[str, Any] = {"batch": 512, "duration": 2048, "snapshot": 1024, "snapshot_format": "safetensors"}
    return tiny_config(data, **{**defaults, "samples": samples, **changes})


def make_run(config: TrainingConfig, folder: Path) -> TrainingRun:
    return TrainingRun(config, RunFolder(folder), world=World())


def test_the_result_and_the_random_state_are_bitwise_those_of_a_run_without(data, tmp_path, monkeypatch):
    decode = encoders.StandardRGBEncoder.decode

    def drawing(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch.rand(3), np.random.rand(3), random.random()  # as a library's decoder may
        return decode(self, x)

    monkeypatch.setattr(encoders.StandardRGBEncoder, "decode", drawing)
    ends = []
    for name in ("with", "without"):
        config = sampled(data, dropout=0.2, xflip=True)
        config = config if name == "with" else dataclasses.replace(config, samples=None)
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        run = train(make_run(config, tmp_path / name))
        ends.append({"state": run.state.state_dict(), **global_random_states()})
        assert len(list((tmp_path / name).glob("samples-*.png"))) == (2 if name == "with" else 0)
    assert_same_state(*ends)
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("with", "without")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for pair in zip(*files, strict=True):
        assert_same_state(*(dict(load_snapshot(path).net.state_dict()) for path in pair))


def test_a_grid_shows_what_its_snapshot_gives_for_the_seeds_in_its_record(data, tmp_path):
    run = make_run(sampled(data), tmp_path / "run")
    run.folder.path.mkdir()
    events = [event for event in run if isinstance(event, Sampled)]
    assert [event.nimg for event in events] == [1024, 2048]
    records = []
    for event in events:
        snapshot = load_snapshot(tmp_path / "run" / f"network-snapshot-{event.nimg // 1000:07d}-0.100.safetensors")
        found, about = cells(event.path)
        assert event.path.name == f"samples-{event.nimg // 1000:07d}.png"
        assert (about["nimg"], about["ema_std"], about["classes"]) == (event.nimg, 0.1, [0, 1, 2])
        for row, (label, seeds) in enumerate(zip(about["classes"], about["seeds"], strict=True)):
            options = {"class_idx": label, "num_steps": about["steps"], "prepare": PrepareNetwork()}
            (batch,) = generate_images(snapshot.net, seeds=seeds, **options)
            np.testing.assert_array_equal(found[row], batch.images.permute(0, 2, 3, 1).numpy())
        records.append({**about, "nimg": 0})
    assert records[0] == records[1]
    assert len({seed for seeds in records[0]["seeds"] for seed in seeds}) == 6


def test_the_rows_are_the_chosen_classes_and_do_not_depend_on_the_batch(data, tmp_path):
    grids = []
    for batch in (1, 5):
        samples = SamplesConfig(num=3, classes=(2, 0), std=0.05, steps=2, batch=batch)
        folder = tmp_path / f"{batch}"
        train(make_run(sampled(data, samples=samples, duration=1024), folder))
        grids.append(cells(folder / "samples-0000001.png"))
    np.testing.assert_allclose(grids[0][0].astype(int), grids[1][0].astype(int), atol=1)  # sums in another order
    assert grids[0][1] == grids[1][1]
    assert (grids[0][1]["classes"], grids[0][1]["ema_std"]) == ([2, 0], 0.05)


def test_an_unconditional_network_and_grey_images_have_grids_too(tmp_path):
    grey = write_dataset(tmp_path / "grey.zip", channels=1, labels=False)
    train(make_run(sampled(grey, cond=False, duration=1024), tmp_path / "run"))
    found, about = cells(tmp_path / "run" / "samples-0000001.png")
    assert found.shape == (2, 2, 8, 8, 1) and about["classes"] == [None, None]


def test_many_classes_are_shown_by_ten_spread_evenly():
    rows = grid_rows(SamplesConfig(num=4), 1000)
    assert rows[0] == 0 and rows[-1] == 999 and len(rows) == 10
    assert {b - a for a, b in pairwise(rows)} == {111}
    assert grid_rows(SamplesConfig(num=4), 3) == [0, 1, 2]


def test_the_length_that_a_preset_prefers_is_the_tracked_one_next_to_its_best():
    assert preferred_std("edm2-img512-xs", (0.05, 0.1)) == 0.1  # best FID at 0.135
    assert preferred_std("edm2-img512-xxl", (0.05, 0.1)) == 0.05  # at 0.070
    assert preferred_std("fashion", (0.05, 0.1)) == 0.1
    assert preferred_std("edm2-img64-xs", (0.05, 0.1)) == 0.05  # none is known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num": 0}, "--samples=0"),
        ({"num": 65}, "from 1 to 64"),
        ({"steps": 1}, "--samples-steps=1"),
        ({"batch": 0}, "--samples-batch=0"),
        ({"classes": ()}, "--samples-classes"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        SamplesConfig(**{"num": 2, **changes})


def test_grids_that_cannot_be_are_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--samples-std=0.2 is not a tracked length; choose from 0.050, 0.100"):
        sampled(data, samples=SamplesConfig(num=2, std=0.2))
    with pytest.raises(ConfigError, match="--snapshot=0"):
        sampled(data, snapshot=0)
    config = sampled(data)
    rgb = SimpleNamespace(num_channels=3, holds_latents=False, label_dim=3)
    chosen = dataclasses.replace(config, samples=SamplesConfig(num=2, classes=(1, 3)))
    with pytest.raises(ConfigError, match="--samples-classes has 3; the classes are 0 to 2"):
        check_samples(chosen, rgb)
    named = SimpleNamespace(label_dim=3, class_names=["cat", "dog", "emu"])
    chosen = dataclasses.replace(config, samples=SamplesConfig(num=2, classes=(2, "dog")))
    assert with_class_numbers(chosen, named).samples.classes == (2, 1)
    with pytest.raises(ConfigError, match="'dgo' is not a class; the network knows 3, such as dog"):
        with_class_numbers(dataclasses.replace(config, samples=SamplesConfig(num=2, classes=("dgo",))), named)
    with pytest.raises(ConfigError, match=r"'dog' is not a class: --data=\S+ has no names; give a number below 3"):
        with_class_numbers(chosen, SimpleNamespace(label_dim=3, class_names=None))
    with pytest.raises(ConfigError, match="unconditional"):
        check_samples(dataclasses.replace(chosen, cond=False), rgb)

    def no_vae(name: str) -> Any:
        raise ConfigError(f"VAE {name!r} cannot be loaded")

    monkeypatch.setattr(encoders, "_load_vae", no_vae)
    latents = write_dataset(tmp_path / "latents.zip", channels=8)
    with pytest.raises(ConfigError, match=r"cannot be loaded; --samples decodes latents with it"):
        make_run(dataclasses.replace(config, data=str(latents)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_grid_that_cannot_be_written_does_not_end_the_run(data, tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("samples-0000001.png cannot be written: No space left on device")

    monkeypatch.setattr(run_samples, "write_sheet", full)
    run = make_run(sampled(data), tmp_path / "run")
    run.folder.path.mkdir()
    texts = [event.text for event in run if isinstance(event, Notice)]
    assert len(texts) == 2 and texts[0].endswith("No space left on device; continuing without this sample grid.")
    assert run.state.nimg == 2048


class HalfSizeVAE(torch.nn.Module):
    """Stands in for a VAE: latents of 4 channels become RGB pixels of twice the size."""

    def decode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": torch.nn.functional.interpolate(x[:, :3], scale_factor=2).sigmoid()}


def test_latents_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_load_vae", lambda name: HalfSizeVAE())
    latents = write_dataset(tmp_path / "latents.zip", channels=8)
    train(make_run(sampled(latents, duration=1024), tmp_path / "run"))
    assert cells(tmp_path / "run" / "samples-0000001.png")[0].shape == (3, 2, 16, 16, 3)


TINY = ["--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"]


def test_the_command_draws_them_and_a_run_may_go_on_without(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--batch=512", "--snapshot=1Ki", "--status=0", "--checkpoint=1Ki", f"--data={data}"]
    args = [*args, f"--outdir={out}"]
    with pytest.raises(SystemExit, match="2"):
        dnnlib.cli.main(script.train_edm2, [*args, "--duration=1Ki", "--samples-std=0.05"])
    assert capsys.readouterr().err == "Error: --samples-std needs --samples, e.g. --samples=8\n"
    assert not out.exists()
    more = ["--samples=2", "--samples-classes=1,2", "--samples-steps=2"]
    script.train_edm2.main([*args, *more, "--duration=1Ki"], standalone_mode=False)
    assert "Drew samples-0000001.png" in capsys.readouterr().out
    options = json.loads((out / "training_options.json").read_text())["samples"]
    assert options == {"num": 2, "classes": [1, 2], "std": 0.05, "steps": 2, "batch": 32}
    script.train_edm2.main([*args, "--duration=2Ki", "--samples=0"], standalone_mode=False)
    assert [path.name for path in out.glob("samples-*.png")] == ["samples-0000001.png"]
    sessions = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]
    assert [(session["nimg"], session["processes"], session["device"]) for session in sessions] == [
        (0, 1, "cpu"),
        (1024, 1, "cpu"),
    ]


@pytest.mark.slow
def test_one_and_two_processes_draw_the_same(data, tmp_path):
    found = []
    for ranks in (1, 2):
        args = ["--batch=512", "--duration=1Ki", "--snapshot=1Ki", "--checkpoint=0", "--status=0", f"--data={data}"]
        args += ["--samples=3", "--samples-steps=2", "--samples-batch=2", f"--outdir={tmp_path / str(ranks)}"]
        run_ranks("train_edm2.py", *TINY, *args, num=ranks)
        found.append(cells(tmp_path / str(ranks) / "samples-0000001.png"))
    assert found[0][1] == found[1][1]
    np.testing.assert_allclose(found[0][0].astype(int), found[1][0].astype(int), atol=1)
