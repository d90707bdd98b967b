"""Sweeps over EMA lengths and guidance weights: their scores, their figure, and that they can be taken up again."""

import dataclasses
import gc
import json
import math
import shlex
import weakref
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch

import calculate_metrics
import dnnlib.cli
import generate_images
import reconstruct_phema
import sweep as script
from tests.helpers.ranks import run_ranks
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import tiny_config, train, write_dataset
from torch_utils.distributed import World
from training import phema
from training.fast.inference_network import InferencePrecond
from training.fast.prepare import PrepareNetwork
from training.metrics import available as plan
from training.metrics.reference import load_stats
from training.posthoc.inputs import list_input_pickles
from training.run.run_folder import RunFolder
from training.sampling.request import resolve_sampling
from training.sweep.ema_sweep import Point, Sweep, at_the_edge, best_point, read_points
from training.sweep.sweep_plot import plot_sweep, sweep_figure
from training.training_loop import TrainingRun


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(plan, "make_detector", lambda name, device, weights=None: StandInDetector(name))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.zip, and the snapshots of two runs in run and guide."""
    folder = tmp_path_factory.mktemp("tiny")
    data = write_dataset(folder / "data.zip", num=40)
    for name, seed in (("run", 0), ("guide", 1)):
        config = tiny_config(data, batch=256, duration=3072, snapshot=1024, snapshot_format="safetensors", seed=seed)
        train(TrainingRun(config, RunFolder(folder / name), world=World()))
    return folder


@pytest.fixture
def reference(tiny: Path, tmp_path: Path) -> Path:
    dest = tmp_path / "ref.pkl"
    run(
        calculate_metrics.cmdline,
        "ref",
        f"--data={tiny / 'data.zip'}",
        f"--dest={dest}",
        "--metrics=fd_efflite0,fid",
        "--workers=0",
    )
    return dest


def run(command: click.Command, *args: Any) -> str:
    """Standard output of the command, which must end well."""
    result = click.testing.CliRunner().invoke(command, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def guide_of(tiny: Path) -> Path:
    return tiny / "guide" / "network-snapshot-0000003-0.100.safetensors"


def measuring(tiny: Path, reference: Path) -> list[str]:
    return [f"--ref={reference}", "--metrics=fd_efflite0", "--num=10", "--steps=3", "--batch=4", "--device=cpu"]


def sweeping(tiny: Path, reference: Path, *args: Any) -> str:
    return run(script.cmdline, f"--indir={tiny / 'run'}", *measuring(tiny, reference), *args)


def scores_in(path: Path) -> dict[tuple[float, float], list[float]]:
    points = json.loads(path.read_text())["points"]
    return {(p["ema_std"], p["guidance"]): p["values"]["fd_efflite0"] for p in points}


def test_a_point_scores_what_the_reconstructed_file_does_and_no_network_is_written(tiny, reference, tmp_path):
    out, gnet = tmp_path / "new" / "out", f"--gnet={guide_of(tiny)}"
    before = sorted((tiny / "run").iterdir())
    sweeping(tiny, reference, "--outstd=0.07,0.15", gnet, "--guidance=1,1.7", "--repeat=2", f"--json={out / 's.json'}")
    assert [path.name for path in out.iterdir()] == ["s.json"]
    assert sorted((tiny / "run").iterdir()) == before
    scores = scores_in(out / "s.json")
    assert set(scores) == {(std, weight) for std in (0.07, 0.15) for weight in (1, 1.7)}
    files = tmp_path / "files"
    run(reconstruct_phema.cmdline, f"--indir={tiny / 'run'}", f"--outdir={files}", "--outstd=0.07,0.15")
    for (std, weight), values in scores.items():
        guidance = [gnet, f"--guidance={weight}"] if weight != 1 else []
        args = [
            f"--net={files}/phema-0000003-{std:.3f}.pkl",
            *guidance,
            "--repeat=2",
            f"--json={tmp_path / 'gen.json'}",
        ]
        run(calculate_metrics.cmdline, "gen", *measuring(tiny, reference), *args)
        assert json.loads((tmp_path / "gen.json").read_text())["results"]["fd_efflite0"]["values"] == values
    assert len({value for values in scores.values() for value in values}) == 8


def test_the_best_point_is_printed_with_commands_that_repeat_it(tiny, reference, tmp_path, monkeypatch):
    grid = [
        "--outstd=0.05,0.10,0.20",
        f"--gnet={guide_of(tiny)}",
        "--guidance=1.2,1.6",
        f"--json={tmp_path / 's.json'}",
    ]
    grid += ["--solver=dpmpp2m", "--interval=0.1,20", "--seed=7", f"--plot={tmp_path / 's.png'}"]
    text = sweeping(tiny, reference, *grid)
    scores = scores_in(tmp_path / "s.json")
    std, weight = min(scores, key=lambda key: scores[key])
    (value,) = scores[std, weight]
    lines = text.splitlines()
    place = lines.index(f"Best fd_efflite0: {value:.4f} at EMA length {std:.3f}, guidance {weight:g}")
    commands = [shlex.split(line) for line in lines[place:] if line.startswith("  python ")]
    monkeypatch.chdir(tmp_path)
    for words, name, command in zip(
        commands,
        ("reconstruct_phema", "generate_images"),
        (reconstruct_phema.cmdline, generate_images.cmdline),
        strict=True,
    ):
        assert words[:2] == ["python", f"{name}.py"]
        run(command, *words[2:], *(["--device=cpu", "--batch=4"] if name == "generate_images" else []))
    args = [
        "--metrics=fd_efflite0",
        f"--ref={reference}",
        "--num=10",
        "--json=calc.json",
        "--workers=0",
        "--device=cpu",
    ]
    run(calculate_metrics.cmdline, "calc", "--images=out/images", *args)
    measured = json.loads(Path("calc.json").read_text())["results"]["fd_efflite0"]["values"]
    assert measured == pytest.approx([value], rel=1e-9)
    assert json.loads((tmp_path / "s.json").read_text())["best"]["fd_efflite0"]["ema_std"] == std
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_a_point_that_the_snapshots_cannot_give_is_told_by_its_fit(tiny, reference, tmp_path):
    path = tmp_path / "s.json"
    text = sweeping(tiny, reference, "--outstd=0.01", f"--json={path}")
    (entry,) = json.loads(path.read_text())["points"]
    inputs = list_input_pickles(tiny / "run")
    profiles = ([file.nimg for file in inputs], [file.std for file in inputs])
    weights = phema.solve_posthoc_coefficients(*profiles, 3072, 0.01)
    assert entry["fit"] == pytest.approx(phema.posthoc_fit(*profiles, 3072, 0.01, weights)[0])
    assert f"(fit {entry['fit']:.2f}): the snapshots are too far apart" in text
    assert "too far apart" not in sweeping(tiny, reference, "--outstd=0.10")


def test_an_interrupted_sweep_is_taken_up_again_and_a_finer_one_adds_to_it(tiny, reference, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    sweeping(tiny, reference, "--outstd=0.05,0.10,0.15,0.20", f"--json={whole}")
    measure, calls = Sweep._measure, []

    def counted(self: Any, std: float, *rest: Any) -> Any:
        if len(calls) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        calls.append(std)
        return measure(self, std, *rest)

    monkeypatch.setattr(Sweep, "_measure", counted)
    with pytest.raises(click.exceptions.Abort):
        sweeping(tiny, reference, "--outstd=0.05,0.10,0.15", f"--json={cut}")
    assert list(scores_in(cut)) == [(0.05, 1), (0.10, 1)]
    (tmp_path / "again").touch()
    assert f"{cut} has 2 points already" in sweeping(tiny, reference, "--outstd=0.05,0.10,0.15", f"--json={cut}")
    assert calls == [0.05, 0.10, 0.15]
    sweeping(tiny, reference, "--outstd=0.10,0.20", f"--json={cut}")
    assert calls == [0.05, 0.10, 0.15, 0.20]
    records = [json.loads(path.read_text()) for path in (cut, whole)]
    fits = [[entry.pop("fit") for entry in record["points"]] for record in records]
    assert records[0] == records[1]
    assert fits[0] == pytest.approx(fits[1], abs=1e-6)  # rounding depends on which lengths are solved for together


def test_a_sweep_is_as_long_as_it_says_and_leaves_out_what_is_done(tiny, reference):
    stats = load_stats(reference)
    inputs = list_input_pickles(tiny / "run")
    requests = [resolve_sampling(net="", gnet=[str(guide_of(tiny))], guidance=w, num_steps=2) for w in (1, 2)]
    work = Sweep(
        inputs,
        [0.1, 0.05],
        requests,
        plan=plan.plan_metrics("fd_efflite0", stats, device="cpu"),
        reference=stats,
        world=World(),
        num=7,
        batch=3,
        repeat=2,
        done=frozenset({(0.1, 1.0)}),
    )
    steps = list(work)
    assert len(work) == len(steps) == 3 * 2 * 3  # three points, two sets of seeds, three batches
    assert [(p.std, p.guidance) for p in (s.point for s in steps) if p is not None] == [(0.05, 1), (0.05, 2), (0.1, 2)]
    assert all((s.point is not None) == (i % 6 == 5) for i, s in enumerate(steps))


def test_a_networks_memory_is_free_before_the_next_one_is_prepared(tiny, monkeypatch):
    """On a GPU a network that is left keeps the memory of its graph. The guide stays."""
    made: list[Any] = []
    living: list[int] = []

    def prepare(self: PrepareNetwork, net: Any, device: torch.device) -> Any:
        living.append(sum(net() is not None for net in made))
        prepared = InferencePrecond(net)
        made.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(PrepareNetwork, "__call__", prepare)
    request = resolve_sampling(net="unused", gnet=[str(guide_of(tiny))], guidance=1.5, num_steps=2)
    work = Sweep(
        list_input_pickles(str(tiny / "run")),
        [0.06, 0.07, 0.10],
        [request],
        plan=plan.plan_metrics(["is"], None, device=torch.device("cpu"), weights={}),
        reference=None,
        world=World(),
        num=4,
        batch=4,
    )
    gc.collect()
    gc.disable()
    try:
        assert len(list(work)) == len(work) == 3
    finally:
        gc.enable()
    assert living == [0, 1, 1, 1]


def test_points_of_other_settings_are_refused_by_name(tiny, reference, tmp_path, capsys):
    path = tmp_path / "s.json"
    sweeping(tiny, reference, "--outstd=0.05", f"--json={path}")
    before = path.read_bytes()
    common = ["--outstd=0.10", f"--json={path}", *measuring(tiny, reference)]
    moved = tiny / "moved"
    moved.mkdir()
    for index, file in enumerate(sorted((tiny / "run").glob("*.safetensors"))):
        other = sorted((tiny / "guide").glob("*.safetensors"))[index]
        (moved / file.name).write_bytes((other if index == 0 else file).read_bytes())
    for args, words in (
        ([f"--indir={tiny / 'run'}", "--num=11"], "num_images: 10 there, 11 now"),
        ([f"--indir={tiny / 'run'}", "--steps=4"], "sampler:"),
        ([f"--indir={tiny / 'run'}", "--seed=1", "--repeat=2"], "repeat: 1 there, 2 now; seed: 0 there, 1 now"),
        ([f"--indir={tiny / 'run'}", f"--gnet={guide_of(tiny)}", "--guidance=2"], "gnets"),
        ([f"--indir={moved}"], "snapshots:"),
    ):
        assert words in fails(capsys, *common, *args)
    assert path.read_bytes() == before


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line on standard error of the command, which must refuse."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dnnlib.cli.main(script.cmdline, [str(arg) for arg in args])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


def test_bad_input_is_refused_in_one_line_with_nothing_written(tiny, reference, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.json").write_text('{"format": "other"}')
    before = sorted(tmp_path.rglob("*"))
    for args, words in (
        (["--guidance=2"], "--guidance=2 needs a guiding network"),
        ([f"--indir={tmp_path / 'empty'}"], "no input snapshots"),
        ([f"--indir={tmp_path / 'missing'}"], "missing"),
        (["--outstd=0.3"], "'0.3' in '0.3' is not an EMA length"),
        (["--outkimg=2000"], "no input snapshot at 2000 kimg"),
        (["--num=1"], "--num=1"),
        (["--metrics=kid_efflite0"], "keeps no efflite0 features"),
        (["--solver=magic"], "magic"),
        ([f"--plot={tmp_path / 'new' / 'plot.txt'}"], ".png, .pdf, .svg"),
        ([f"--plot={tmp_path / 'empty'}"], "it is a folder"),
        ([f"--json={reference / 's.json'}"], "is a file"),
        ([f"--json={tmp_path / 'foreign.json'}"], "is not a record of a sweep"),
        (["--guidance=1,x"], "'1,x' is not a list of numbers"),
    ):
        default = [f"--indir={tiny / 'run'}", "--outstd=0.05", *measuring(tiny, reference)]
        assert words in fails(capsys, *default, *args), args
    assert sorted(tmp_path.rglob("*")) == before


def point(std: float, guidance: float, *values: float, fit: float = 0.0) -> Point:
    return Point(std=std, guidance=guidance, fit=fit, values={"fid": list(values)})


def test_the_best_point_has_the_best_mean_in_the_metrics_own_direction():
    points = [point(0.1, 1, 3, 9), point(0.2, 1, 5, 5), point(0.3, 1, math.nan, 0)]
    assert best_point(points, "fid") == points[1]
    high = [dataclasses.replace(p, values={"recall3_inception": p.values["fid"]}) for p in points]
    assert best_point(high, "recall3_inception") == high[0]
    assert best_point(points[2:], "fid") is None


@pytest.mark.parametrize(
    ("best", "edges"),
    [((0.1, 1.0), ["EMA lengths"]), ((0.2, 1.5), []), ((0.2, 2.0), ["guidance weights"]), ((0.2, 1.0), [])],
)
def test_a_best_point_at_the_edge_is_said(best, edges):
    # No guidance is not an edge of the guidance weights: there is nothing below it to try.
    points = [
        point(std, weight, 0.0 if (std, weight) == best else 1.0)
        for std in (0.1, 0.2, 0.3)
        for weight in (1.0, 1.5, 2.0)
    ]
    found = best_point(points, "fid")
    assert found is not None and (found.std, found.guidance) == best
    assert at_the_edge(points, found) == edges
    assert at_the_edge([found], found) == []


def curves(points: list[Point], row: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    axes = sweep_figure(points, list(points[0].values)).axes[row]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def test_the_figure_has_a_curve_for_each_weight_over_the_length_and_marks_the_best(tmp_path):
    points = [point(std, weight, 10 * std - weight) for weight in (2.0, 1.0) for std in (0.2, 0.1, 0.3)]
    assert curves(points) == {
        "guidance 1": ([0.1, 0.2, 0.3], pytest.approx([0.0, 1.0, 2.0])),
        "guidance 2": ([0.1, 0.2, 0.3], pytest.approx([-1.0, 0.0, 1.0])),
        "best -1: EMA length 0.100, guidance 2": ([0.1], [-1.0]),
    }
    one = [p for p in points if p.std == 0.2]
    assert curves(one)["EMA length 0.2"] == ([1.0, 2.0], pytest.approx([1.0, 0.0]))
    assert curves([*one, point(0.2, 3, 1, fit=0.2)])["poor reconstruction, fit > 0.1"] == ([], [])
    plot_sweep(tmp_path / "plot.svg", points, ["fid"], title="Title")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_value_that_is_no_number_survives_the_file(tiny, reference, tmp_path):
    path = tmp_path / "s.json"
    sweeping(tiny, reference, "--outstd=0.05", f"--json={path}")
    record = json.loads(path.read_text())
    record["points"][0]["values"]["fd_efflite0"] = ["nan"]
    path.write_text(json.dumps(record))
    (found,) = read_points(path, record["settings"])
    assert math.isnan(found.values["fd_efflite0"][0])


@pytest.mark.slow
def test_one_and_two_processes_find_the_same(tiny, tmp_path):
    options = ["--device=cpu", "--metrics=fd_efflite0"]
    ref = tmp_path / "ref.safetensors"
    run_ranks("calculate_metrics.py", "ref", f"--data={tiny / 'data.zip'}", f"--dest={ref}", *options, num=1)
    found = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.json"
        args = [f"--indir={tiny / 'run'}", "--outstd=0.06,0.12", f"--ref={ref}", "--num-images=11", "--steps=3"]
        run_ranks("sweep.py", *args, "--batch=4", f"--json={path}", *options, num=ranks)
        found.append(torch.tensor(list(scores_in(path).values())))
    assert found[0].shape == (2, 1)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
