"""What a run's folder says about it, as far as it can be read."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from dnnlib.errors import ConfigError, reason_of
from edm2.report.series import Stats, read_stats
from training.run.run_samples import FORMAT as GRID_FORMAT
from training.run.run_samples import TEXT_KEY
from training.run.sessions import SESSIONS_FILE

_MAX_JSON = 64 << 20  # bytes of a file that may be a sweep's record


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A sample grid."""

    path: Path
    nimg: int
    about: dict[str, Any]  # the record in the file, see training/run/run_samples.py; empty where it cannot be read


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
    num_images: int | None  # a point
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
        """How far the run has come, as far as is known: statistics, else files."""
        known = [series.nimg[-1] for series in self.stats.series.values() if len(series)]
        known += [grid.nimg for grid in self.grids]
        return int(max(known, default=0))

    @property
    def duration(self) -> int | None:
        """Images that the run is to take."""
        value = self.options.get("duration")
        return value if isinstance(value, int) and value > 0 else None


def read_run(path: Path, sweeps: Sequence[Path] = ()) -> RunRecord:
    """Everything in the run folder `path`, with the sweeps in it and those in the files `sweeps`.

    Raises ConfigError where `path` holds no run, or one of `sweeps` is no record of sweep.py.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; name the --outdir of a training run")
    options_file, stats_file = path / "training_options.json", path / "stats.jsonl"
    if not options_file.exists() and not stats_file.exists():
        raise ConfigError(f"{path} holds no training run: neither training_options.json nor stats.jsonl is there")
    notes: list[str] = []
    stats = _readable(stats_file, read_stats)
    if stats.num_damaged:
        lines = f"{stats.num_damaged} line{'s' * (stats.num_damaged > 1)}"
        notes.append(f"stats.jsonl: {lines} could not be read and {'are' if stats.num_damaged > 1 else 'is'} left out.")
    options = _json_object(options_file)
    if options is None:
        notes.append("training_options.json is missing or damaged: the options are not shown.")
    snapshots = sorted(path.glob("network-snapshot-*-*.*"), key=lambda file: _numbers(file.name))
    checkpoints = sorted(path.glob("training-state-*"), key=lambda file: _numbers(file.name))
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


def _readable(path: Path, read: Callable[[Path], Stats]) -> Stats:
    try:
        return read(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None


def _numbers(name: str) -> list[float]:
    return [float(text) for text in re.findall(r"\d+(?:\.\d+)?", name)]


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_JSON else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sessions(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    found, damaged = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError:
        lines, damaged = [], 1
    for line in lines:
        try:
            entry = json.loads(line)
            found.append({**entry, "nimg": int(entry["nimg"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged += 1
    if damaged:
        notes.append(f"{SESSIONS_FILE}: {damaged} line{'s' * (damaged > 1)} could not be read.")
    return found


def _grids(path: Path, notes: list[str]) -> list[Grid]:
    found = []
    for file in sorted(path.glob("samples-*.png")):
        kimg = _numbers(file.stem)
        try:
            with PIL.Image.open(file) as image:
                image.verify()
                text = image.info.get(TEXT_KEY, "{}")
            about = json.loads(text) if isinstance(text, str) else {}
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
            notes.append(f"{file.name} is no readable picture and is left out.")
            continue
        if not isinstance(about, dict) or about.get("format") != GRID_FORMAT:
            about = {}
        nimg = about.get("nimg")
        if isinstance(nimg, int) or kimg:
            found.append(Grid(path=file, nimg=nimg if isinstance(nimg, int) else int(kimg[0] * 1e3), about=about))
    return sorted(found, key=lambda grid: grid.nimg)


def _sweeps(path: Path, named: Sequence[Path]) -> list[SweepRecord]:
    found = {}
    for file in [*sorted(path.glob("*.json")), *named]:
        record = _sweep(file)
        if record is not None:
            found[file.resolve()] = record
        elif file in named:
            raise ConfigError(f"--sweep={file} is no record of sweep.py; name the file that its --json wrote")
    return list(found.values())


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
                means={str(k): float(v) for k, v in entry["mean"].items() if math.isfinite(float(v))},
            )
            for entry in value["points"]
        ]
        num = value.get("settings", {}).get("num_images")
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return SweepRecord(path=path, num_images=num if isinstance(num, int) else None, points=points) if points else None
