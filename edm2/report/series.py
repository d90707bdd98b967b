"""Curves from stats.jsonl: read line by line, damaged lines left out, long ones thinned."""

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

# Keys of stats.jsonl that give a line its place.
PROGRESS, TIMESTAMP = "Progress/kimg", "timestamp"


_LARGEST = 1e100  # beyond it, as with what is no number, a value has no place in a drawing


@dataclass(kw_only=True)
class Series:
    """One quantity over the run: values at image counts, in ascending order."""

    nimg: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.values)

    def add(self, nimg: float, value: float) -> None:
        """Append a point; what was at or beyond `nimg` was taken back by a restart, and goes."""
        while self.nimg and self.nimg[-1] >= nimg:
            self.nimg.pop()
            self.values.pop()
        self.nimg.append(nimg)
        self.values.append(value)

    @property
    def last(self) -> float:
        """The newest value."""
        return self.values[-1]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What stats.jsonl says."""

    series: dict[str, Series]  # numbers by key, in the order in which they first came
    texts: dict[str, str]  # the newest text by key
    num_lines: int  # whole lines
    num_damaged: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """Some neighbouring points of a series as one."""

    x: float
    mean: float
    low: float
    high: float


def read_stats(path: Path) -> Stats:
    """The content of `path`, none where there is no file. A line that is cut, or no record, counts as damaged."""
    series: dict[str, Series] = {}
    texts: dict[str, str] = {}
    whole = damaged = 0
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                record = _record(line)
                if record is None:
                    damaged += bool(line.strip())
                    continue
                whole += 1
                nimg = float(round(record.pop(PROGRESS) * 1e3))
                for key, value in record.items():
                    if isinstance(value, str):
                        texts[key] = value
                    elif isinstance(value, int | float) and not isinstance(value, bool):
                        series.setdefault(key, Series()).add(nimg, float(value))
    return Stats(series=series, texts=texts, num_lines=whole, num_damaged=damaged)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if math.isfinite(float(record[PROGRESS])) else None
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None


def thin(series: Series, max_points: int) -> list[Point]:
    """The points that can be drawn, or near equal groups of neighbours where there are more than `max_points`."""
    pairs = [(x, y) for x, y in zip(series.nimg, series.values, strict=True) if abs(y) < _LARGEST]
    count = min(len(pairs), max_points)
    edges = [round(i * len(pairs) / count) for i in range(count + 1)] if count else []
    points = []
    for start, stop in pairwise(edges):
        group = pairs[start:stop]
        values = [y for _, y in group]
        x = sum(x for x, _ in group) / len(group)
        points.append(Point(x=x, mean=math.fsum(values) / len(values), low=min(values), high=max(values)))
    return points


def smooth(points: Sequence[Point]) -> list[Point]:
    """Means of the neighbours on either side: a 40th of the curve, less at its end and where it begins, steeply."""
    reach = max(len(points) // 40, 1)
    found = []
    for i, point in enumerate(points):
        near = min(reach, i // 4, len(points) - 1 - i)
        mean = math.fsum(p.mean for p in points[i - near : i + near + 1]) / (2 * near + 1)
        found.append(Point(x=point.x, mean=mean, low=mean, high=mean))
    return found
