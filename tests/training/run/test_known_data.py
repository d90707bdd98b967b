"""A run continues on its own data only, and begins again with other options if it has nothing to continue from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import write_dataset
from tests.helpers.train_command import SHORT, TINY, run
from torch_utils.checkpoints.checkpoint import load_checkpoint
from training.run import loggers

PUBLISHED_OPTIONS = {
    "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "path": "d.zip", "use_labels": True},
    "encoder_kwargs": {"class_name": "training.encoders.StandardRGBEncoder"},
    "total_nimg": 32,
    "batch_size": 8,
    "network_kwargs": {"class_name": "training.networks_edm2.Precond", "model_channels": 4, "use_fp16": True},
    "loss_kwargs": {"class_name": "training.training_loop.EDM2Loss", "P_mean": -0.8, "P_std": 1.6},
    "lr_kwargs": {"func_name": "training.training_loop.learning_rate_schedule", "ref_lr": 0.01, "ref_batches": 35e3},
    "seed": 0,
}


def test_a_whole_checkpoint_that_a_kill_left_without_its_name_is_continued(tmp_path: Path, capsys: Any) -> None:
    data = write_dataset(tmp_path / "data.zip", num=8)
    args = [*TINY, "--batch=8", f"--data={data}", f"--outdir={tmp_path / 'run'}"]
    assert run(*args, "--duration=16") == 0
    state = tmp_path / "run" / "training-state-0000000.016.pt"
    whole, half = (state.with_name(f".{state.name}.{digit * 12}.tmp") for digit in "ab")
    half.write_bytes(state.read_bytes()[:-100])
    state.rename(whole)
    capsys.readouterr()
    assert run(*args, "--duration=24") == 0
    text = capsys.readouterr().out
    assert f"{state.name} was complete when a process was killed" in text and f"Continuing from {state}" in text
    assert not whole.exists() and not half.exists()


@pytest.mark.parametrize("kind", ["zip", "folder", "streamed"])
def test_other_data_under_the_same_name_is_refused_by_name(kind: str, tmp_path: Path, capsys: Any) -> None:
    def place(**details: Any) -> None:
        write_dataset(tmp_path / "new.zip", **details)
        if kind == "folder":
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
            shutil.unpack_archive(tmp_path / "new.zip", tmp_path / "data")
        else:
            (tmp_path / "new.zip").replace(tmp_path / "data.zip")

    place(num=16)
    data = {"zip": tmp_path / "data.zip", "folder": tmp_path / "data", "streamed": (tmp_path / "data.zip").as_uri()}[
        kind
    ]
    args = [*TINY, "--batch=8", f"--outdir={tmp_path / 'run'}", f"--data={data}", f"--data-cache={tmp_path / 'cache'}"]
    assert run(*args, "--duration=16") == 0
    capsys.readouterr()
    assert run(*args, "--duration=24") == 0
    capsys.readouterr()
    place(num=24)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(*args, "--duration=32") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "number of images: 16 in the run, 24 now" in error and "--allow-changes" in error
    assert run(*args, "--duration=32", "--dry-run") == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(*args, "--duration=32", "--allow-changes") == 0
    assert run(*args, "--duration=40") == 0


def test_other_pixels_or_labels_are_told_apart_and_older_runs_get_a_note(tmp_path: Path, capsys: Any) -> None:
    write_dataset(tmp_path / "data.zip", num=8)
    args = [*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={tmp_path / 'data.zip'}"]
    assert run(*args) == 0
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    for key, words in (("content of the images", "other content of the images"), ("labels", "other labels")):
        (tmp_path / "run" / "data.json").write_text(json.dumps({**facts, key: "0"}))
        capsys.readouterr()
        assert run(*args, "--duration=40") == 2
        assert words in capsys.readouterr().err
    (tmp_path / "run" / "data.json").unlink()
    assert run(*args, "--duration=40") == 0
    assert "does not tell which data its run has seen" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == facts


def test_a_start_that_fails_leaves_nothing_in_the_way(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    data = write_dataset(tmp_path / "data.zip", num=8)
    args = [*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}"]
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # an earlier test's settings
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run(*args, "--log=wandb") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "WANDB_MODE=offline" in error and ".;" not in error
    assert not (tmp_path / "run").exists()

    monkeypatch.setattr(loggers.RunLoggers, "begin", lambda self, nimg: 1 / 0)  # after the options were written
    with pytest.raises(ZeroDivisionError):
        run(*args)
    assert (tmp_path / "run" / "training_options.json").exists()
    monkeypatch.undo()
    assert run(*args, "--lr=0.02") == 0
    assert run(*args) == 2  # it has seen images now
    assert "lr: 0.02 in the run" in capsys.readouterr().err


def test_a_published_run_is_continued_and_its_code_could_continue_ours(tmp_path: Path, capsys: Any) -> None:
    data = write_dataset(tmp_path / "data.zip", num=8)
    args = [*TINY, "--batch=8", f"--data={data}"]
    assert run(*args, "--duration=16", f"--outdir={tmp_path / 'ours'}") == 0
    ours = load_checkpoint(tmp_path / "ours" / "training-state-0000000.016.pt")
    five = {key: ours[key] for key in ("state", "net", "optimizer", "loss_fn", "ema")}
    init = {"P_mean": -0.8, "P_std": 1.6}
    assert five["loss_fn"] == {**init, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": init}
    (tmp_path / "run").mkdir()
    torch.save(five, tmp_path / "run" / "training-state-0000000.pt")
    (tmp_path / "run" / "training_options.json").write_text(json.dumps(PUBLISHED_OPTIONS))
    capsys.readouterr()
    assert run(*args, "--duration=24", f"--outdir={tmp_path / 'run'}") == 0
    text = capsys.readouterr().out
    assert text.count("is of the published code") == 1 and "at 0.016 kimg" in text and "for 1 iterations" in text
    assert json.loads((tmp_path / "run" / "training_options-published.json").read_text()) == PUBLISHED_OPTIONS
    assert run(*args, "--duration=24", "--lr=0.5", f"--outdir={tmp_path / 'run'}") == 2
