"""The record of a run: everything that can be read from its folder."""

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from training.images.decode import Unreadable, open_image
from training.run.run_samples import FORMAT as GRID_FORMAT
from training.run.run_samples import TEXT_KEY
from training.run.session import SESSIONS_FILE
from training.snapshot import KIMG, nimg_from_name

# Keys of stats.jsonl that tell the position of a line.
PROGRESS, TIMESTAMP = "Progress/kimg", "timestamp"

_MAX_NIMG = 10**15
_MAX_NUMBER = 1e150  # of what is drawn, whose squares and differences must be finite
_MAX_DEPTH = 50  # of JSON, which others than its parser walk through as well
_MAX_JSON = 64 << 20  # bytes of a file that may be a sweep's record


@dataclass(kw_only=True)
class Series:
    """One quantity over the run: values at image counts, in ascending order."""

    nimg: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.values)

    def add(self, nimg: float, value: float) -> None:
        """Append a point. Points from `nimg` on are removed first: a restart took them back."""
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
    """The content of stats.jsonl."""

    series: dict[str, Series]  # numbers by key, in the order of first appearance
    texts: dict[str, str]  # the newest text by key
    num_lines: int  # without damaged ones
    num_damaged: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A sample grid."""

    path: Path
    nimg: int
    about: dict[str, Any]  # the record in the file, see training/run/run_samples.py; empty if unreadable


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A point of sweep.py's record."""

    std: float
    guidance: float
    fit: float
    means: dict[str, float]  # by metric


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A file of sweep.py."""

    path: Path
    num_images: int | None  # per point
    points: list[SweepPoint]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, read from its folder."""

    path: Path
    options: dict[str, Any]
    stats: Stats
    sessions: list[dict[str, Any]]
    grids: list[Grid]
    snapshots: list[Path]  # in the order of images, then of EMA lengths
    checkpoint: Path | None  # the newest
    sweeps: list[SweepRecord]
    notes: list[str]  # what could not be read, for the user

    @property
    def nimg(self) -> int:
        """Images of training so far, as known from statistics and sample grids."""
        known = [series.nimg[-1] for series in self.stats.series.values() if len(series)]
        known += [grid.nimg for grid in self.grids]
        return int(max(known, default=0))

    @property
    def duration(self) -> int | None:
        """Images of training that the run is configured for."""
        value = self.options.get("duration")
        return value if isinstance(value, int) and 0 < value <= _MAX_NIMG else None


def read_run(path: Path, sweeps: Sequence[Path] = ()) -> RunRecord:
    """Read the run folder `path` with its sweeps and those in the files `sweeps`. Raises ConfigError for others."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; name the --outdir of a training run")
    options_file, stats_file = path / "training_options.json", path / "stats.jsonl"
    if not options_file.exists() and not stats_file.exists():
        raise ConfigError(f"{path} contains no training run: neither training_options.json nor stats.jsonl exists")
    notes: list[str] = []
    try:
        stats = read_stats(stats_file)
    except OSError as error:
        raise ConfigError(f"{stats_file} cannot be read: {reason_of(error)}") from None
    if stats.num_damaged:
        lines = f"{stats.num_damaged} line{'s' * (stats.num_damaged > 1)}"
        notes.append(f"stats.jsonl: {lines} could not be read and {'are' if stats.num_damaged > 1 else 'is'} left out.")
    options = _json_object(options_file)
    if options is None:
        notes.append("training_options.json is missing or damaged: the options are not shown.")
    snapshots = sorted(path.glob("network-snapshot-*-*.*"), key=_order)
    checkpoints = sorted(path.glob("training-state-*"), key=_order)
    return RunRecord(
        path=path,
        options=options or {},
        stats=stats,
        sessions=_sessions(path / SESSIONS_FILE, notes),
        grids=_grids(path, notes),
        snapshots=[file for file in snapshots if file.suffix in (".pkl", ".safetensors")],
        checkpoint=checkpoints[-1] if checkpoints else None,
        sweeps=_sweeps(path, sweeps),
        notes=notes,
    )


def read_stats(path: Path) -> Stats:
    """The content of `path`, empty if it does not exist. Lines that are cut or not a record count as damaged."""
    series: dict[str, Series] = {}
    texts: dict[str, str] = {}
    num_lines = num_damaged = 0
    for line in _lines(path):
        entry = _stats_line(line)
        if entry is None:
            num_damaged += bool(line.strip())
            continue
        num_lines += 1
        nimg = float(round(entry.pop(PROGRESS) * 1e3))
        for key, value in entry.items():
            if isinstance(value, str):
                texts[key] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(key, Series()).add(nimg, _drawable(value))
    return Stats(series=series, texts=texts, num_lines=num_lines, num_damaged=num_damaged)


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def _stats_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        return entry if abs(float(entry[PROGRESS])) * 1e3 <= _MAX_NIMG else None
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None


def _drawable(value: float) -> float:
    """Return `value` as a float; infinite if it is too large for a chart, 0 if its inverse is."""
    if abs(value) < 1 / _MAX_NUMBER:
        return 0.0
    return float(value) if not abs(value) > _MAX_NUMBER else math.copysign(math.inf, 1 if value > 0 else -1)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for children in lists for child in children]
    return bool(level)


def _numbers(name: str) -> list[float]:
    return [float(text) for text in re.findall(r"\d+(?:\.\d+)?", name)]


def _order(file: Path) -> tuple[int, str]:
    """Return the image count in the name of a snapshot or checkpoint, then the name."""
    match = re.search(rf"-({KIMG})[-.]", file.name)
    return (0 if match is None else nimg_from_name(match[1])), file.name


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        readable = path.is_file() and path.stat().st_size <= _MAX_JSON
        value = json.loads(path.read_text(encoding="utf-8")) if readable else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not _is_deep(value) else None


def _sessions(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    sessions, damaged = [], 0
    try:
        lines = list(_lines(path))
    except OSError:
        lines, damaged = [], 1
    for line in lines:
        try:
            entry = json.loads(line)
            if abs(entry["nimg"]) > _MAX_NIMG or _is_deep(entry):
                raise ValueError("no session has this")
            sessions.append({**entry, "nimg": int(entry["nimg"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            damaged += 1
    if damaged:
        notes.append(f"{SESSIONS_FILE}: {damaged} line{'s' * (damaged > 1)} could not be read.")
    return sessions


def _grids(path: Path, notes: list[str]) -> list[Grid]:
    grids = []
    for file in sorted(file for file in path.glob("samples-*.png") if file.is_file()):
        kimg = _numbers(file.stem)
        try:
            with open_image(file.read_bytes()) as image:
                image.verify()
                text = image.info.get(TEXT_KEY, "{}")
            about = json.loads(text) if isinstance(text, str) else {}
        except (OSError, ValueError, RecursionError, Unreadable):
            notes.append(f"{file.name} is not a readable image and is left out.")
            continue
        if not isinstance(about, dict) or about.get("format") != GRID_FORMAT:
            about = {}
        nimg = about.get("nimg")
        if (isinstance(nimg, int) and abs(nimg) > _MAX_NIMG) or (kimg and kimg[0] * 1e3 > _MAX_NIMG):
            continue
        if isinstance(nimg, int) or kimg:
            grids.append(Grid(path=file, nimg=nimg if isinstance(nimg, int) else round(kimg[0] * 1e3), about=about))
    return sorted(grids, key=lambda grid: grid.nimg)


def _sweeps(path: Path, named: Sequence[Path]) -> list[SweepRecord]:
    sweeps = {}
    for file in [*sorted(path.glob("*.json")), *named]:
        record = _sweep(file)
        if record is not None:
            sweeps[file.resolve()] = record
        elif file in named:
            raise ConfigError(f"--sweep={file} is not a record of sweep.py; name the file that its --json wrote")
    return list(sweeps.values())


def _sweep(path: Path) -> SweepRecord | None:
    value = _json_object(path)
    if value is None or value.get("format") != "edm2-sweep":
        return None
    try:
        points = [
            SweepPoint(
                std=float(entry["ema_std"]),
                guidance=float(entry["guidance"]),
                fit=float(entry["fit"]),
                means={str(k): float(v) for k, v in entry["mean"].items() if abs(float(v)) <= _MAX_NUMBER},
            )
            for entry in value["points"]
        ]
        num = value.get("settings", {}).get("num_images")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    if not all(abs(number) <= _MAX_NUMBER for point in points for number in (point.std, point.guidance, point.fit)):
        return None
    return SweepRecord(path=path, num_images=num if isinstance(num, int) else None, points=points) if points else None
