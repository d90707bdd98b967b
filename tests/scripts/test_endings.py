"""The end of each script: where the results are and what to do next, and what ^C leaves."""

import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pytest
import tqdm

import generate_images
from tests.helpers.paths import GOLDEN_DIR, ROOT
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import tiny_config, train, write_dataset
from tests.helpers.train_command import SHORT
from torch_utils.distributed import World
from training.conversion.inspect import Inspection
from training.metrics import available, evaluate
from training.run.run_folder import RunFolder
from training.small_data import suggest
from training.training_loop import TrainingRun

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
GENERATE = ["generate_images.py", f"--net={NET}", "--steps=2", "--batch=1", "--seeds=0-2", "--device=cpu"]
MEASURE = ["--metrics=fd_efflite0", "--num=4", "--batch=2", "--device=cpu"]


class End(NamedTuple):
    """Exit code, and the lines that are not progress."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture(autouse=True)
def _keep_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., End]:
    """Run a script as from the command line, in this process."""
    monkeypatch.setattr(available, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    monkeypatch.setattr(evaluate, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it

    def called(script: str, *args: Any) -> End:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = (text.replace("\r", "\n").splitlines() for text in capsys.readouterr())
        return End(code, out, [line for line in err if line.strip() and "it/s" not in line and "%|" not in line])

    return called


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """^C at the second step of whatever has a progress bar."""
    steps = []

    def step() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt

    update, iterate = tqdm.tqdm.update, tqdm.tqdm.__iter__

    def interrupted_update(bar: Any, n: float = 1) -> Any:
        step()
        return update(bar, n)

    def interrupted_items(bar: Any) -> Iterator[Any]:
        for item in iterate(bar):
            yield item
            step()

    monkeypatch.setattr(tqdm.tqdm, "update", interrupted_update)
    monkeypatch.setattr(tqdm.tqdm, "__iter__", interrupted_items)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.zip, and the snapshots of a run in run."""
    folder = tmp_path_factory.mktemp("tiny")
    data = write_dataset(folder / "data.zip", num=40)
    config = tiny_config(data, batch=256, duration=2048, snapshot=1024, snapshot_format="safetensors")
    train(TrainingRun(config, RunFolder(folder / "run"), world=World()))
    return folder


@pytest.fixture
def reference(call, tiny: Path) -> Path:
    """Statistics of the data, made once."""
    path = tiny / "ref.safetensors"
    if not path.exists():
        words = ["--metrics=fd_efflite0", "--workers=0", "--device=cpu", "--features=10"]
        assert call("calculate_metrics.py", "ref", f"--data={tiny / 'data.zip'}", f"--dest={path}", *words).code == 0
    return path


def next_of(end: End) -> list[str]:
    """The one command that is proposed: a script and its arguments."""
    assert end.code == 0, end
    (line,) = [line for line in end.err if line.startswith("Next: ")]
    python, *command = shlex.split(line.removeprefix("Next: "))
    assert python == "python"
    return command


def test_training_ends_with_its_folder_and_the_command_of_the_report(call, tiny, tmp_path):
    out = tmp_path / "a run"
    end = call("train_edm2.py", *SHORT, f"--outdir={out}", f"--data={tiny / 'data.zip'}")
    assert end.out[-1].startswith("Done: 0.032 kimg in ") and end.out[-1].endswith(f". Results are in {out}.")
    assert (out / "log.txt").read_text(encoding="utf-8").splitlines()[-1] == end.out[-1]  # docs/clusters.md
    command = next_of(end)
    assert command == ["report.py", str(out)]
    assert call(*command).code == 0 and (out / "report.html").exists()


def test_sampling_ends_with_the_folder_and_a_way_to_look_or_to_measure(call, tmp_path, monkeypatch, capsys):
    end = call(*GENERATE, f"--outdir={tmp_path / 'out'}")
    assert end.out[-1] == f"Wrote 3 images: {tmp_path / 'out'}"
    assert next_of(end) == ["explore.py", f"--net={NET}"]
    monkeypatch.setattr(generate_images, "MANY", 3)
    generate_images.cmdline.main([*GENERATE[1:], f"--outdir={tmp_path / 'many'}"], standalone_mode=False)
    command = f"calculate_metrics.py calc --images={tmp_path / 'many'} --num=3 --ref=STATISTICS"
    assert capsys.readouterr().err.endswith(f"Next: python {command}\n")


@pytest.mark.parametrize("labels", [True, False])
def test_conversion_ends_with_the_command_that_proposes_a_preset(call, tmp_path, monkeypatch, labels):
    monkeypatch.setattr(suggest, "rough_time", lambda *args: "seconds")
    data, dest = write_dataset(tmp_path / "data.zip", labels=labels), tmp_path / "new.zip"
    end = call("dataset_tool.py", "convert", f"--source={data}", f"--dest={dest}", "--workers=1", "--resolution=32x32")
    assert end.out[-1].startswith(f"{dest}: 20 images of 32x32; ")
    command = next_of(end)
    assert f"--data={dest}" in command and ("--cond=False" in command) != labels
    assert any("--preset=small suits them" in line for line in call(*command).out)


def test_measuring_ends_with_the_results_and_what_they_are_for(call, tiny, tmp_path):
    ref, result = tmp_path / "ref.safetensors", tmp_path / "result.json"
    data, quick = tiny / "data.zip", "--workers=0"
    end = call("calculate_metrics.py", "ref", f"--data={data}", f"--dest={ref}", *MEASURE[:1], *MEASURE[2:], quick)
    assert end.out[-1].startswith(f"Wrote {ref}: ")
    assert next_of(end) == ["calculate_metrics.py", "calc", "--images=PATH", f"--ref={ref}"]
    end = call("calculate_metrics.py", "calc", f"--images={data}", f"--ref={ref}", *MEASURE, quick)
    assert end.code == 0 and end.err[-1] == "The same command with --json=FILE keeps the results in a file."
    gen = ["calculate_metrics.py", "gen", f"--net={NET}", "--steps=2", f"--ref={ref}", *MEASURE]
    end = call(*gen, f"--json={result}")
    assert end.out[-1] == f"Wrote {result}" and result.exists()
    command = [word.replace("NETWORK", str(NET)) for word in next_of(end)]
    assert call(*(word.replace("MODEL", str(tmp_path / "model")) for word in command)).code == 0
    assert (tmp_path / "model" / "README.md").exists()


def test_reconstruction_and_sweep_end_with_networks_to_sample_from(call, tiny, reference, tmp_path):
    words = ["reconstruct_phema.py", f"--indir={tiny / 'run'}", "--outstd=0.07,0.08", f"--outdir={tmp_path / 'out'}"]
    for skip in ([], ["--skip"]):
        command = next_of(call(*words, *skip))
        assert command[0] == "generate_images.py" and Path(command[1].removeprefix("--net=")).exists()
    result = tmp_path / "sweep.json"
    sweep = ["sweep.py", f"--indir={tiny / 'run'}", "--outstd=0.07", "--steps=2", f"--ref={reference}", *MEASURE]
    end = call(*sweep, f"--json={result}")
    assert end.code == 0 and end.out[-1] == f"Wrote {result}"
    assert any(line.strip().startswith("python generate_images.py ") for line in end.out)


def interrupted(end: End) -> str:
    assert end.code == 130 and not any("Traceback" in line for line in end.err), end
    (line,) = [line for line in end.err if line.startswith("Interrupted. ")]
    return line


def test_interrupted_sampling_continues_with_skip_existing(call, stopped, tmp_path):
    words = [*GENERATE, f"--outdir={tmp_path / 'out'}"]
    assert "with --skip-existing makes the others" in interrupted(call(*words))
    for path in (written := sorted((tmp_path / "out").glob("*.png"))):
        PIL.Image.open(path).load()
    assert 0 < len(written) < 3
    end = call(*words, "--skip-existing")
    assert end.code == 0 and end.out[-1].startswith(f"Wrote {3 - len(written)} images, {len(written)} existed already")


def test_interrupted_conversion_leaves_nothing_or_finished_shards(call, stopped, tmp_path):
    data = write_dataset(tmp_path / "data.zip", num=300)
    words = ["dataset_tool.py", "convert", f"--source={data}", f"--dest={tmp_path / 'new.zip'}", "--workers=1"]
    line = interrupted(call(*words))
    assert "No unfinished file is left" in line and "--shards and --skip-existing" in line
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]
    assert call(*words).code == 0


def test_interrupted_inspection_says_that_nothing_changed(call, tiny, monkeypatch):
    monkeypatch.setattr(Inspection, "_check_labels", stop)
    assert "The data set is as it was" in interrupted(call("dataset_tool.py", "inspect", tiny / "data.zip"))


def stop(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["calc", "gen", "ref"])
def test_interrupted_measuring_writes_nothing(call, tiny, reference, stopped, tmp_path, command):
    more = {
        "calc": [
            f"--images={tiny / 'data.zip'}",
            *MEASURE,
            "--workers=0",
            f"--json={tmp_path / 'result'}",
            f"--ref={reference}",
        ],
        "gen": [f"--net={NET}", "--steps=2", *MEASURE, f"--json={tmp_path / 'result'}", f"--ref={reference}"],
        "ref": [f"--data={tiny / 'data.zip'}", f"--dest={tmp_path / 'r.pkl'}", "--batch=2", "--workers=0", MEASURE[0]],
    }
    line = interrupted(call("calculate_metrics.py", command, *more[command]))
    assert line == "Interrupted. No result was written; the same command starts again."
    assert list(tmp_path.iterdir()) == []


def test_interrupted_reconstruction_continues_with_skip(call, stopped, tiny, tmp_path):
    words = ["reconstruct_phema.py", f"--indir={tiny / 'run'}", "--outstd=0.07,0.08", "--batch=1"]
    words.append(f"--outdir={tmp_path / 'out'}")
    end = call(*words)
    assert "the same command with --skip makes the others" in interrupted(end)
    left = sorted(path.name for path in (tmp_path / "out").glob("*") if path.suffix == ".pkl")
    assert call(*words, "--skip").code == 0
    assert set(left) <= {path.name for path in (tmp_path / "out").glob("*.pkl")}


def test_interrupted_sweeps_continue(call, tiny, reference, stopped, tmp_path):
    result = tmp_path / "sweep.json"
    words = ["sweep.py", f"--indir={tiny / 'run'}", "--outstd=0.07,0.08", "--steps=2", "--metrics=fd_efflite0"]
    words += ["--num=2", "--batch=2", "--device=cpu", f"--json={result}", f"--ref={reference}"]
    end = call(*words)
    assert "the same command continues after them" in interrupted(end)
    assert f"{result} has 1 points already" in call(*words).out


def test_interrupted_conversion_of_networks_names_the_finished_ones(call, stopped, tiny, tmp_path):
    nets = sorted((tiny / "run").glob("*.safetensors"))
    end = call("convert_snapshot.py", *nets, f"--outdir={tmp_path}", "--to=pkl")
    assert "The files printed above are complete" in interrupted(end)
    assert [line.split()[1] for line in end.out] == [str(path) for path in sorted(tmp_path.glob("*.pkl"))]
    end = call("convert_snapshot.py", *nets[1:2], f"--outdir={tmp_path / 'more'}", "--to=pkl")
    assert next_of(end) == ["generate_images.py", f"--net={tmp_path / 'more' / nets[1].stem}.pkl", "--outdir=out"]


def test_an_interrupted_toy_says_that_it_starts_again(call, stopped, tmp_path):
    end = call("toy_example.py", "train", f"--outdir={tmp_path}", "--device=cpu")
    assert "the same command starts again" in interrupted(end) and list(tmp_path.iterdir()) == []


def test_an_interrupt_before_training_is_one_line(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "check", stop)
    end = call("train_edm2.py", *SHORT, f"--outdir={tmp_path / 'run'}", f"--data={tiny / 'data.zip'}")
    assert "continues from the newest checkpoint in --outdir, if one was written" in interrupted(end)
    assert not (tmp_path / "run").exists()
