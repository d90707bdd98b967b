"""Losses of the user's own through train_edm2.py."""

import json
from pathlib import Path

import pytest

from tests.helpers.own_parts import in_folder_of_examples, saved_tensors
from tests.helpers.tiny import assert_same_state, write_dataset
from tests.helpers.train_command import SHORT, run
from training.snapshot import load_snapshot

FILES = ["--data=data.zip", "--snapshot=16", "--checkpoint=16", "--format=safetensors"]

OWN = """
import torch
from training.loss import EDM2Loss


class Same(EDM2Loss):
    pass


class Noisy(EDM2Loss):
    def __call__(self, net, images, labels=None, **draws):
        return super().__call__(net, images, labels, **draws) * (1 + 0.1 * torch.rand(len(images), 1, 1, 1))


class Plain:
    def __init__(self, power=2.0):
        self.power = power

    def __call__(self, net, images, labels, rnd_normal, unit_noise):
        sigma = rnd_normal.exp()
        return (net(images + unit_noise * sigma, sigma, labels) - images).abs() ** self.power
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "own_loss_of_test.py").write_text(OWN)
    write_dataset(tmp_path / "data.zip")
    with in_folder_of_examples(tmp_path):
        yield tmp_path


def test_a_subclass_of_ours_that_changes_nothing_trains_the_same_network():
    for outdir, *args in (("ours",), ("same", "--loss=own_loss_of_test:Same")):
        assert run(f"--outdir={outdir}", *SHORT, *FILES, "--P_mean=-0.8", "--batch-gpu=4", *args) == 0
    assert_same_state(saved_tensors("ours"), saved_tensors("same"))


@pytest.mark.parametrize("args", [["--loss=own_loss_of_test:Noisy"], ["--loss=huber:PseudoHuber", "--loss-args=c=0.1"],
                                  ["--loss=own_loss_of_test:Plain", "--loss-args=power=1.5"]])  # fmt: skip
def test_a_run_with_an_own_loss_continues_to_the_bit(args):
    for outdir, *more in (("whole",), ("parts", "--slice=16"), ("parts",)):
        assert run(f"--outdir={outdir}", *SHORT, *FILES, *args, *more) == 0
    assert_same_state(saved_tensors("whole"), saved_tensors("parts"))
    snapshot = load_snapshot("whole/network-snapshot-0000000.032-0.050.safetensors")
    assert snapshot.loss_fn is None and f"--loss={snapshot.info['loss']['class']}" == args[0]


def test_a_run_does_not_continue_with_another_loss(capsys):
    assert run("--outdir=run", *SHORT, *FILES, "--loss=huber:PseudoHuber", "--slice=16") == 0
    assert run("--outdir=run", *SHORT, *FILES, "--loss=huber:PseudoHuber", "--loss-args=c=0.2") == 2
    assert "loss_args" in capsys.readouterr().err
    assert json.loads(Path("run/training_options.json").read_text())["loss_class"] == "huber:PseudoHuber"


WRONG = {
    "no arguments for the draws": ("def __call__(self, net, images, labels)", "return images", "rnd_normal"),
    "a value per image": ("", "return (net(images, 1.0) ** 2).mean((1, 2, 3))", "the shape [2], not a value per elem"),
    "a mean": ("", "return net(images, 1.0).mean()", "the shape [], not a value per element"),
    "another type": ("", "return net(images, 1.0).double()", "torch.float64, not torch.float32"),
    "without gradients": ("", "return images", "a result without gradients"),
    "a number": ("", "return 1.0", "a float, not a tensor"),
    "raises": ("", "raise KeyError('mask')", "raises KeyError: 'mask'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_loss_that_does_not_fit_ends_in_one_line(case, folder, capsys):
    signature, body, expected = WRONG[case]
    signature = signature or "def __call__(self, net, images, labels=None, **draws)"
    (folder / "wrong_loss.py").write_text(f"class Loss:\n    {signature}:\n        {body}\n")
    assert run("--outdir=run", *SHORT, *FILES, "--loss=wrong_loss:Loss") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and "--loss=wrong_loss:Loss" in lines[0], lines
    assert not Path("run").exists()
