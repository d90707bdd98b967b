"""The command line of train_edm2.py: what it prints and writes, and how it refuses."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edm2 import run_log
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import assert_close, assert_same_state, write_dataset
from tests.helpers.train_command import SHORT, TINY, printed_options, run
from torch_utils.checkpoints.checkpoint import load_checkpoint
from torch_utils.distributed import World
from training.config import TrainingConfig
from training.dataset import ImageFolderDataset
from training.presets import REPOSITORY_DIR


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def test_a_run_writes_its_options_log_statistics_snapshots_and_checkpoints(data, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    args = [*SHORT, f"--outdir={out}", f"--data={data}", "--status=16", "--snapshot=16", "--checkpoint=32"]
    assert run(*args, "--format=both") == 0
    names = {path.name for path in out.iterdir()}
    snapshots = {
        f"network-snapshot-0000000.{nimg}-{std}.{ext}"
        for nimg, std, ext in itertools.product(("016", "032"), ("0.050", "0.100"), ("pkl", "safetensors"))
    }
    files = {
        "training_options.json",
        "data.json",
        "log.txt",
        "stats.jsonl",
        "sessions.jsonl",
        "training-state-0000000.032.pt",
    }
    assert names == files | snapshots
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0.016, 0.032]
    options = json.loads((out / "training_options.json").read_text())
    assert (options["data"], options["batch"], options["network"]["channels"]) == (str(data), 8, 4)
    assert capsys.readouterr().out == (out / "log.txt").read_text(encoding="utf-8")


def test_status_lines_say_what_the_published_ones_do(data, tmp_path, capsys):
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--status=16") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kimg ")]
    assert len(lines) == 2 and max(map(len, lines)) <= 110
    assert [line.split()[1] for line in lines] == ["0.016", "0.032"]
    fields = ["kimg", "time", "sec/tick", "sec/kimg", "maintenance", "cpumem", "gpumem", "reserved"]
    assert all(re.findall(r"(\S+) +\S+", line)[: len(fields)] == fields for line in lines)


def test_float32_instead_of_float16_is_said_once(data, tmp_path, capsys):
    assert run(*SHORT, f"--outdir={tmp_path / 'a'}", f"--data={data}", "--status=8") == 0
    assert capsys.readouterr().out.count("computes in float32") == 1
    assert run(*SHORT, f"--outdir={tmp_path / 'b'}", f"--data={data}", "--fp16=False") == 0
    assert "computes in float32" not in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_not_trained_and_overwritten_again(data, tmp_path, capsys):
    args = [*TINY, "--batch=256", "--duration=1Ki", "--checkpoint=0", f"--outdir={tmp_path}", f"--data={data}"]
    assert run(*args, "--snapshot=512") == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pkl")}
    assert files
    capsys.readouterr()
    assert run(*args, "--snapshot=512") == 0
    assert "is finished" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pkl")}
    assert run(*args, "--snapshot=512", "--duration=2Ki", "-n") == 0


def test_a_finished_run_says_so_and_a_longer_duration_continues_it(data, tmp_path, capsys):
    args = [*TINY, "--batch=8", f"--outdir={tmp_path / 'run'}", f"--data={data}", "--status=8"]
    assert run(*args, "--duration=16") == 0
    state = (tmp_path / "run" / "training-state-0000000.016.pt").read_bytes()
    capsys.readouterr()
    assert run(*args, "--duration=16") == 0
    text = capsys.readouterr().out
    assert "The run is finished" in text and "Training for" not in text
    assert (tmp_path / "run" / "training-state-0000000.016.pt").read_bytes() == state
    assert run(*args, "--duration=24") == 0
    assert "Training for 1 iterations" in capsys.readouterr().out
    lines = (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["Progress/kimg"] for line in lines] == [0.008, 0.016, 0.024]


def test_changed_options_are_named_and_refused_unless_they_are_neutral_or_allowed(data, tmp_path, capsys):
    args = [*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}"]
    assert run(*args) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert run(*args, "--lr=0.5", "--P_mean=-1", "--dropout=0.25") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "(P_mean: -0.8 in the run, -1.0 asked for; lr: 0.01 in the run, 0.5 asked for; dropout: 0.0 in the" in error
    assert "--allow-changes" in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    neutral = ["--batch-gpu=2", "--status=8", "--snapshot=0", "--checkpoint=8", "--format=both", "--bench=False"]
    assert run(*args, *neutral, "--duration=40") == 0
    assert run(*args, "--lr=0.5", "--allow-changes", "--duration=48") == 0
    assert json.loads((tmp_path / "run" / "training_options.json").read_text())["lr"] == 0.5


def test_statistics_from_beyond_the_checkpoint_are_dropped(data, tmp_path):
    out = tmp_path / "run"
    args = [*TINY, "--batch=8", f"--outdir={out}", f"--data={data}", "--status=8"]
    assert run(*args, "--duration=16") == 0
    lost = {**json.loads((out / "stats.jsonl").read_text().splitlines()[0]), "Progress/kimg": 0.024}
    with open(out / "stats.jsonl", "a") as file:
        file.write(json.dumps(lost) + '\n{"half a li')
    assert run(*args, "--duration=32") == 0
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0.008, 0.016, 0.024, 0.032]


def test_a_dry_run_prints_the_options_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    # No image but the first has as much as a header, and that one's pixels are cut off.
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(damaged, "w") as target:
        for index, name in enumerate(source.namelist()):
            content = source.read(name)
            target.writestr(name, content if name.endswith(".json") else content[:-40] if index == 0 else b"")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a dry run looks for no GPU"))
    args = [*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={damaged}"]
    assert run(*args, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "20 of 8x8, 3 channels" in text
    assert printed_options(text)["network"]["channel_mult"] == [1, 2]
    assert list(tmp_path.iterdir()) == [damaged]
    monkeypatch.undo()
    assert run(*args) == 2  # while training does see it


@pytest.mark.parametrize(
    ("preset", "duration", "channels", "lr", "decay", "dropout", "P_mean", "P_std"),
    [
        ("edm2-img512-xxs", 2048, 64, 0.0170, 70000, 0, -0.4, 1.0),
        ("edm2-img512-l", 1792, 320, 0.0080, 70000, 0.10, -0.4, 1.0),
        ("edm2-img512-xxl", 896, 448, 0.0065, 70000, 0.10, -0.4, 1.0),
        ("edm2-img64-s", 1024, 192, 0.0100, 35000, 0, -0.8, 1.6),
        ("edm2-img64-xl", 640, 384, 0.0070, 35000, 0.10, -0.8, 1.6),
    ],
)
def test_a_preset_gives_the_published_options(
    tmp_path, capsys, preset, duration, channels, lr, decay, dropout, P_mean, P_std
):
    data = write_dataset(tmp_path / "data.zip", num=1, size=64, channels=8 if "512" in preset else 3)
    assert run(f"--preset={preset}", f"--outdir={tmp_path / 'run'}", f"--data={data}", "-n") == 0
    options = printed_options(capsys.readouterr().out)
    network = options["network"]
    assert (options["duration"], options["lr"], options["decay"]) == (duration << 20, lr, decay)
    assert (options["P_mean"], options["P_std"], network["dropout"], network["channels"]) == (
        P_mean,
        P_std,
        dropout,
        channels,
    )
    assert (network["channel_mult"], network["num_blocks"], network["attn_resolutions"]) == ([1, 2, 3, 4], 3, [16, 8])
    assert (network["channels_per_head"], network["precision"]) == (64, "fp16")
    assert (options["batch"], options["batch_gpu"], options["rampup"], options["seed"]) == (2048, None, 10, 0)
    assert (options["status"], options["snapshot"], options["checkpoint"]) == (128 << 10, 8 << 20, 128 << 20)
    assert (options["ls"], options["bench"], options["cond"], options["ema_stds"]) == (1, True, True, [0.05, 0.1])


def test_an_option_wins_over_the_preset(data, tmp_path, capsys):
    given = {
        "duration": ("3Ki", 3072),
        "batch": ("16", 16),
        "lr": ("0.25", 0.25),
        "decay": ("0", 0),
        "P_mean": ("0", 0),
        "P_std": ("2", 2),
        "ema_stds": ("0.2,0.1", [0.1, 0.2]),
        "status": ("0", 0),
        "seed": ("3", 3),
        "cond": ("False", False),
        "xflip": ("True", True),
    }
    network = {"channels": ("8", 8), "dropout": ("0", 0), "attn_resolutions": ("4", [4]), "num_blocks": ("2", 2)}
    args = [f"--{k if k.startswith('P_') else k.replace('_', '-')}={v}" for k, (v, _) in (given | network).items()]
    assert run("--preset=edm2-img512-m", f"--outdir={tmp_path / 'run'}", f"--data={data}", *args, "-n") == 0
    options = printed_options(capsys.readouterr().out)
    assert {key: options[key] for key in given} == {key: value for key, (_, value) in given.items()}
    assert {key: options["network"][key] for key in network} == {key: value for key, (_, value) in network.items()}


def test_the_fashion_preset_brings_its_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--preset=fashion", "--outdir=run", "-n") == 0
    options = printed_options(capsys.readouterr().out)
    assert Path(options["data"]) == REPOSITORY_DIR / "data" / "fashion-mnist-32.zip"
    assert list(tmp_path.iterdir()) == []


def _bad_inputs(tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Options after good ones, and what the message must name."""
    good = write_dataset(tmp / "good.zip", num=2)
    write_dataset(tmp / "unlabelled.zip", num=2, labels=False)
    write_dataset(tmp / "odd.zip", num=2, size=6)
    zipfile.ZipFile(tmp / "empty.zip", "w").close()
    (tmp / "text.zip").write_text("not a zip")
    (tmp / "empty").mkdir()
    (tmp / "foreign.pkl").write_bytes(b"\x80\x04N.")
    other_init = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
    return {
        "unknown preset": (["--preset=edm2-img512-huge"], "edm2-img512-huge"),
        "missing data": ([f"--data={tmp / 'missing.zip'}"], "missing.zip"),
        "no data": (["--data="], "--data"),
        "empty folder": ([f"--data={tmp / 'empty'}"], "no images"),
        "empty zip": ([f"--data={tmp / 'empty.zip'}"], "no images"),
        "not a zip": ([f"--data={tmp / 'text.zip'}"], "text.zip"),
        "unlabelled": ([f"--data={tmp / 'unlabelled.zip'}"], "--cond=False"),
        "size that does not halve": ([f"--data={tmp / 'odd.zip'}", "--channel-mult=1,1,1"], "6x6"),
        "batch over rounds": (["--batch=8", "--batch-gpu=3"], "--batch-gpu=2"),
        "duration": (["--duration=abc"], "'abc' is not an image count"),
        "negative duration": (["--duration=-5"], "'-5'"),
        "no duration": (["--duration=0"], "--duration=0"),
        "negative batch": (["--batch=-8"], "'-8'"),
        "no batch": (["--batch=0"], "--batch=0"),
        "negative workers": (["--workers=-1"], "--workers=-1"),
        "negative channels": (["--channels=-4"], "--channels=-4"),
        "channels": (["--channels=many"], "many"),
        "channel mult": (["--channel-mult=0,1"], "--channel-mult"),
        "num blocks": (["--num-blocks=0"], "--num-blocks=0"),
        "dropout": (["--dropout=1.5"], "--dropout=1.5"),
        "learning rate": (["--lr=-1"], "--lr=-1"),
        "learning rate nan": (["--lr=nan"], "--lr=nan"),
        "lengths": (["--ema-stds=0.5"], "0.5"),
        "seed": (["--seed=-1"], "--seed=-1"),
        "huge seed": (["--seed=99999999999999999999"], "--seed"),
        "cond": (["--cond=perhaps"], "perhaps"),
        "format": (["--format=zip"], "zip"),
        "device": (["--device=gpu"], "--device=gpu"),
        "option": (["--unheard-of"], "--unheard-of"),
        "outdir below a file": ([f"--outdir={good / 'run'}"], "good.zip is a file"),
        "outdir is a file": ([f"--outdir={good}"], "good.zip is a file"),
        "missing init": ([f"--init={tmp / 'missing.pkl'}"], "missing.pkl"),
        "foreign init": ([f"--init={tmp / 'foreign.pkl'}"], "foreign.pkl"),
        "data as init": ([f"--init={good}"], "good.zip"),
        "init of another shape": ([f"--init={other_init}"], "--init-partial"),
    }


def test_bad_input_is_refused_in_one_line_with_nothing_written(tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    cases = _bad_inputs(inputs)
    out = tmp_path / "out"
    for name, (args, text) in cases.items():
        capsys.readouterr()
        assert run(*SHORT, f"--outdir={out}", f"--data={inputs / 'good.zip'}", *args) == 2, name
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, name
        assert text in captured.err, name
        assert captured.out == "", name
        assert list(tmp_path.iterdir()) == [inputs], name
    assert run(*SHORT, f"--outdir={out}", f"--data={inputs / 'good.zip'}") == 0  # so that only those were at fault


@pytest.mark.parametrize("changes", [["--xflip=True"], ["--preset=small"], ["--preset=small", "--cond=False"]])
def test_a_run_opens_its_data_set_once(changes, tmp_path, monkeypatch):
    opened: list[ImageFolderDataset] = []
    init = ImageFolderDataset.__init__

    def recorded(dataset: ImageFolderDataset, *args: Any, **kwargs: Any) -> None:
        opened.append(dataset)
        init(dataset, *args, **kwargs)

    monkeypatch.setattr(ImageFolderDataset, "__init__", recorded)
    monkeypatch.setattr("training.small_data.estimate._MEASURE_SEC", 0)
    data = write_dataset(tmp_path / "data.zip", size=32)
    out = tmp_path / "run"
    assert run(*SHORT, f"--outdir={out}", f"--data={data}", *changes) == 0
    (dataset,) = opened
    options = json.loads((out / "training_options.json").read_text())
    again = ImageFolderDataset(data, use_labels=options["cond"], xflip=options["xflip"])
    assert (len(dataset), dataset.label_dim) == (len(again), again.label_dim)
    for one, other in zip(dataset.read_batch(range(len(dataset))), again.read_batch(range(len(again))), strict=True):
        assert np.array_equal(one, other)


def test_a_batch_that_does_not_divide_over_processes_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}", "-n") == 2
    assert "try --batch=6" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--batch=8", f"--outdir={out}", f"--data={data}", "--status=8"]
    assert run(*args, "--duration=8") == 0
    state = out / "training-state-0000000.008.pt"
    state.write_bytes(state.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run(*args, "--duration=16") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(state) in error
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_images_of_mixed_sizes_are_refused_before_anything_is_written(tmp_path, capsys):
    data = write_dataset(tmp_path / "data.zip", num=8)
    with zipfile.ZipFile(write_dataset(tmp_path / "large.zip", num=8, size=16)) as large:
        extra = large.read("003.png")
    with zipfile.ZipFile(data) as source:
        items = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(data, "w") as target:
        for name, content in {**items, "003.png": extra}.items():
            target.writestr(name, content)
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("Error: ") and "003.png is 16x16" in error
    assert not (tmp_path / "run").exists()


def test_init_with_partial_says_what_stayed_fresh(data, tmp_path, capsys):
    assert run(*SHORT, f"--outdir={tmp_path / 'a'}", f"--data={data}", "--snapshot=32") == 0
    snapshot = tmp_path / "a" / "network-snapshot-0000000.032-0.050.pkl"
    capsys.readouterr()
    args = [*SHORT, f"--outdir={tmp_path / 'b'}", f"--data={data}", f"--init={snapshot}"]
    assert run(*args, "--cond=False") == 0  # the label embedding of the snapshot finds no place
    grey = write_dataset(tmp_path / "grey.zip", channels=1)
    args = [*SHORT, f"--outdir={tmp_path / 'c'}", f"--data={grey}", f"--init={snapshot}"]
    assert run(*args) == 2
    assert "unet.out_conv.weight" in capsys.readouterr().err
    assert run(*args, "--init-partial") == 0
    assert "no fitting tensor: unet.enc.8x8_conv.weight, unet.out_conv.weight." in capsys.readouterr().out


def command(*args: Any) -> list[str]:
    return [str(REPOSITORY_DIR / "train_edm2.py"), *map(str, args)]


def final_state(folder: Path) -> dict[str, Any]:
    return load_checkpoint(sorted(folder.glob("training-state-*.pt"))[-1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_continues_to_the_same_end(data, tmp_path):
    # The iterations between checkpoints are enough that the kill comes in the middle of some.
    args = [*TINY, f"--data={data}", "--batch=8", "--dropout=0.2", "--checkpoint=40", "--status=40", "--snapshot=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *command(*args, f"--outdir={killed}", "--duration=1Mi")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(killed.glob("training-state-*.pt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=120)
    reached = final_state(killed)["state"]["cur_nimg"]
    assert reached > 0
    duration = f"--duration={reached + 40}"
    assert run(*args, f"--outdir={killed}", duration) == 0
    assert run(*args, f"--outdir={tmp_path / 'whole'}", duration) == 0
    ends = [{**final_state(folder), "stats": {}} for folder in (killed, tmp_path / "whole")]
    assert ends[0]["state"]["cur_nimg"] == reached + 40
    assert_same_state(*ends)


@pytest.mark.slow
def test_two_processes_agree_with_one(data, tmp_path):
    args = [*TINY, f"--data={data}", "--batch=16", "--duration=48", "--status=16", "--checkpoint=48", "--snapshot=0"]
    args += ["--balance", "--label-dropout=0.5"]  # drawn for positions, as data order and noise are
    two = run_ranks("train_edm2.py", *args, "--batch-gpu=4", f"--outdir={tmp_path / 'two'}")
    assert two.count("Training for 3 iterations on 2 process(es)") == 1
    assert run(*args, f"--outdir={tmp_path / 'one'}") == 0
    stats = [
        [json.loads(line)["Loss/loss"] for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert stats[0] == pytest.approx(stats[1], rel=1e-5)
    one, pair = (final_state(tmp_path / name)["net"] for name in ("one", "two"))
    assert one.keys() == pair.keys()
    for name, value in one.items():
        assert_close(pair[name], value, 1e-5, name)


@pytest.mark.parametrize("missing", [None, "no compiler was found"])
def test_what_compiling_takes_is_said_before_it_begins(missing: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edm2.run_log.missing_compiler", lambda device: missing)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "there")
    unet = SimpleNamespace(enc=range(17), dec=range(20))
    run: Any = SimpleNamespace(
        config=dataclasses.replace(TrainingConfig(data="none"), compile=True),
        world=World(),
        state=SimpleNamespace(net=SimpleNamespace(unet=unet)),
    )
    (line,) = run_log._compile_notes(run)
    if missing is None:
        assert line.startswith("Compiling 37 blocks in the first iteration: about 7 min") and line.endswith(" there.")
    else:
        assert line == "The network is not compiled, and several times slower: no compiler was found."
    run.config = dataclasses.replace(run.config, compile=None)
    assert list(run_log._compile_notes(run)) == []


def test_the_fastest_precision_is_chosen_once_for_a_run(data, tmp_path, capsys, monkeypatch):
    def machine(*, has_bf16: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16, raising=False)

    out = tmp_path / "run"
    args = [*TINY, "--batch=8", f"--data={data}", f"--outdir={out}", "--precision=auto"]
    machine(has_bf16=True)
    assert run(*args, "--duration=8", "--dry-run") == 0
    assert "--precision=auto: bf16, this CPU has instructions for it." in capsys.readouterr().out
    machine(has_bf16=False)
    assert run(*args, "--duration=8") == 0
    assert "--precision=auto: fp32, this CPU has no instructions for bfloat16." in capsys.readouterr().out
    assert json.loads((out / "training_options.json").read_text())["network"]["precision"] == "fp32"
    machine(has_bf16=True)
    assert run(*args, "--duration=16") == 0
    assert "--precision=auto: fp32, as the run began." in capsys.readouterr().out
    assert json.loads((out / "training_options.json").read_text())["network"]["precision"] == "fp32"
    assert run(*args, "--duration=16", "--fp16=True") == 2
    assert "contradict" in capsys.readouterr().err
