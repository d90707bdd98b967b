"""Labels that are left out now and then in training, and what becomes of a network that learned so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import tiny_config, write_labels
from tests.helpers.train_command import SHORT, run
from tests.helpers.training_step import RGB, batch_of, make_state, wake
from torch_utils.distributed import World
from training.run.batch_inputs import drop_labels
from training.run.run_folder import RunFolder
from training.run.streams import NoiseStream
from training.sharing.model_card import CardFacts, model_card
from training.snapshot import Snapshot, load_snapshot, save_snapshot
from training.training_loop import TrainingRun

CPU = torch.device("cpu")


def test_labels_are_zeroed_with_the_probability_as_whole_rows():
    labels = torch.eye(5).repeat(4000, 1)
    shown = drop_labels(labels, NoiseStream(0, CPU), 0, 0.3)
    zeroed = (shown == 0).all(dim=1)
    assert torch.equal(shown[~zeroed], labels[~zeroed])
    assert zeroed.float().mean().item() == pytest.approx(0.3, abs=0.015)  # more than four deviations
    assert zeroed.reshape(-1, 5).float().mean(dim=0).tolist() == pytest.approx([0.3] * 5, abs=0.03)
    assert torch.equal(labels, torch.eye(5).repeat(4000, 1))  # the caller's own are left alone


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 2, 8, 1)])
def test_whether_a_label_is_left_out_depends_on_the_position_and_seed_alone(sizes: tuple[int, ...]):
    labels = torch.ones(len(sizes) * 5 * 8, 3)
    expected = drop_labels(labels, NoiseStream(7, CPU), 0, 0.5)
    start, parts = 0, []
    for size in sizes:  # numbers of processes, five batches of 8 each
        for _ in range(5):
            share = 8 // size
            for rank in range(size):
                begin = start + rank * share
                parts.append(drop_labels(labels[begin : begin + share], NoiseStream(7, CPU), begin, 0.5))
            start += 8
    assert torch.equal(torch.cat(parts), expected)
    assert not torch.equal(drop_labels(labels, NoiseStream(8, CPU), 0, 0.5), expected)


def test_a_step_learns_from_the_labels_that_are_left():
    config = tiny_config(Path("data"), label_dropout=0.5, batch=8)
    images, labels = batch_of(RGB)
    wanted = drop_labels(labels, NoiseStream(config.seed, CPU), 0, 0.5)
    assert 0 < (wanted.sum(dim=1) == 0).sum() < 8
    found = []
    for given, probability, per_round in (
        (labels, 0.5, None),
        (labels, 0.5, 2),
        (wanted, 0.0, None),
        (labels, 0, None),
    ):
        state = make_state(dataclasses.replace(config, label_dropout=probability, batch_gpu=per_round))
        wake(state.net)
        found.append(state.accumulate_gradients(images, given))
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[0], found[3])


def test_a_run_with_both_options_goes_on_bitwise(tmp_path: Path):
    data = write_labels(tmp_path / "data.zip", [0, 0, 0, 1])
    config = tiny_config(data, balance=True, label_dropout=0.5, xflip=True, checkpoint=8, duration=24, snapshot=24)
    whole = TrainingRun(dataclasses.replace(config, checkpoint=0, snapshot=0), RunFolder(tmp_path / "w"), world=World())
    for _ in whole:
        pass
    (tmp_path / "cut").mkdir()
    first = TrainingRun(config, RunFolder(tmp_path / "cut"), world=World())
    for event in first:
        if event.nimg == 16:
            break
    first.close()
    resumed = TrainingRun(config, RunFolder(tmp_path / "cut"), world=World())
    assert 0 < resumed.state.nimg < 24
    for _ in resumed:
        pass
    ends = [dict(r.state.net.named_parameters()) for r in (whole, resumed)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    snapshot = load_snapshot(next((tmp_path / "cut").glob("*-0.050.pkl")))
    assert snapshot.info == {"batch": 8, "seed": 0, "balance": True, "label_dropout": 0.5}


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_a_value_that_is_not_a_probability_is_refused(probability: float):
    with pytest.raises(ConfigError, match=r"--label-dropout=.* must be (in \[0, 1\)|a finite number)"):
        tiny_config(Path("data"), label_dropout=probability)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], ["--cond=False"], "--label-dropout=0.1 needs a conditional network; leave it or --cond=False out"),
        (None, [], "has no labels, which --label-dropout=0.1 needs"),
    ],
)
def test_without_labels_it_is_refused_in_one_line_with_nothing_written(labels, options, message, tmp_path, capsys):
    data = write_labels(tmp_path / "data.zip", labels)
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--label-dropout=0.1", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["pkl", "safetensors"])
def test_files_and_the_model_card_say_it(suffix: str, tmp_path: Path):
    state = make_state(tiny_config(Path("data"), label_dropout=0.1))
    info: dict[str, Any] = {"label_dropout": 0.1, "balance": True}
    save_snapshot(Snapshot(net=state.net.eval(), info=info), tmp_path / f"net.{suffix}")
    snapshot = load_snapshot(tmp_path / f"net.{suffix}")
    assert snapshot.info == info
    card = model_card(snapshot, "net", CardFacts())
    assert "a share of 0.1 of the images without labels" in card and "--gnet=self" in card
    assert "--gnet=self" not in model_card(dataclasses.replace(snapshot, info={}), "net", CardFacts())
