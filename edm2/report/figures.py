"""Which curves a report draws: loss, learning rate, speed, memory, metrics, whatever else there is, and sweeps."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from edm2.report.chart import Chart, Line, begins_outside, number
from edm2.report.record import RunRecord, SweepRecord
from edm2.report.series import TIMESTAMP, Point, Series, smooth, thin
from training.metrics.metric_table import METRICS

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
_MAX_FIT = 0.1  # as sweep.py judges: beyond it, the snapshots are too far apart for the length


def unit_of(nimg: float) -> tuple[str, float]:
    """The unit of image counts up to `nimg`, and how many images it is."""
    return ("million images", 1e6) if nimg >= 1e6 else ("thousand images", 1e3)


def main_charts(record: RunRecord) -> list[Chart]:
    """Loss, learning rate, throughput and memory, as far as there are statistics of them."""
    series = record.stats.series
    found = []
    if _has(series, LOSS):
        found.append(_loss(record, series[LOSS]))
    if _has(series, RATE):
        found.append(_chart(record, "Learning rate", "", [("learning rate", series[RATE])], zero=True))
    if _has(series, SEC_PER_KIMG):
        speed = _speed(series[SEC_PER_KIMG])
        if len(speed):
            note = _maintenance_note(record)
            found.append(_chart(record, "Throughput", "images/s", [("images per second", speed)], zero=True, note=note))
    memory = [(name, series[key]) for key, name in MEMORY.items() if _has(series, key) and max(series[key].values) > 0]
    if memory:
        found.append(_chart(record, "Memory", "GiB", memory, zero=True))
    return found


def metric_names(record: RunRecord) -> dict[str, list[tuple[str, Series]]]:
    """The metrics that were measured while training: for each, the EMA lengths with their curves."""
    found: dict[str, list[tuple[str, Series]]] = defaultdict(list)
    for key, series in record.stats.series.items():
        name, _, std = key.removeprefix(METRIC_PREFIX).rpartition("-")
        if key.startswith(METRIC_PREFIX) and name and any(math.isfinite(value) for value in series.values):
            found[name].append((std, series))
    return dict(found)


def best_of(name: str, curves: Sequence[tuple[str, Series]]) -> tuple[float, float, str]:
    """The best value of a metric: image count, value, EMA length."""
    lower = name not in METRICS or METRICS[name].lower_is_better
    points = [
        (value if lower else -value, nimg, value, std)
        for std, series in curves
        for nimg, value in zip(series.nimg, series.values, strict=True)
        if math.isfinite(value)
    ]
    _, nimg, value, std = min(points)
    return nimg, value, std


def metric_charts(record: RunRecord) -> list[Chart]:
    """A figure for each metric, a curve for each EMA length."""
    charts = []
    for name, curves in metric_names(record).items():
        nimg, value, std = best_of(name, curves)
        unit, scale = unit_of(record.nimg)
        better = "lower" if name not in METRICS or METRICS[name].lower_is_better else "higher"
        note = f"Best {number(value)} at {number(nimg / scale)} {unit}, EMA length {std} ({better} is better)."
        lines = [(f"EMA length {std}", series) for std, series in curves]
        charts.append(_chart(record, name, "", lines, best=(nimg, value), note=note))
    return charts


def other_charts(record: RunRecord) -> list[Chart]:
    """Figures of all further statistics, by the first part of their names; of names like a/b/c, by the first two."""
    known = {LOSS, RATE, SEC_PER_KIMG, MAINTENANCE, SEC_PER_TICK, TOTAL_SEC, TIMESTAMP, *MEMORY}
    groups: dict[str, list[tuple[str, Series]]] = defaultdict(list)
    for key, series in record.stats.series.items():
        if key not in known and not key.startswith(METRIC_PREFIX) and _has({key: series}, key):
            parts = key.split("/")
            group = "/".join(parts[: min(2, len(parts) - 1)]) or key
            groups[group].append((key.removeprefix(f"{group}/"), series))
    charts = []
    for group, curves in list(groups.items())[:_MAX_CHARTS]:
        note = ""
        if len(curves) > _NAMED_LINES:
            ends = sorted((series.last, name) for name, series in curves if math.isfinite(series.last))
            note = f"{len(curves)} curves" + (f"; the first {_MAX_LINES} are drawn" * (len(curves) > _MAX_LINES))
            if ends:
                (low, lowest), (high, highest) = ends[0], ends[-1]
                note += f". In the end, highest: {highest} {number(high)}; lowest: {lowest} {number(low)}."
        charts.append(_chart(record, group, "", curves[:_MAX_LINES], note=note))
    return charts


def sweep_charts(sweep: SweepRecord) -> Iterator[Chart]:
    """Figures of a sweep, one for each metric: over the EMA length, or over the guidance where there is one length."""
    stds = {point.std for point in sweep.points}
    weights = sorted({point.guidance for point in sweep.points})
    over_std = len(stds) > 1 or len(weights) == 1
    for name in dict.fromkeys(name for point in sweep.points for name in point.means):
        points = [point for point in sweep.points if name in point.means]
        lines = []
        for value in weights if over_std else sorted(stds):
            own = [p for p in points if (p.guidance if over_std else p.std) == value]
            own.sort(key=lambda p: p.std if over_std else p.guidance)
            if own:
                places = [p.std if over_std else p.guidance for p in own]
                label = f"guidance {value:g}" if over_std else f"EMA length {value:g}"
                marks = [
                    Point(x=x, mean=p.means[name], low=p.means[name], high=p.means[name])
                    for x, p in zip(places, own, strict=True)
                ]
                lines.append(Line(label=label, points=marks, hollow=[p.fit > _MAX_FIT for p in own]))
        lower = name not in METRICS or METRICS[name].lower_is_better
        best = (min if lower else max)(points, key=lambda p: p.means[name])
        note = f"Best {number(best.means[name])} at EMA length {best.std:.3f}, guidance {best.guidance:g}."
        if sweep.num_images is not None:
            note += f" {sweep.num_images:,} images a point."
        if any(point.fit > _MAX_FIT for point in points):
            note += " Rings: poorly reconstructed, the snapshots are too far apart."
        yield Chart(
            title=name,
            unit="",
            lines=lines,
            x_unit="EMA length relative to training time" if over_std else "guidance weight",
            best=(best.std if over_std else best.guidance, best.means[name]),
            note=note,
        )


def _has(series: dict[str, Series], key: str) -> bool:
    return key in series and any(math.isfinite(value) for value in series[key].values)


def _chart(
    record: RunRecord,
    title: str,
    unit: str,
    curves: Sequence[tuple[str, Series]],
    *,
    zero: bool = False,
    best: tuple[float, float] | None = None,
    note: str = "",
) -> Chart:
    x_unit, x_scale = unit_of(record.nimg)
    count = _MAX_POINTS if len(curves) <= _NAMED_LINES else _MAX_POINTS_OF_MANY
    lines = [Line(label=name, points=points) for name, series in curves if (points := thin(series, count))]
    marks = restarts(record)
    return Chart(
        title=title,
        unit=unit,
        lines=lines,
        x_unit=x_unit,
        x_scale=x_scale,
        marks=marks,
        zero=zero,
        best=best,
        note=note,
    )


def restarts(record: RunRecord) -> list[tuple[float, str]]:
    """Where sessions after the first one began."""
    return [
        (float(session["nimg"]), f"session {index} began")
        for index, session in enumerate(record.sessions, start=1)
        if index > 1
    ]


def _loss(record: RunRecord, series: Series) -> Chart:
    points = thin(series, _MAX_POINTS)
    lines = [Line(label="loss", points=points)]
    if len(points) >= 20:
        lines = [
            Line(label="as reported", points=points, pale=True),
            Line(label="smoothed", points=smooth(points)),
        ]
    x_unit, x_scale = unit_of(record.nimg)
    chart = Chart(
        title="Loss",
        unit="",
        lines=lines,
        x_unit=x_unit,
        x_scale=x_scale,
        marks=restarts(record),
        settles=True,
        wide=True,
    )
    note = f"Now {number(lines[-1].points[-1].mean)}."
    if begins_outside(chart):
        note += f" It began at {number(points[0].high)}, above the frame."
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
    aside, training = math.fsum(series[MAINTENANCE].values), math.fsum(series[SEC_PER_TICK].values)
    if not math.isfinite(aside + training) or aside + training <= 0:
        return ""
    return f"Of training alone; {aside / (aside + training):.0%} of the time went to saving, samples and metrics."
