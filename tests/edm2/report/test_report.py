"""The report of a run: right numbers in the right places, nothing from elsewhere, and no run that it fails on."""

import base64
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import click.testing
import matplotlib
import numpy as np
import PIL.Image
import pytest

import dnnlib.atomic
import dnnlib.cli
import generate_images
import reconstruct_phema
import report as script
from edm2.report.chart import HEIGHT, WIDTH, Chart, Line, Point, begins_outside, smooth, svg, thin
from edm2.report.next_commands import commands_for
from edm2.report.record import Series, read_run, read_stats
from edm2.report.sample_grids import MAX_EARLIER, earlier_images, newest_image, spread, strip_of
from tests.helpers.report_run import (
    COMMAND,
    gray_of,
    page_of,
    stats_line,
    write_grid,
    write_run,
    write_stats,
)
from tests.helpers.tiny import tiny_config, train, write_dataset
from torch_utils.distributed import World
from training.config import SamplesConfig
from training.run.run_folder import RunFolder
from training.run.session import record_session
from training.training_loop import TrainingRun


def test_a_page_shows_the_run_and_brings_everything_with_it(tmp_path):
    text, page = page_of(write_run(tmp_path / "run"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "action"):
                assert value is not None and value.startswith("data:image/"), (tag, name)
            if name == "xlink:href":  # parts of a chart
                assert value is not None and value.startswith("#"), (tag, name)
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert "http://" not in text and "https://" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = {value[1:] for _, attributes in page.tags if (value := attributes.get("xlink:href"))}
    assert used <= set(ids)
    for words in (
        "Finished.", "4.096", "Time 1 min 22 s", "Images per second 50", "Best fid 12.21", "0.50 GiB",
        "Learning rate", "Throughput", "EMA length 0.100", "10% of the time went to saving, samples and metrics",
        "At 4.096 thousand images, EMA length 0.100, 5 steps", "One seed of each class over the run",
        "Sweep: sweep.json", "Best 6.5 at EMA length 0.050, guidance 2. 500 images per point.", "guidance 1",
        "2026-11-24 10:00:00 UTC", "network.channels 4", "ema_stds 0.05, 0.1", "Made 2026-11-24 12:00 UTC",
    ):  # fmt: skip
        assert words in page.text, words
    assert text.count("session 2 began") >= 4


def test_hostile_texts_stay_texts(tmp_path):
    run, evil = write_run(tmp_path / "run"), '<script src="http://x">&"\'</script>'
    options = json.loads((run / "training_options.json").read_text())
    (run / "training_options.json").write_text(json.dumps({**options, "data": evil, evil: {evil: evil}}))
    (run / "sessions.jsonl").write_text(json.dumps({"nimg": 5, "command": evil, "device": evil}) + "\n")
    lines = [stats_line(n, **{f"{evil}/a": 1.0, f"Metrics/{evil}-0.1": 2.0, "Metrics/best_x": evil}) for n in (5, 9)]
    write_stats(run, lines)
    _, page = page_of(run)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count(evil) >= 5


def test_a_run_that_has_just_begun_or_is_damaged_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_options.json").write_text(tiny_config(Path("d.zip"), duration=4096).to_json())
    assert "0% done. Data: d.zip." in page_of(run)[1].text
    write_stats(run, [stats_line(1024)], tail='not json\n[1]\n{"Loss/loss": 3}\n{"Progress/kimg": "x"}\n{"Loss/lo')
    (run / "samples-0000001.png").write_bytes(b"not an image")
    (run / "sessions.jsonl").write_text('{"nimg": 0}\n{"nim')
    (run / "training_options.json").write_text("{")
    (run / "other.json").write_text("[]")
    _, page = page_of(run)
    assert "stats.jsonl: 5 lines could not be read and are left out." in page.text
    assert "samples-0000001.png is not a readable image" in page.text
    assert "sessions.jsonl: 1 line could not be read." in page.text
    assert "training_options.json is missing or damaged" in page.text
    assert "Loss 0.4941" in page.text
    write_stats(run, [stats_line(1024, **{"Loss/loss": math.nan, "Timing/sec_per_kimg": math.inf, "Metrics/a-b": 1})])
    page_of(run)


def test_an_unfinished_run_tells_how_long_it_will_take(tmp_path):
    run = write_run(tmp_path / "run")
    write_stats(run, [stats_line(nimg) for nimg in range(256, 1025, 256)])
    for grid in run.glob("samples-*.png"):
        grid.unlink()
    text = page_of(run)[1].text
    # 3,072 images at 50 a second, and one second in ten for the rest.
    assert "25% done." in text and "about 1 min 8 s to go" in text and "Last statistics 59 min 40 s before" in text


def test_series_are_the_lines_with_what_a_restart_took_back_left_out(tmp_path):
    write_stats(tmp_path, [stats_line(n, **{"Loss/loss": v}) for n, v in ((1, 5), (2, 6), (3, 7), (2, 8), (4, 9))])
    stats = read_stats(tmp_path / "stats.jsonl")
    assert (list(stats.series["Loss/loss"].nimg), list(stats.series["Loss/loss"].values)) == ([1, 2, 4], [5, 8, 9])
    assert (stats.num_lines, stats.num_damaged) == (5, 0)


@pytest.mark.parametrize(("num", "most"), [(1, 300), (7, 300), (301, 300), (12345, 300)])
def test_a_thinned_curve_keeps_mean_extremes_and_order(num, most):
    values = np.random.default_rng(0).normal(size=num)
    series = Series()
    for index, value in enumerate(values):
        series.add(index, value)
    series.add(num, math.nan)
    points = thin(series, most)
    sizes = np.diff([round(i * num / len(points)) for i in range(len(points) + 1)])
    assert len(points) == min(num, most) and sizes.max() - sizes.min() <= 1
    assert max(p.high for p in points) == values.max() and min(p.low for p in points) == values.min()
    assert sum(p.mean * n for p, n in zip(points, sizes, strict=True)) == pytest.approx(values.sum())
    assert [p.x for p in points] == sorted(p.x for p in points)
    assert all(p.low <= p.mean <= p.high for p in points)


def test_smoothing_keeps_a_line_straight():
    points = [Point(x=i, mean=3 * i - 7, low=0, high=0) for i in range(200)]
    assert [p.mean for p in smooth(points)] == pytest.approx([p.mean for p in points])


def line_of(*pairs: tuple[float, float]) -> Line:
    return Line(label="a", points=[Point(x=x, mean=y, low=y, high=y) for x, y in pairs])


def chart_of(*pairs: tuple[float, float], **options: Any) -> Chart:
    return Chart(title="t", unit="", lines=[line_of(*pairs)], x_unit="x", **options)


def dots(chart: Chart) -> list[tuple[float, float]]:
    """The places of the points of a chart's curve."""
    text = svg(chart)
    shapes = re.findall(r"<title>a: .*?</title>.*?<use [^>]*?x=\"([\d.-]+)\" y=\"([\d.-]+)\"", text)
    return [(float(x), float(y)) for x, y in shapes]


def ticks(chart: Chart) -> list[tuple[str, float]]:
    """The texts along the value axis and their heights; a common factor, such as 1e6, comes last, at the top."""
    texts = re.findall(r"<text [^>]*?x=\"([\d.-]+)\" y=\"([\d.-]+)\"[^>]*>([^<]+)</text>", svg(chart))
    return [(text, float(y)) for x, y, text in texts if float(x) < 55 and float(y) < HEIGHT - 34]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12), (0.00123, 0.00125), (1e6, 1e7), (-1e-9, 1e-9)])
def test_ticks_are_round_and_evenly_spaced_and_their_texts_tell_them_apart(low, high):
    shown = ticks(chart_of((0, low), (1, high)))
    numbers = [float(text.replace("−", "-")) for text, _ in shown]
    factor = numbers.pop() if shown[-1][0].startswith("1e") else 1.0
    values = [value * factor for value in numbers]
    step = values[1] - values[0]
    assert 3 <= len(values) <= 8
    assert np.diff(values) == pytest.approx(step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    heights = [height for _, height in shown][: len(values)]
    assert np.diff(heights) == pytest.approx(np.diff(values) * (heights[1] - heights[0]) / step, abs=0.1)
    assert all(0 <= height <= HEIGHT - 30 for height in heights)


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_with_2_and_5_between():
    texts = [text for text, _ in ticks(chart_of((0, 0.9), (1, 120)))]
    assert texts == ["1", "2", "5", "10", "20", "50", "100"]
    assert 3 <= len(ticks(chart_of((0, 1e-6), (1, 1e6)))) <= 8


def test_points_lie_where_their_numbers_say():
    pairs = [(0, 2.0), (1000, 4.0), (4000, 3.0)]
    chart = Chart(title="t", unit="", lines=[line_of(*pairs)], x_unit="thousand images", x_scale=1e3)
    places = dots(chart)
    assert (places[2][0] - places[0][0]) / (places[1][0] - places[0][0]) == pytest.approx(4, abs=0.01)
    assert (places[2][1] - places[0][1]) / (places[1][1] - places[0][1]) == pytest.approx(0.5, abs=0.01)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    assert places[1][1] < places[0][1]  # larger is higher
    heights = dict(ticks(chart))
    assert places[0][1] == pytest.approx(heights["2.0"] - 4, abs=1)  # a text's baseline is below its tick


def test_values_of_many_sizes_are_drawn_over_logarithms():
    places = dots(chart_of((0, 1), (1, 10), (2, 1000)))
    assert (places[2][1] - places[0][1]) / (places[1][1] - places[0][1]) == pytest.approx(3, abs=0.01)


def test_a_steep_beginning_leaves_room_for_the_rest():
    pairs = [(0, 90.0), *((n, 1 + n / 1000) for n in range(10, 500, 10))]
    chart = chart_of(*pairs, settles=True)
    assert begins_outside(chart) and not begins_outside(chart_of(*pairs))
    (curve,) = re.findall(r"<title>a</title><path d=\"([^\"]*)\"[^>]*clip-path", svg(chart))
    heights = [float(y) for _, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", curve)[1:]]
    assert heights[0] - heights[-1] > HEIGHT / 2


@pytest.mark.parametrize("pairs", [[(5, 1.0)], [(0, 0.0)], [(3, -2.0), (4, -2.0)], [(1, 1e-12), (2, 1e90)]])
def test_a_chart_can_be_drawn_of_any_finite_values(pairs):
    text = svg(chart_of(*pairs))
    assert "nan" not in text and "inf" not in text


def test_a_chart_is_drawn_the_same_every_time_and_in_no_color_of_its_own():
    chart = chart_of((0, 1.0), (1, 2.0), marks=[(0.5, "<b>")], best=(1, 2.0))
    first = svg(chart)
    with matplotlib.rc_context({"axes.facecolor": "red", "text.color": "red", "lines.linewidth": 9}):
        assert svg(chart) == first
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg(chart))) <= {
        "none", "var(--c0)", "var(--ink)", "var(--soft)", "var(--rule)",
    }  # fmt: skip
    assert "<title>&lt;b&gt;</title>" in svg(chart)


def decoded(url: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"))


def test_images_are_the_grids_and_a_strip_of_one_seed_over_time(tmp_path):
    record = read_run(write_run(tmp_path / "run"))
    with PIL.Image.open(record.grids[-1].path) as image:
        np.testing.assert_array_equal(decoded(newest_image(record.grids[-1]).url), np.asarray(image.convert("L")))
    assert [image.nimg for image in earlier_images(record.grids)] == [1024, 2048, 3072]
    strip = strip_of(record.grids)
    assert strip is not None and strip.nimgs == [1024, 2048, 3072, 4096]
    pixels = decoded(strip.image.url)
    assert pixels.shape == (3 * 10 - 2, 4 * 10 - 2)
    grays = [[pixels[row * 10 + 4, column * 10 + 4] for column in range(4)] for row in range(3)]
    assert grays == [[gray_of(row, 0, nimg) for nimg in strip.nimgs] for row in range(3)]
    write_grid(tmp_path / "run", 5000, rows=2)  # of other options: not in one strip with those before
    assert strip_of(read_run(tmp_path / "run").grids) is None
    assert spread(range(100), 4) == [0, 33, 66, 99] and spread([1, 2], 4) == [1, 2]


def test_a_large_run_has_a_page_of_bounded_size(tmp_path):
    run = write_run(tmp_path / "run")
    random = np.random.default_rng(0)
    monitor = [f"Monitor/activations/enc.{i}" for i in range(30)]
    values = random.normal(size=(4000, len(monitor))) + 10
    lines = [
        stats_line(256 * (i + 1), **dict(zip(monitor, map(float, row), strict=True))) for i, row in enumerate(values)
    ]
    write_stats(run, lines)
    for nimg in range(10_000, 10_000 + 40_000, 1000):
        write_grid(run, nimg, size=64)
    noise = PIL.Image.fromarray(random.integers(0, 256, [3000, 3000, 3], dtype=np.uint8))
    noise.save(run / "samples-0009999.png", compress_level=1)
    text, page = page_of(run)
    assert len(text) < 4e6
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) <= MAX_EARLIER + 2
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(p["src"].partition(",")[2]))).size for p in images]
    assert max(max(size) for size in sizes) <= 1600
    assert "30 curves. At the end, highest: enc." in page.text
    assert len(max(re.findall(r' d="([^"]*)"', text), key=len)) < 300 * 2 * 16


def purposes(folder: Path) -> dict[str, str]:
    return dict(commands_for(read_run(folder)))


def test_the_commands_continue_from_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    found = purposes(Path("run"))
    longer = found["Train the finished run further, here for twice as long"]
    assert longer == COMMAND.replace("--duration=4Ki", "--duration=8Ki")
    assert "--net=run/network-snapshot-0000004-0.050.pkl" in found["Sample from the snapshot with the best fid"]
    assert ["--class=all", "--seeds=0-5", "--steps=5"][0] in found["Sample from the snapshot with the best fid"]
    again = found["Reconstruct another EMA length (the best one of the sweep)"]
    assert again == "python reconstruct_phema.py --indir=run --outdir=out --outstd=0.05"
    assert "--net=out/phema-0000004-0.050.pkl" in found["Sample from the reconstructed network"]
    write_stats(Path("run"), [stats_line(1024)])
    for grid in Path("run").glob("samples-*.png"):
        grid.unlink()
    assert purposes(Path("run"))["Continue: the same command again"] == COMMAND
    Path("run/training-state-0000004.pt").unlink()
    Path("run/sessions.jsonl").unlink()
    assert not any("train_edm2" in text for text in purposes(Path("run")).values())


def test_the_commands_of_a_real_run_work_and_give_its_sample_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_dataset(Path("data.zip"))
    samples = SamplesConfig(num=2, std=0.05, steps=3)
    config = tiny_config(data, batch=512, duration=2048, snapshot=1024, checkpoint=2048, samples=samples)
    run = TrainingRun(config, RunFolder("run"), world=World())
    run.folder.start(config, nimg=0)
    record_session(run.folder.path, nimg=0, command="python train_edm2.py --outdir=run", world=World())
    train(run)
    found = purposes(Path("run"))
    assert found["Train the finished run further, here for twice as long"].endswith(" --outdir=run --duration=4Ki")
    commands = {
        "Sample from the newest snapshot, as in the sample grids": generate_images.cmdline,
        "Reconstruct another EMA length (any length works)": reconstruct_phema.cmdline,
        "Sample from the reconstructed network": generate_images.cmdline,
    }
    for purpose, command in commands.items():
        words = shlex.split(found[purpose])
        assert words[0] == "python"
        click.testing.CliRunner().invoke(command, words[2:], standalone_mode=False, catch_exceptions=False)
        if purpose.startswith("Sample from the newest"):
            with PIL.Image.open("out/grid.png") as ours, PIL.Image.open("run/samples-0000002.png") as theirs:
                # The run drew from its own weights in float32, the command from a file of theirs in float16.
                apart = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
                assert apart.max() <= 1 and (apart > 0).mean() < 0.03
            Path("out/grid.png").unlink()
    assert Path("out/grid.png").is_file()


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line on standard error of the command, which must refuse."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dnnlib.cli.main(script.cmdline, [str(arg) for arg in args])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


def test_the_command_writes_one_file_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    before = sorted(run.iterdir())
    script.cmdline.main([str(run)], standalone_mode=False)
    assert sorted(run.iterdir()) == sorted([*before, run / "report.html"])
    assert f"Wrote {run / 'report.html'} (0." in capsys.readouterr().out
    out = tmp_path / "new" / "page.html"
    script.cmdline.main([str(run), f"--out={out}"], standalone_mode=False)
    old = out.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dnnlib.atomic.os, "replace", full)
    assert "No space left" in fails(capsys, run, f"--out={out}")
    assert out.read_bytes() == old and list(out.parent.iterdir()) == [out]


def test_another_sweep_may_be_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "sweep.json").rename(tmp_path / "elsewhere.json")
    assert "Sweep" not in page_of(run)[1].text
    assert "Sweep: elsewhere.json" in page_of(run, tmp_path / "elsewhere.json")[1].text


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for args, words in (
        ([tmp_path / "missing"], "is not a folder; name the --outdir of a training run"),
        ([tmp_path / "empty"], "contains no training run"),
        ([run, f"--sweep={run / 'training_options.json'}"], "is not a record of sweep.py"),
        ([run, f"--out={tmp_path / 'empty'}"], "is a folder; name a file"),
        ([run, f"--out={run / 'stats.jsonl' / 'x.html'}"], "is a file"),
        ([], "Missing argument 'RUN_DIR'"),
    ):
        assert words in fails(capsys, *args), words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_format_that_the_device_lacks_is_shown_with_the_one_computed_in(tmp_path):
    run = write_run(tmp_path / "run")
    assert "fp16, computed in float32 on cpu" in page_of(run)[1].text
    sessions = (run / "sessions.jsonl").read_text()
    (run / "sessions.jsonl").write_text(sessions.replace('"device": "cpu"', '"device": "cuda"'))
    text = page_of(run)[1].text
    assert "fp16" in text and "computed in float32" not in text
