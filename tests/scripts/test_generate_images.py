"""The command line of generate_images.py: what it makes, and how it refuses."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import dnnlib.cli
import generate_images as script
from dnnlib.errors import ConfigError
from edm2.explorer import show
from edm2.explorer.grids import generate_film, generate_grid
from edm2.explorer.networks import Networks
from edm2.explorer.setting import Setting
from edm2.run_log import describe_run
from tests.helpers import train_command
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.ranks import run_ranks
from tests.helpers.report_run import page_of
from tests.helpers.tiny import tiny_config, write_dataset, write_labels
from torch_utils.distributed import World
from training.config import SamplesConfig
from training.presets import GENERATION, MODEL_ROOT, REPOSITORY_DIR
from training.run.run_folder import RunFolder
from training.sampling.schedule import HeunOptions
from training.sampling.solvers import SOLVERS
from training.snapshot import load_snapshot
from training.training_loop import TrainingRun

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"  # 16x16 pixels
GUIDE = GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl"
QUICK = ["--device=cpu", f"--net={NET}", "--steps=2"]


def run(*args: Any) -> int:
    try:
        dnnlib.cli.main(script.cmdline, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def succeed(*args: Any) -> None:
    script.cmdline.main([str(arg) for arg in args], standalone_mode=False)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def resolved(**options: Any) -> script.Request:
    """The request for these options, the others being left out."""
    parsed = script.cmdline.make_context("generate_images.py", ["--grid=sheet.png"]).params
    del parsed["device"], parsed["list_presets"]
    return script.resolve(**{**parsed, **options})


def test_files_of_the_default_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    succeed(*QUICK, "--outdir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{seed:06d}.png" for seed in range(16, 20)]
    assert "Wrote 4 images" in capsys.readouterr().out


def test_a_contact_sheet_has_the_images_in_the_order_of_the_seeds(tmp_path: Path):
    sheet, out = tmp_path / "new" / "sheet.png", tmp_path / "out"
    succeed(*QUICK, "--seeds=3,1,2", "--batch=2", f"--grid={sheet}", f"--outdir={out}", "--subdirs")
    image = pixels(sheet)
    assert image.shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    for index, seed in enumerate([3, 1, 2]):
        top, left = 2 + index // 2 * 18, 2 + index % 2 * 18
        assert np.array_equal(image[top : top + 16, left : left + 16], pixels(out / "000000" / f"{seed:06d}.png"))
    assert (image[20:, 20:] == 255).all()


def test_all_classes_make_a_row_each(tmp_path: Path):
    num_classes = 4
    sheet = tmp_path / "sheet.png"
    succeed(*QUICK, "--class=all", f"--seeds=0-{2 * num_classes - 1}", f"--grid={sheet}")
    image = pixels(sheet)
    assert image.shape == (num_classes * 18 + 2, 2 * 18 + 2, 3)
    for chosen in (0, num_classes - 1):
        out = tmp_path / str(chosen)
        succeed(*QUICK, f"--class={chosen}", f"--seeds={2 * chosen + 1}", f"--outdir={out}")
        alone = pixels(out / f"{2 * chosen + 1:06d}.png").astype(int)
        top = 2 + chosen * 18
        assert np.abs(image[top : top + 16, 20:36] - alone).max() <= 1


def test_guidance_changes_the_images_and_guidance_1_needs_no_guide(tmp_path: Path):
    succeed(*QUICK, "--seeds=1", f"--outdir={tmp_path / 'plain'}")
    succeed(*QUICK, "--seeds=1", f"--outdir={tmp_path / 'guided'}", f"--gnet={GUIDE}", "--guidance=2")
    succeed(*QUICK, "--seeds=1", f"--outdir={tmp_path / 'one'}", "--gnet=never-read.pkl", "--guidance=1")
    plain, guided, one = (pixels(tmp_path / name / "000001.png") for name in ("plain", "guided", "one"))
    assert not np.array_equal(plain, guided) and np.array_equal(plain, one)


def test_a_guide_without_a_strength_is_not_used_and_this_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    succeed(*QUICK, "--seeds=1", f"--grid={tmp_path / 'plain.png'}")
    assert "not used" not in capsys.readouterr().out
    succeed(*QUICK, "--seeds=1", f"--grid={tmp_path / 'unused.png'}", f"--gnet={GUIDE}")
    assert "the guide is not used" in capsys.readouterr().out
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "unused.png").read_bytes()


def test_a_preset_fills_in_what_is_left_open():
    request = resolved(preset="edm2-img512-xxl-guid-dino").sampling
    assert request.net == MODEL_ROOT + "edm2-img512-xxl-0939524-0.015.pkl"
    assert request.gnets == (MODEL_ROOT + "edm2-img512-xs-uncond-2147483-0.015.pkl",)
    assert (request.weight, request.sampler.guidance.interval, request.sampler.heun) == (1.7, None, HeunOptions())
    limited = resolved(preset="edm2-img512-xxl-guid-interval-dino").sampling
    assert (limited.net, limited.gnets) == (request.net, request.gnets)
    assert (limited.weight, limited.sampler.guidance.interval) == (2.9, (0.6, 5.0))


def test_an_explicit_option_wins_over_the_preset():
    guide = MODEL_ROOT + "edm2-img512-xs-uncond-2147483-0.015.pkl"
    request = resolved(preset="edm2-img512-xxl-guid-dino", net="a.pkl", guidance=3.0, num_steps=8).sampling
    assert (request.net, request.weight, request.gnets) == ("a.pkl", 3.0, (guide,))
    assert request.sampler.heun == HeunOptions(num_steps=8)
    assert resolved(preset="edm2-img512-xxl-guid-dino", gnet=("b.pkl",)).sampling.gnets == ("b.pkl",)
    assert resolved(preset="edm2-img512-xxl-guid-dino", guidance=1).sampling.gnets == ()
    moved = resolved(preset="edm2-img512-xxl-guid-interval-dino", interval=(1.0, 2.0)).sampling
    assert (moved.weight, moved.sampler.guidance.interval) == (2.9, (1.0, 2.0))


def test_guidance_in_an_interval_that_no_step_starts_in_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    succeed(*QUICK, "--seeds=1", f"--grid={tmp_path / 'plain.png'}")
    options = ["--gnet=never-read.pkl", "--guidance=2", "--interval=100,200"]
    succeed(*QUICK, "--seeds=1", f"--grid={tmp_path / 'none.png'}", *options)
    assert "No step starts at a noise level in (100, 200]" in capsys.readouterr().out
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "none.png").read_bytes()


def test_printed_bounds_are_the_papers_steps_and_the_command_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [f"--gnet={GUIDE}", "--guidance=2", "--seeds=1", "--steps=32"]
    succeed(f"--net={NET}", *options, "--interval=0.28,2.90", f"--grid={tmp_path / 'printed.png'}")
    assert "Guided: steps 15 to 21 of 0 to 31, which start at noise levels 2.902 to 0.4154." in capsys.readouterr().out
    succeed(f"--net={NET}", *options, "--interval=0.30,2.95", f"--grid={tmp_path / 'between.png'}")
    assert (tmp_path / "printed.png").read_bytes() == (tmp_path / "between.png").read_bytes()


def test_two_equal_guides_are_one_and_solvers_differ(tmp_path: Path):
    def sheet(name: str, *args: str) -> np.ndarray:
        succeed(*QUICK, "--seeds=1,2", f"--grid={tmp_path / name}.png", *args)
        return pixels(tmp_path / f"{name}.png").astype(int)

    one = sheet("one", f"--gnet={GUIDE}", "--guidance=2")
    two = sheet("two", f"--gnet={GUIDE}", f"--gnet={GUIDE}", "--gnet-shares=0.3,0.7", "--guidance=2")
    assert np.abs(one - two).max() <= 1
    assert not np.array_equal(one, sheet("limited", f"--gnet={GUIDE}", "--guidance=2", "--interval=0.1,1"))
    assert not np.array_equal(one, sheet("euler", f"--gnet={GUIDE}", "--guidance=2", "--solver=euler"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset=edm2-img512-s-guid-fidd"], "unknown generation preset"),
        (["--net=missing.pkl"], "missing.pkl"),
        ([f"--net={__file__}"], "test_generate_images.py"),
        ([f"--net={GOLDEN_DIR / 'numbers-that-are-no-network.json'}"], "no-network"),
        ([], "give --net=FILE or --preset=NAME"),
        ([f"--net={NET}", "--guidance=1.4"], "--guidance=1.4 needs a guiding network"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=nan"], "guidance=nan"),
        ([f"--net={NET}", "--interval=0.1,1"], "--interval=0.1,1 needs a guiding network"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=2", "--interval=1"], "'1' is not a list of 2 numbers"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=2", "--interval=2,1"], "interval 2,1"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=2", "--interval=nan,1"], "interval nan,1"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=2", "--gnet-shares=0.5,0.5"], "2 shares do not fit 1 guides"),
        ([f"--net={NET}", f"--gnet={GUIDE}", "--guidance=2", "--gnet-shares=0.9"], "share the weight as 0.9"),
        ([f"--net={NET}", "--solver=rk4"], "unknown solver 'rk4'"),
        ([f"--net={NET}", "--solver=dpmpp2m", "--S_churn=3"], "S_churn=3 is for solvers that add noise"),
        ([f"--net={NET}", "--seeds=10-5"], "10-5"),
        ([f"--net={NET}", "--seeds=a"], "'a'"),
        ([f"--net={NET}", "--seeds="], "neither a number nor a range"),
        ([f"--net={NET}", "--class=4"], "classes 0 to 3"),
        ([f"--net={NET}", "--class=-1"], "classes 0 to 3"),
        ([f"--net={NET}", "--class=cat"], "'cat' is not a class"),
        ([f"--net={NET}", "--class=all", "--seeds=0-5"], "6 seeds do not deal evenly over all 4 classes"),
        ([f"--net={NET}", "--batch=0"], "--batch"),
        ([f"--net={NET}", "--batch=-2"], "--batch"),
        ([f"--net={NET}", "--steps=0"], "0 sampling steps"),
        ([f"--net={NET}", "--steps=-1"], "-1 sampling steps"),
        ([f"--net={NET}", "--sigma_min=90"], "sigma_min=90"),
        ([f"--net={NET}", "--rho=0"], "rho=0"),
        ([f"--net={NET}", "--S_churn=-1"], "S_churn=-1"),
        ([f"--net={NET}", "--device=abacus"], "abacus"),
        ([f"--net={NET}", "--grid=sheet.jpg"], "ends in .png"),
        ([f"--net={NET}", "--no-such-option"], "no-such-option"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert run("--device=cpu", "--outdir=out", *args) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_somewhere_to_put_the_images(capsys: pytest.CaptureFixture[str]):
    assert run(*QUICK) == 2
    assert "give --outdir=DIR, --grid=FILE.png or both" in capsys.readouterr().err


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    (tmp_path / "sheet.png").mkdir()
    assert run(*QUICK, f"--outdir={tmp_path / 'file' / 'out'}") == 2
    assert run(*QUICK, f"--grid={tmp_path / 'file' / 'sheet.png'}") == 2
    assert run(*QUICK, f"--grid={tmp_path / 'sheet.png'}") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sheet.png"]


def test_one_step_works(tmp_path: Path):
    succeed("--device=cpu", f"--net={NET}", "--steps=1", "--seeds=0", f"--outdir={tmp_path}")
    assert (tmp_path / "000000.png").is_file()


def test_the_list_of_presets_has_their_scores(capsys: pytest.CaptureFixture[str]):
    assert run("--list-presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(GENERATION)
    assert "edm2-img512-s-autog-fid             guidance 2.10   fid 1.34" in lines


def test_the_help_names_the_solvers_that_there_are():
    (option,) = (param for param in script.cmdline.params if param.name == "solver")
    assert set(re.findall(r"\w+", option.help.partition("[")[0])) - {"or"} == set(SOLVERS)
    assert f"default: {resolved(net='a.pkl').sampling.sampler.solver}" in option.help


def test_the_published_options_and_names_are_here():
    options = {name for param in script.cmdline.params for name in param.opts}
    published = "preset net gnet outdir subdirs seeds class batch steps sigma_min sigma_max rho guidance"
    published += " S_churn S_min S_max S_noise"
    assert {f"--{name}" for name in published.split()} <= options
    parameters = list(inspect.signature(script.edm_sampler).parameters)
    assert parameters[:5] == ["net", "noise", "labels", "gnet", "num_steps"]
    expected = (
        "net gnet encoder outdir subdirs seeds class_idx max_batch_size encoder_batch_size verbose device sampler_fn"
    )
    assert list(inspect.signature(script.generate_images).parameters)[:12] == expected.split()
    assert script.parse_int_list("1,2,5-7") == [1, 2, 5, 6, 7]
    assert script.StackedRandomGenerator("cpu", [0]).randn([1, 2]).shape == (1, 2)


def launch(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY_DIR / "generate_images.py", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300)


def test_a_user_sees_one_line_and_exit_code_2(tmp_path: Path):
    done = launch(*QUICK, "--seeds=10-5", f"--outdir={tmp_path / 'out'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "runs backwards" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_make_what_one_makes(tmp_path: Path):
    args = [*QUICK, "--seeds=0-4", "--batch=2"]
    printed = run_ranks("generate_images.py", *args, f"--outdir={tmp_path / 'two'}", f"--grid={tmp_path / 'two.png'}")
    assert printed.count("Wrote 5 images") == 1
    succeed(*args, f"--outdir={tmp_path / 'one'}", f"--grid={tmp_path / 'one.png'}")
    pairs = [("two.png", "one.png")] + [(f"two/{seed:06d}.png", f"one/{seed:06d}.png") for seed in range(5)]
    for two, one in pairs:
        assert np.abs(pixels(tmp_path / two).astype(int) - pixels(tmp_path / one)).max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_networks_of_images_with_alpha_are_trained_and_sampled(tmp_path: Path, channels: int, capfd: Any):
    data, out = write_dataset(tmp_path / "data.zip", channels=channels), tmp_path / "run"
    quick = ["--status=0", "--snapshot=32", "--checkpoint=0", "--workers=0", "--samples=2", "--samples-steps=2"]
    assert train_command.run(*train_command.SHORT, *quick, f"--data={data}", f"--outdir={out}") == 0, (
        capfd.readouterr().err
    )
    grid = next(out.glob("samples-*.png"))
    assert pixels(grid).shape[2] == channels
    net = next(out.glob("network-snapshot-*-0.050.pkl"))
    sampled = ["--device=cpu", f"--net={net}", "--steps=2", "--seeds=0-1", f"--outdir={tmp_path / 'images'}"]
    succeed(*sampled, f"--grid={tmp_path / 'grid.png'}")
    assert pixels(tmp_path / "images" / "000000.png").shape == (8, 8, channels)
    whole = pixels(tmp_path / "grid.png")
    succeed(*sampled, "--skip-existing", f"--grid={tmp_path / 'grid.png'}")
    assert np.array_equal(pixels(tmp_path / "grid.png"), whole) and whole.shape[2] == channels
    text, _ = page_of(out)
    assert text.count("data:image/png") >= 1


def test_the_fastest_precision_is_named_and_noted_in_the_files(tmp_path: Path, monkeypatch: Any, capsys: Any):
    for has_bf16, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda v=has_bf16: v, raising=False)
        out = tmp_path / name
        run("--net=models/fashion-guide.safetensors", "--steps=2", "--seeds=0", f"--outdir={out}", "--precision=auto")
        assert f"--precision=auto: {name}" in capsys.readouterr().out
        run("--net=models/fashion-guide.safetensors", "--steps=2", "--seeds=0", f"--outdir={out}-given",
            f"--precision={name}")  # fmt: skip
        assert (out / "000000.png").read_bytes() == (tmp_path / f"{name}-given" / "000000.png").read_bytes()


def test_classes_have_the_names_of_the_data_set_from_training_to_images(tmp_path: Path, capsys):
    data = write_labels(tmp_path / "data.zip", ["dog", "cat", "emu"])
    run_folder = tmp_path / "run"
    config = tiny_config(
        data, duration=1024, batch=512, snapshot=1024, ema_stds=(0.1,), samples=SamplesConfig(num=2, steps=2)
    )
    training = TrainingRun(config, RunFolder(run_folder), world=World())
    run_folder.mkdir()
    list(training)
    (net,) = run_folder.glob("network-snapshot-*.pkl")
    assert load_snapshot(net).info["classes"] == ["cat", "dog", "emu"]
    dry = [*train_command.SHORT, f"--data={data}", f"--outdir={tmp_path / 'dry'}", "--dry-run"]
    capsys.readouterr()
    assert train_command.run(*dry, "--samples=2", "--samples-classes=emu,0-1") == 0
    assert train_command.printed_options(capsys.readouterr().out)["samples"]["classes"] == [2, 0, 1]
    networks = Networks(torch.device("cpu"))
    facts = networks.facts(str(net))
    assert facts.class_names == ("cat", "dog", "emu")
    setting = Setting(net=str(net), num_images=1, num_steps=2, class_idx=1)
    shown, shot = list(generate_grid(setting, networks))[-1], list(generate_film(setting, networks, num_frames=2))[-1]
    assert "Seed 0, class 1: dog" in show.grid(shown, [], name="grid", class_names=facts.class_names)
    assert "Seed 0, class 1: dog" in show.film(shot, [], facts.class_names)
    (grid,) = run_folder.glob("samples-*.png")
    with PIL.Image.open(grid) as image:
        assert json.loads(image.info["edm2"])["class_names"] == ["cat", "dog", "emu"]
    assert "Classes:               3 (cat, dog, emu)" in describe_run(config, run_folder, training.dataset, num_ranks=1)
    (run_folder / "training_options.json").write_text(config.to_json())
    assert "A row for each class: cat, dog, emu." in page_of(run_folder)[0]
    quick = ["--device=cpu", f"--net={net}", "--steps=2", "--seeds=3"]
    for name in ("dog", "1", "2"):
        succeed(*quick, f"--class={name}", "--outdir", tmp_path / name)
    images = [pixels(tmp_path / name / "000003.png") for name in ("dog", "1", "2")]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    with pytest.raises(ConfigError, match="'Dogs' is not a class; the network knows 3, such as dog;"):
        succeed(*quick, "--class=Dogs", "--outdir", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    panel = pytest.importorskip("edm2.explorer.panel")
    assert [text for text, _ in panel._classes(facts)] == ["random", "all, a row for each", "0 cat", "1 dog", "2 emu"]
