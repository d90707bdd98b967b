"""Text for people: the nearest choice for one that does not exist, in every script and every name from Python."""

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import calculate_metrics
import convert_snapshot
import count_flops
import dataset_tool
import explore
import generate_images
import reconstruct_phema
import toy_example
import train_edm2
from dnnlib.cli import main
from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean, format_kimg
from training.condition.spec import parse_condition
from training.config import NetworkConfig
from training.conversion.image_source import choose_split
from training.metrics.detectors import make_detector
from training.metrics.detectors.dinov2 import DINOv2Detector
from training.sampling.networks import DecoderOptions

NET = ["--net=none.pkl", "--outdir=out"]
MISTYPED: list[tuple[click.Command, list[str], str]] = [
    (train_edm2.train_edm2, ["--outdir=out", "--preset=edm2-img512-xx"], "edm2-img512-xxs"),
    (train_edm2.train_edm2, ["--outdir=out", "--log=tensorbord"], "tensorboard"),
    (train_edm2.train_edm2, ["--outdir=out", "--precision=Fp-16"], "fp16"),
    (train_edm2.train_edm2, ["--outdir=out", "--preset=fashion", "--condition=lowrez:4"], "lowres"),
    (train_edm2.train_edm2, ["--outdir=out", "--preset=fashion", "--metrics=fd_eflite0"], "fd_efflite0"),
    (train_edm2.train_edm2, ["--outdir=out", "--on-nonfinite=continu"], "continue"),
    (generate_images.cmdline, [*NET, "--solver=huen"], "heun"),
    (generate_images.cmdline, [*NET, "--decoder-precision=fp-16"], "fp16"),
    (generate_images.cmdline, ["--preset=edm2-img512-s-fdi", "--outdir=out"], "edm2-img512-s-fid"),
    (generate_images.cmdline, [*NET, "--solver=dpmpp3m"], "dpmpp2m"),
    (explore.cmdline, ["--precision=fp23"], "fp32"),
    (count_flops.cmdline, ["edm2-img512-xxxl"], "edm2-img512-xxl"),
    (count_flops.cmdline, ["fashon"], "fashion"),
    (count_flops.cmdline, ["--preset=fashoin"], "fashion"),
    (calculate_metrics.cmdline, ["calk"], "calc"),
    (dataset_tool.cmdline, ["convrt"], "convert"),
    (dataset_tool.cmdline, ["convert", "--source=none", "--dest=out", "--transform=centre-crop"], "center-crop"),
    (convert_snapshot.cmdline, ["a.pkl", "--outdir=b", "--to=safetensor"], "safetensors"),
    (reconstruct_phema.cmdline, ["--indir=none", "--format=pickl"], "pkl"),
    (toy_example.cmdline, ["plto"], "plot"),
]


@pytest.mark.parametrize(("command", "args", "meant"), MISTYPED, ids=[f"{c.name} {a[-1]}" for c, a, _ in MISTYPED])
def test_a_script_answers_a_mistyped_choice_with_the_nearest(command, args, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(command, args)
    error = capsys.readouterr().err
    asked = (error.lower().partition("did you mean ")[2] or error.partition("such as ")[2]).lstrip("'")
    assert end.value.code == 2 and error.count("\n") == 1
    assert asked.startswith(meant) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: make_detector("dinov3", "cpu"), "dinov2"),
        (lambda: DINOv2Detector(resize_mode="troch"), "torch"),
        (lambda: DecoderOptions(precision="TF-32"), "tf32"),
        (lambda: NetworkConfig(precision="bf-16"), "bf16"),
        (lambda: parse_condition("inpant:0.1-0.5"), "inpaint"),
        (lambda: choose_split(Path("data"), ["train", "validation"], "valid"), "validation"),
    ],
)
def test_names_from_python_too(call: Callable[[], object], meant: str) -> None:
    with pytest.raises(ConfigError, match=f"; did you mean {meant}\\?$"):
        call()


def test_nothing_is_proposed_for_what_resembles_no_choice():
    assert did_you_mean("xyz", ["heun", "euler"]) == ""
    assert "Did you mean" not in CliRunner().invoke(dataset_tool.cmdline, ["xyz"]).output


@pytest.mark.parametrize(
    ("nimg", "text"),
    [(0, "0.0"), (64, "0.064"), (128, "0.128"), (1024, "1.024"), (5000, "5.0"), (9999, "9.999"), (8_388_608, "8388.6")],
)
def test_small_numbers_of_images_are_told_apart(nimg, text):
    assert format_kimg(nimg) == text
