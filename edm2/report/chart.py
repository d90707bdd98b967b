"""Line charts as SVG, drawn with matplotlib; legible on a phone, in the colors of the page's light or dark theme."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.text import format_number
from edm2.report.record import Series

WIDTH, HEIGHT = 420, 240  # of a chart, in SVG units, which are about pixels of the page
WIDE = 862  # two charts and the gap between them
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 20, 36  # margins; the top has room for a factor such as 1e6

_MAX_DOTS = 24  # curves with more points have no dots
_LOG_RATIO = 30  # largest by smallest value from which the axis is logarithmic
_SETTLED = 0.03  # share of a long curve that may leave the frame
_MAX_VALUE = 1e100  # larger values, and those that are not finite, are not drawn
_DASHES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.6))}  # by name in CSS
_NUM_COLORS = 6  # of curves: variables c0 to c5 of the style sheet


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a series, or the mean and range of a group of neighbors."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    pale: bool = False  # background of the next curve, in the color of that
    hollow: Sequence[bool] = ()  # points drawn as rings


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over a common axis."""

    title: str
    unit: str  # of the values; empty for pure numbers
    lines: Sequence[Line]
    x_unit: str
    x_scale: float = 1.0  # one unit of the axis, in units of Point.x
    marks: Sequence[tuple[float, str]] = ()  # vertical lines: x and their meaning
    best: tuple[float, float] | None = None  # a point to mark
    note: str = ""  # text below the chart
    settles: bool = False  # the beginning may leave the frame, so that the rest is not flat
    zero: bool = False  # the value axis begins at zero
    wide: bool = False  # as wide as two charts on a wide page

    def curves(self) -> list[tuple[int, Line]]:
        """The lines with the index of their color; a pale line shares the color of the next one."""
        shown = [not line.pale for line in self.lines]
        return [(sum(shown[:i]) % _NUM_COLORS, line) for i, line in enumerate(self.lines)]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    clipped: bool  # True if a curve begins above the frame


@cache
def style_sheet() -> str:
    """The style sheet of the page."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


@cache
def _colors() -> dict[str, str]:
    """The light theme's colors by variable; drawings have these, which become variables, so no two may be equal."""
    light, _, _ = style_sheet().partition("}")
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))


def swatch(line: "Line", color: int) -> str:
    """The stroke of a curve, as an element of the page."""
    dashes = "pale" if line.pale else list(_DASHES)[color % len(_DASHES)]
    return f'<span class="swatch {dashes}" style="border-color: var(--c{color})"></span>'


def thin(series: Series, max_points: int) -> list[Point]:
    """The points that can be drawn, or nearly equal groups of neighbors if there are more than `max_points`."""
    nimg, values = np.array(series.nimg), np.array(series.values)
    drawable = np.abs(values) < _MAX_VALUE  # False for NaN
    nimg, values = nimg[drawable], values[drawable]
    count = min(len(values), max_points)
    edges = [round(i * len(values) / count) for i in range(1, count)]
    groups = zip(np.split(nimg, edges), np.split(values, edges), strict=True)
    return [Point(x=float(x.mean()), mean=float(y.mean()), low=min(y), high=max(y)) for x, y in groups if len(y)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Means over a 40th of the curve on either side; over less near its end and its beginning, which may be steep."""
    reach = max(len(points) // 40, 1)
    smoothed = []
    for i, point in enumerate(points):
        near = min(reach, i // 4, len(points) - 1 - i)
        mean = math.fsum(p.mean for p in points[i - near : i + near + 1]) / (2 * near + 1)
        smoothed.append(Point(x=point.x, mean=mean, low=mean, high=mean))
    return smoothed


def begins_outside(chart: Chart) -> bool:
    """True if the beginning of a curve lies above the frame."""
    return _frame(chart).clipped


def _frame(chart: Chart) -> _Frame:
    points = [point for line in chart.lines for point in line.points]
    x_low, x_high = _x_range(chart, [point.x / chart.x_scale for point in points])
    start = x_low + _SETTLED * (x_high - x_low) if chart.settles else -math.inf
    settled = [point for point in points if point.x / chart.x_scale >= start] or points
    low, high = min(point.low for point in settled), max(point.high for point in settled)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    clipped = any(point.high > high for point in points)
    log, y = _y_range(low, high, from_zero=chart.zero)
    return _Frame(x=(x_low, x_high), y=y, log=log, clipped=clipped)


def _y_range(low: float, high: float, *, from_zero: bool) -> tuple[bool, tuple[float, float]]:
    """Whether the axis is logarithmic, and its ends with a margin around the values."""
    if from_zero:
        low = min(low, 0.0)
    elif low > 0 and high / low > _LOG_RATIO:
        margin = (high / low) ** 0.04
        return True, (low / margin, high * margin)
    margin = (high - low) * 0.06
    return False, (low if from_zero and low == 0 else low - margin, high + margin)


def _x_range(chart: Chart, xs: list[float]) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    from_zero = chart.marks or chart.settles or chart.zero or low > 0.3 * high
    if 0 < low < 0.5 * high and from_zero:
        low = 0.0
    if low < high:
        return low, high
    return (0.0, high) if high > 0 else (low - 1, high + 1)


def svg(chart: Chart, *, width: int = WIDTH) -> str:
    """Draw the chart as an <svg> element of the page, whose style sheet defines its colors and font."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    titles, file = _Titles(), io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same drawing whatever the user's settings
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edm2"})
        FigureCanvasSVG(_figure(chart, width, titles)).print_svg(file, metadata={"Date": None})
    label = escape(f"{chart.title} over {chart.x_unit}")
    return _embedded(file.getvalue(), f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">', titles)


class _Titles(list[str]):
    """Texts under the pointer. matplotlib writes none, but keeps the ids (gid) of artists, which stand for them."""

    def add(self, text: str) -> str:
        self.append(text)
        return f"title-{len(self) - 1}"


def _figure(chart: Chart, width: int, titles: _Titles) -> Any:
    from matplotlib.figure import Figure

    frame = _frame(chart)
    # A figure of 72 dots per inch: a point, the unit of line widths, is one unit of the SVG.
    figure = Figure(figsize=(width / 72, HEIGHT / 72), dpi=72)
    size = (width - _LEFT - _RIGHT) / width, (HEIGHT - _TOP - _BOTTOM) / HEIGHT
    axes = figure.add_axes((_LEFT / width, _BOTTOM / HEIGHT, *size))
    _draw_axes(axes, chart, frame, num_ticks=6 if width < WIDE else 12)
    for place, meaning in chart.marks:
        if frame.x[0] <= place / chart.x_scale <= frame.x[1]:
            axes.axvline(place / chart.x_scale, color=_colors()["soft"], lw=1, ls=(0, (2, 3)), gid=titles.add(meaning))
    for color, line in chart.curves():
        _draw_curve(axes, chart, line, color, titles, clip=frame.clipped)
    if chart.best is not None:
        x, y = chart.best[0] / chart.x_scale, chart.best[1]
        axes.plot(x, y, "o", ms=14, mfc="none", mec=_colors()["ink"], mew=1.3, clip_on=False)
    return figure


def _draw_axes(axes: Any, chart: Chart, frame: _Frame, *, num_ticks: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    axes.set(xlim=frame.x, yscale="log" if frame.log else "linear", ylim=frame.y)
    for axis, count in ((axes.xaxis, num_ticks), (axes.yaxis, 6)):
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-4, 6))
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10], min_n_ticks=3))
        axis.set_major_formatter(formatter)
        axis.set_minor_locator(NullLocator())
    if frame.log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if frame.y[1] / frame.y[0] <= 1000 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_edgecolor(_colors()["soft"])
    axes.grid(axis="y", color=_colors()["rule"], lw=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=4, width=1, color=_colors()["soft"])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(chart.x_unit, loc="right", labelpad=2)


def _draw_curve(axes: Any, chart: Chart, line: Line, color: int, titles: _Titles, *, clip: bool) -> None:
    paint = _colors()[f"c{color}"]
    xs = [point.x / chart.x_scale for point in line.points]
    if any(point.high > point.low for point in line.points):
        bounds = [point.low for point in line.points], [point.high for point in line.points]
        axes.fill_between(xs, *bounds, color=paint, alpha=0.18, lw=0)
    means = [point.mean for point in line.points]
    width, alpha, dashes = (1, 0.4, "-") if line.pale else (1.8, 1, list(_DASHES.values())[color % len(_DASHES)])
    axes.plot(xs, means, color=paint, lw=width, alpha=alpha, ls=dashes, gid=titles.add(line.label))
    if line.pale or len(xs) > _MAX_DOTS:
        return
    for x, y, hollow in zip(xs, means, line.hollow or [False] * len(xs), strict=True):
        text = " ".join(f"{line.label}: {format_number(y)} {chart.unit} at {format_number(x)} {chart.x_unit}".split())
        face, width = (_colors()["page"], 1.5) if hollow else (paint, 0)
        axes.plot(x, y, "o", ms=5, mfc=face, mec=paint, mew=width, clip_on=clip, gid=titles.add(text))


def _embedded(drawing: str, head: str, titles: Sequence[str]) -> str:
    """The content of an SVG file by matplotlib, as an element of an HTML page with the start tag `head`."""
    body = drawing[drawing.index("</defs>") + len("</defs>") :]  # after metadata and a style sheet, which would leak
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)  # each text is repeated in a comment
    body = re.sub(r">\s+<", "><", body)
    used = set(re.findall(r"#([\w-]+)[\")]", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used or m[1].startswith("title-") else "", body)
    body = re.sub(r' d="([^"]*)"', lambda m: f' d="{_short(m[1])}"', body)
    for name, color in _colors().items():
        body = body.replace(color, f"var(--{name})")
    return head + re.sub(r'<g id="title-(\d+)">', lambda m: f"<g><title>{escape(titles[int(m[1])])}</title>", body)


def _short(path: str) -> str:
    """A path's coordinates with two decimals in place of six."""
    return " ".join(re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), path).split())
