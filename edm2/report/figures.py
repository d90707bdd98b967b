"""The charts of a report: loss, learning rate, speed, memory, metrics, other statistics, and sweeps."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dnnlib.text import format_number
from edm2.report.chart import Chart, Line, Point, begins_outside, smooth, thin
from edm2.report.record import TIMESTAMP, RunRecord, Series, SweepPoint, SweepRecord
from training.metrics.metric_table import best_of, is_lower_better
from training.posthoc import MAX_FIT

LOSS, RATE = "Loss/loss", "Loss/learning_rate"
SEC_PER_KIMG, MAINTENANCE, SEC_PER_TICK = "Timing/sec_per_kimg", "Timing/maintenance_sec", "Timing/sec_per_tick"
TOTAL_SEC = "Timing/total_sec"
MEMORY = {
    "Resources/cpu_mem_gb": "main memory",
    "Resources/peak_gpu_mem_gb": "GPU, peak",
    "Resources/peak_gpu_mem_reserved_gb": "GPU, reserved",
}
METRIC_PREFIX = "Metrics/"

_MAX_POINTS, _MAX_POINTS_OF_MANY = 300, 100
_NAMED_LINES, _MAX_LINES, _MAX_CHARTS = 6, 64, 24

Curves = Sequence[tuple[str, Series]]  # with their names


def unit_of(nimg: float) -> tuple[str, float]:
    """The unit for image counts up to `nimg`, and the images in it."""
    return ("million images", 1e6) if nimg >= 1e6 else ("thousand images", 1e3)


def main_charts(record: RunRecord) -> list[Chart]:
    """Charts of loss, learning rate, throughput and memory, as far as the run has statistics of them."""
    series = record.stats.series
    charts = []
    if _has(series, LOSS):
        charts.append(_loss(record, series[LOSS]))
    if _has(series, RATE):
        charts.append(_chart(record, "Learning rate", "", [("learning rate", series[RATE])], zero=True))
    if _has(series, SEC_PER_KIMG) and len(speed := _speed(series[SEC_PER_KIMG])):
        note = _maintenance_note(record)
        charts.append(_chart(record, "Throughput", "images/s", [("images per second", speed)], zero=True, note=note))
    memory = [(name, series[key]) for key, name in MEMORY.items() if _has(series, key) and max(series[key].values) > 0]
    if memory:
        charts.append(_chart(record, "Memory", "GiB", memory, zero=True))
    return charts


def metric_curves(record: RunRecord) -> dict[str, list[tuple[str, Series]]]:
    """The curves of each metric that the run measured, by EMA length."""
    metrics: dict[str, list[tuple[str, Series]]] = defaultdict(list)
    for key, series in record.stats.series.items():
        name, _, std = key.removeprefix(METRIC_PREFIX).rpartition("-")
        if key.startswith(METRIC_PREFIX) and name and _has(record.stats.series, key):
            metrics[name].append((std, series))
    return dict(metrics)


def best_value(name: str, curves: Curves) -> tuple[float, float, str]:
    """The best value of a metric with a finite one: image count, value, EMA length; of equal ones the earliest."""
    points = [
        (nimg, value, std) for std, series in curves for nimg, value in zip(series.nimg, series.values, strict=True)
    ]
    best = best_of(name, sorted(points), lambda point: point[1])
    assert best is not None
    return best


def metric_charts(record: RunRecord) -> list[Chart]:
    """A chart for each metric, with a curve for each EMA length."""
    charts = []
    for name, curves in metric_curves(record).items():
        nimg, value, std = best_value(name, curves)
        unit, scale = unit_of(record.nimg)
        better = "lower" if is_lower_better(name) else "higher"
        when = f"{format_number(nimg / scale)} {unit}"
        note = f"Best {format_number(value)} at {when}, EMA length {std} ({better} is better)."
        lines = [(f"EMA length {std}", series) for std, series in curves]
        charts.append(_chart(record, name, "", lines, best=(nimg, value), note=note))
    return charts


def other_charts(record: RunRecord) -> list[Chart]:
    """Charts of all other statistics, grouped by the first part of their names, or the first two of a/b/c."""
    known = {LOSS, RATE, SEC_PER_KIMG, MAINTENANCE, SEC_PER_TICK, TOTAL_SEC, TIMESTAMP, *MEMORY}
    groups: dict[str, list[tuple[str, Series]]] = defaultdict(list)
    for key, series in record.stats.series.items():
        if key not in known and not key.startswith(METRIC_PREFIX) and _has(record.stats.series, key):
            parts = key.split("/")
            group = "/".join(parts[: min(2, len(parts) - 1)]) or key
            groups[group].append((key.removeprefix(f"{group}/"), series))
    return [
        _chart(record, group, "", curves[:_MAX_LINES], note=_ends_note(curves))
        for group, curves in list(groups.items())[:_MAX_CHARTS]
    ]


def _ends_note(curves: Curves) -> str:
    if len(curves) <= _NAMED_LINES:
        return ""
    note = f"{len(curves)} curves" + (f"; the first {_MAX_LINES} are drawn" * (len(curves) > _MAX_LINES))
    ends = sorted((series.last, name) for name, series in curves if math.isfinite(series.last))
    if ends:
        (low, lowest), (high, highest) = ends[0], ends[-1]
        note += f". At the end, highest: {highest} {format_number(high)}; lowest: {lowest} {format_number(low)}."
    return note


def sweep_charts(sweep: SweepRecord) -> Iterator[Chart]:
    """A chart for each metric of a sweep, over the EMA length, or over the guidance if there is only one length."""
    over_std = len({point.std for point in sweep.points}) > 1 or len({point.guidance for point in sweep.points}) == 1
    for name in dict.fromkeys(name for point in sweep.points for name in point.means):
        points = [point for point in sweep.points if name in point.means]
        groups: dict[float, list[SweepPoint]] = {}  # one curve for each value of the setting that is not the x axis
        for point in points:
            groups.setdefault(point.guidance if over_std else point.std, []).append(point)
        label = "guidance" if over_std else "EMA length"
        best = best_point(name, points)
        yield Chart(
            title=name,
            unit="",
            lines=[_sweep_line(f"{label} {value:g}", name, groups[value], over_std) for value in sorted(groups)],
            x_unit="EMA length relative to training time" if over_std else "guidance weight",
            best=(best.std if over_std else best.guidance, best.means[name]),
            note=_sweep_note(sweep, name, points),
        )


def _sweep_note(sweep: SweepRecord, name: str, points: Sequence[SweepPoint]) -> str:
    best = best_point(name, points)
    note = f"Best {format_number(best.means[name])} at EMA length {best.std:.3f}, guidance {best.guidance:g}."
    if sweep.num_images is not None:
        note += f" {sweep.num_images:,} images per point."
    if any(point.fit > MAX_FIT for point in points):
        note += " Rings: poorly reconstructed, the snapshots are too far apart."
    return note


def best_point(name: str, points: Sequence[SweepPoint]) -> SweepPoint:
    """The point of a sweep with the best value of the metric `name`, which all of them have."""
    best = best_of(name, points, lambda point: point.means[name])
    assert best is not None  # reading has left out values that are not finite
    return best


def _sweep_line(label: str, metric: str, points: Sequence[SweepPoint], over_std: bool) -> Line:
    rows = [(p.std if over_std else p.guidance, p.means[metric], p.fit > MAX_FIT) for p in points]
    rows.sort(key=lambda row: row[0])
    drawn = [Point(x=x, mean=value, low=value, high=value) for x, value, _ in rows]
    return Line(label=label, points=drawn, hollow=[hollow for _, _, hollow in rows])


def _has(series: dict[str, Series], key: str) -> bool:
    return key in series and any(math.isfinite(value) for value in series[key].values)


def _chart(record: RunRecord, title: str, unit: str, curves: Curves, **more: Any) -> Chart:
    count = _MAX_POINTS if len(curves) <= _NAMED_LINES else _MAX_POINTS_OF_MANY
    lines = [Line(label=name, points=points) for name, series in curves if (points := thin(series, count))]
    x_unit, x_scale = unit_of(record.nimg)
    restarts = [(float(s["nimg"]), f"session {index} began") for index, s in enumerate(record.sessions[1:], start=2)]
    return Chart(title=title, unit=unit, lines=lines, x_unit=x_unit, x_scale=x_scale, marks=restarts, **more)


def _loss(record: RunRecord, series: Series) -> Chart:
    chart = _chart(record, "Loss", "", [("loss", series)], settles=True, wide=True)
    points = chart.lines[0].points
    if len(points) >= 20:
        smoothed = Line(label="smoothed", points=smooth(points))
        chart = replace(chart, lines=[Line(label="as reported", points=points, pale=True), smoothed])
    note = f"Now {format_number(chart.lines[-1].points[-1].mean)}."
    if begins_outside(chart):
        note += f" It began at {format_number(points[0].high)}, above the frame."
    return replace(chart, note=note)


def _speed(sec_per_kimg: Series) -> Series:
    speed = Series()
    for nimg, value in zip(sec_per_kimg.nimg, sec_per_kimg.values, strict=True):
        if value > 0 and math.isfinite(value):
            speed.add(nimg, 1e3 / value)
    return speed


def _maintenance_note(record: RunRecord) -> str:
    series = record.stats.series
    if not _has(series, MAINTENANCE) or not _has(series, SEC_PER_TICK):
        return ""
    aside, training = sum(series[MAINTENANCE].values), sum(series[SEC_PER_TICK].values)
    if not math.isfinite(aside + training) or aside + training <= 0:
        return ""
    return f"During training alone; {aside / (aside + training):.0%} of the time went to saving, samples and metrics."
