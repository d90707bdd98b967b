"""Line charts as SVG text: readable at the width of a phone, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from edm2.report.series import Point

WIDTH, HEIGHT = 420, 240  # of the drawing, in its own units: about pixels on the page
WIDE = 862  # two of them with the space between
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 36

MAX_MARKS = 120  # points with a note under the pointer
NUM_COLOURS = 6
_LOG_RATIO = 30  # values that differ more than so many times are drawn over logarithms
_SETTLED = 0.03  # the part of a long curve in which it may leave the frame


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    pale: bool = False  # in the background of the next one, with its colour
    hollow: Sequence[bool] = ()  # points to mark with a hollow ring


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: curves over a common axis."""

    title: str
    unit: str  # of the values; empty for pure numbers
    lines: Sequence[Line]
    x_unit: str
    x_scale: float = 1.0  # points' x in units of the axis
    marks: Sequence[tuple[float, str]] = ()  # vertical lines: x and what happened there
    best: tuple[float, float] | None = None  # a point to point out
    note: str = ""  # below
    settles: bool = False  # whether the beginning may leave the frame, to leave room for the rest
    zero: bool = False  # whether the frame begins at zero
    wide: bool = False  # whether it may take the place of two


def colour_of(index: int) -> str:
    """The style class of the `index`-th curve."""
    return f"c{index % NUM_COLOURS}"


def number(value: float) -> str:
    """A value for people: about four digits."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size == 0 or size >= 1e-3 else f"{value:.2e}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high], which differ."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], positive: powers of ten, with 2 and 5 times these over a short range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low <= 1000 else (1,)
    found = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
    return found[:: -(-len(found) // 8)] if found else [low, high]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """From values to places in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool
    clipped: bool  # whether a curve begins above the frame
    right: float  # where it ends in the drawing

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - _LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def svg(chart: Chart, *, width: int = WIDTH) -> str:
    """The drawing; it names no colour and needs the page's style sheet."""
    frame = replace(_frame(chart), right=width - _RIGHT)
    body = [_axes(chart, frame), *_marks(chart, frame)]
    curves, index = [], 0
    for line in chart.lines:
        curves.append(_curve(chart, line, frame, colour_of(index)))
        index += not line.pale
    body.append(_within_frame("".join(curves), frame) if frame.clipped else "".join(curves))
    if chart.best is not None:
        x, y = frame.x(chart.best[0] / chart.x_scale), frame.y(chart.best[1])
        body.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    label = escape(f"{chart.title} over {chart.x_unit}")
    inside = "".join(body)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">{inside}</svg>'


def _frame(chart: Chart) -> _Frame:
    points = [point for line in chart.lines for point in line.points]
    xs = [point.x / chart.x_scale for point in points]
    x_low, x_high = min(xs), max(xs)
    if chart.marks or chart.settles or chart.zero or x_low > 0.3 * x_high:
        x_low = min(x_low, 0.0) if x_low < 0.5 * x_high else x_low
    if x_low == x_high:
        x_low, x_high = (0.0, x_high) if x_high > 0 else (x_low - 1, x_high + 1)
    settled = points
    if chart.settles:
        start = x_low + _SETTLED * (x_high - x_low)
        settled = [point for point in points if point.x / chart.x_scale >= start] or points
    values = [value for point in settled for value in (point.low, point.high)]
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LOG_RATIO and not chart.zero
    if chart.zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    clipped = max(point.high for point in points) > high
    if log:
        margin = (high / low) ** 0.04
        low, high = low / margin, high * margin
    else:
        margin = (high - low) * 0.06
        low, high = (low if chart.zero and low == 0 else low - margin), high + margin
    return _Frame(x_low=x_low, x_high=x_high, y_low=low, y_high=high, log=log, clipped=clipped, right=WIDTH - _RIGHT)


def _axes(chart: Chart, frame: _Frame) -> str:
    right, bottom = frame.right, HEIGHT - _BOTTOM
    parts = []
    y_ticks = log_ticks(frame.y_low, frame.y_high) if frame.log else ticks(frame.y_low, frame.y_high, 5)
    for value, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right:g}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    x_ticks = ticks(frame.x_low, frame.x_high, 5 if right < WIDTH else 10)
    for value, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        x = frame.x(value)
        anchor = "end" if x > right - 8 else "middle"
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right:g}"/>')
    parts.append(f'<text class="unit" x="{right}" y="{HEIGHT - 5}" text-anchor="end">{escape(chart.x_unit)}</text>')
    return "".join(parts)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Texts of ticks, with the same decimals where they are evenly spaced."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return [f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") for value in values]
    texts = [f"{value:.10g}" for value in values]
    even = len(values) > 2 and math.isclose(values[1] - values[0], values[2] - values[1], rel_tol=1e-6)
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{value + 0:,.{min(decimals, 6)}f}" for value in values] if even else texts


def _within_frame(drawing: str, frame: _Frame) -> str:
    """`drawing` without what lies above the frame, where an inner drawing ends."""
    x, y, width, height = 0, _TOP, frame.right + _RIGHT, HEIGHT - _TOP
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{x} {y} {width} {height}">{drawing}</svg>'


def _marks(chart: Chart, frame: _Frame) -> list[str]:
    found = []
    for place, what in chart.marks:
        x = frame.x(place / chart.x_scale)
        if _LEFT <= x <= frame.right:
            line = f"M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"
            found.append(f'<path class="mark" d="{line}"><title>{escape(what)}</title></path>')
    return found


def _curve(chart: Chart, line: Line, frame: _Frame, colour: str) -> str:
    parts = []
    places = [(frame.x(p.x / chart.x_scale), frame.y(p.mean)) for p in line.points]
    if any(p.high > p.low for p in line.points):
        upper = [f"{x:.1f} {frame.y(p.high):.1f}" for (x, _), p in zip(places, line.points, strict=True)]
        lower = [f"{x:.1f} {frame.y(p.low):.1f}" for (x, _), p in zip(places, line.points, strict=True)]
        parts.append(f'<path class="band {colour}" d="M{"L".join(upper)}L{"L".join(reversed(lower))}Z"/>')
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    kind = "pale" if line.pale else "line"
    parts.append(f'<path class="{kind} {colour}" d="M{path}"><title>{escape(line.label)}</title></path>')
    if not line.pale and len(places) <= MAX_MARKS:
        shown = len(places) <= 24
        for index, ((x, y), point) in enumerate(zip(places, line.points, strict=True)):
            hollow = bool(line.hollow) and line.hollow[index]
            style = "ring" if hollow else "dot" if shown else "hidden"
            where = f"{number(point.x / chart.x_scale)} {chart.x_unit}"
            note = escape(f"{line.label}: {number(point.mean)} {chart.unit} at {where}".replace("  ", " "))
            radius = 2.6 if shown else 6
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
            parts.append(f'<circle class="{style} {colour}" {place}><title>{note}</title></circle>')
    return "".join(parts)


def begins_outside(chart: Chart) -> bool:
    """Whether the beginning of a curve lies above the frame."""
    return _frame(chart).clipped
