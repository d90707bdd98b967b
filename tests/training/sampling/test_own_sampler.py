"""Samplers of the user's own through the command lines."""

import json
from pathlib import Path

import numpy as np
import pytest

import calculate_metrics
import dnnlib.cli
import generate_images
import sweep
import training.metrics.detectors
from tests.helpers.own_parts import in_folder_of_examples
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.stand_in_detector import StandInDetector
from training.images.png_files import read_png
from training.metrics import available

SNAPSHOTS = GOLDEN_DIR / "snapshots"
NET = f"--net={SNAPSHOTS / 'rgb-cond.pkl'}"
GUIDE = f"--gnet={SNAPSHOTS / 'rgb-cond-guide.pkl'}"

OWN = """
from training.sampling.sampler import edm_sampler


def same(net, noise, labels=None, gnet=None, randn_like=None, **keywords):
    return edm_sampler(net, noise, labels, gnet, randn_like=randn_like, **keywords)


def zeros(net, noise, labels, gnet, randn_like, *, value=0.0):
    assert gnet is None or noise.shape == gnet(noise, 1.0, labels).shape
    return noise * 0 + value
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "own_sampler_of_test.py").write_text(OWN)
    with in_folder_of_examples(tmp_path):
        yield tmp_path


def command(script, *args: str) -> int:
    try:
        dnnlib.cli.main(script.cmdline, [*args, "--device=cpu"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def images(outdir: str) -> list[np.ndarray]:
    return [read_png(path) for path in sorted(Path(outdir).glob("*.png"))]


def test_our_sampler_by_name_gives_the_same_images():
    options = [NET, GUIDE, "--guidance=1.5", "--steps=3", "--S_churn=5", "--seeds=0-3"]
    assert command(generate_images, *options, "--outdir=ours") == 0
    assert command(generate_images, *options, "--outdir=own", "--sampler=own_sampler_of_test:same") == 0
    assert len(images("own")) == 4
    assert all(np.array_equal(a, b) for a, b in zip(images("ours"), images("own"), strict=True))


def test_an_image_of_an_own_sampler_depends_on_its_seed_alone_and_is_recorded():
    options = [NET, "--sampler=ancestral:sample", "--steps=4", "--seeds=0-4"]
    assert command(generate_images, *options, "--outdir=one", "--batch=5") == 0
    assert command(generate_images, *options, "--outdir=two", "--batch=2") == 0
    assert all(np.array_equal(a, b) for a, b in zip(images("one"), images("two"), strict=True))
    assert command(generate_images, *options, "--outdir=one", "--skip-existing") == 0
    assert command(generate_images, *options, "--outdir=one", "--skip-existing", "--sampler-args=sigma_max=40") == 2


def test_arguments_reach_the_sampler_and_a_guide_too():
    options = [NET, GUIDE, "--sampler=own_sampler_of_test:zeros", "--seeds=0"]
    assert command(generate_images, *options, "--sampler-args=value=0.5", "--outdir=out") == 0
    assert np.unique(images("out")[0]).tolist() == [191]


def test_metrics_and_sweeps_sample_with_it(monkeypatch, folder):
    for module in (training.metrics.detectors, available):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    (folder / "ours").mkdir()
    assert command(generate_images, NET, "--steps=2", "--seeds=0-9", "--outdir=ours") == 0
    assert (
        command(calculate_metrics, "ref", "--data=ours", "--dest=ref.safetensors", "--metrics=fid", "--workers=0") == 0
    )
    measure = ["--ref=ref.safetensors", "--metrics=fid", "--num=6", "--sampler=ancestral:sample", "--steps=2"]
    assert command(calculate_metrics, "gen", NET, *measure, "--json=gen.json") == 0
    sampler = json.loads(Path("gen.json").read_text())["sampler"]
    assert sampler["sampler"] == "ancestral:sample" and sampler["num_steps"] == 2
    swept = [f"--indir={SNAPSHOTS / 'run'}", "--outstd=0.07", *measure]
    assert command(sweep, *swept, "--json=sweep.json") == 0
    assert command(sweep, *swept, "--json=sweep.json", "--sampler=own_sampler_of_test:same") == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("own:nothing", "", "has no class or function 'nothing'"),
        ("own:s", "def s(net, noise, labels, gnet): return noise", "has no parameter randn_like"),
        ("own:s", "def s(model, noise, labels, gnet, randn_like): return noise", "has no parameter net"),
        ("own:s", "def s(net, noise, labels, gnet, randn_like): return noise", "has no parameter num_steps"),
        ("own:s", "def s(net, noise, more, **others): return noise", "missing 1 required positional argument: 'more'"),
        ("own:s", "def s(net, noise, **others): return noise[:, :1]", "returns the shape [2, 1, 8, 8]"),
        ("own:s", "def s(net, noise, **others): return noise.int()", "returns torch.int32"),
        ("own:s", "def s(net, noise, **others): return [noise]", "returns a list, not a tensor"),
        ("own:s", "def s(net, noise, **others): raise ValueError('no sigma')", "raises ValueError: no sigma"),
    ],
)
def test_a_sampler_that_does_not_fit_ends_in_one_line(name, text, expected, folder, capsys):
    module = f"wrong_sampler_{abs(hash(text))}"
    (folder / f"{module}.py").write_text(text)
    name = name.replace("own:", f"{module}:")
    assert command(generate_images, NET, "--steps=2", "--outdir=out", f"--sampler={name}") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and f"--sampler={name}" in lines[0], lines
    assert not Path("out").exists()


def test_arguments_without_a_sampler_are_refused(capsys):
    assert command(generate_images, NET, "--sampler-args=c=1", "--outdir=out") == 2
    assert "--sampler-args needs --sampler" in capsys.readouterr().err
