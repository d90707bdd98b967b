"""Results for people and for programs: repeated values summed up, a table, and a record with what repeats them."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import write_text
from dnnlib.download import is_url, open_url
from dnnlib.errors import ConfigError, reason_of
from torch_utils.distributed import World
from training.metrics.available import Plan
from training.metrics.detectors import Detector
from training.metrics.detectors.weights import file_sha256
from training.metrics.metric_table import METRICS
from training.metrics.scores import Score

FORMAT = "edm2-metrics-result"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over several disjoint sets of images."""

    values: list[float]
    errors: list[float | None]  # of each value, as in Score
    minimum: float  # what the papers report
    mean: float
    std: float | None  # divisor n - 1; None for a single set


def summarize(runs: Sequence[Mapping[str, Score]]) -> dict[str, Summary]:
    """The scores of all runs, by metric."""
    summaries = {}
    for name in runs[0]:
        values = [run[name].value for run in runs]
        summaries[name] = Summary(
            values=values,
            errors=[run[name].error for run in runs],
            minimum=min(values),
            mean=fmean(values),
            std=stdev(values) if len(values) > 1 else None,
        )
    return summaries


def table(summaries: Mapping[str, Summary], *, num_images: int, wanted: int) -> list[str]:
    """The lines of a table: a metric per line, then what to know about the number of images."""
    rows = [["metric", "images", "value", *(["minimum", "mean ± std"] if _repeated(summaries) else [])]]
    for name, summary in summaries.items():
        values = [
            _number(value) + (f" ± {_number(error)}" if error is not None else "")
            for value, error in zip(summary.values, summary.errors, strict=True)
        ]
        row = [name, f"{num_images}" + ("*" if num_images < wanted else ""), "  ".join(values)]
        if summary.std is not None:
            row += [_number(summary.minimum), f"{_number(summary.mean)} ± {_number(summary.std)}"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if num_images < wanted:
        lines.append(
            f"* fewer than the {wanted} that were asked for: not comparable to results for {wanted} images; the Fréchet"
            " distances are too high"
        )
    return lines


def notes(skipped: Mapping[str, str], detectors: Mapping[str, Detector]) -> list[str]:
    """Lines about metrics that were left out, by reason, and about weights that are not the published ones."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"Skipped {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    for name, detector in detectors.items():
        if not detector.published:
            lines.append(f"{detector.weights_path} is not the published weights file of {name}: no published numbers")
    return lines


def result_record(
    summaries: Mapping[str, Summary], plan: Plan, *, world: World, num_images: int, wanted: int
) -> dict[str, Any]:
    """The results and what they were computed with, for a JSON file; images and reference are for the caller to add."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "results": {name: _entry(name, summary) for name, summary in summaries.items()},
        "skipped": plan.skipped,
        "num_images": num_images,
        "num_images_wanted": wanted,
        "fewer_images_than_wanted": num_images < wanted,
        "detectors": described_detectors(plan),
        "device": str(world.device),
        "device_name": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "processes": world.size,
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def described_detectors(plan: Plan) -> dict[str, Any]:
    """The weights of the networks that measure."""
    return {
        name: {**described_file(detector.weights_path), "published_weights": detector.published}
        for name, detector in plan.detectors.items()
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to `path`, whole or not at all."""
    try:
        write_text(path, json.dumps(for_json(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None


def read_results(path: Path, request: Mapping[str, Any]) -> dict[str, float] | None:
    """The mean of each metric in the record at `path`; None where there is no such file.

    Raises ConfigError where it is no record, or one of another `request`: entries of a record, as for `write_json`.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["format_version"] != VERSION:
            raise ValueError
        results = {name: fmean(map(float, entry["values"])) for name, entry in record["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ConfigError(f"{path} is there, and is no record of results; name another file") from None
    wanted = json.loads(json.dumps(for_json(request)))
    changed = sorted(key for key in wanted if record.get(key) != wanted[key])
    if changed:
        raise ConfigError(
            f"{path} holds results of another request (other {', '.join(changed)}); name another file, or delete it"
        )
    return results


def described_file(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Name and SHA-256 digest of a file, of the local copy where `source` is a URL; of a folder, see folder_sha256."""
    place = Path(open_url(str(source), return_filename=True)) if is_url(source) else Path(source)
    digest = folder_sha256(place) if place.is_dir() else file_sha256(place) if place.is_file() else None
    return {"path": str(source), "sha256": digest}


def folder_sha256(folder: Path) -> str:
    """A digest of a folder's contents: SHA-256 of the lines `{digest of the file}  {name}` in the order of names.

    With GNU tools: find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum
    """
    names = sorted(
        (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), key=str.encode
    )
    lines = (f"{file_sha256(folder / name)}  {name}\n" for name in names)
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
    return total.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of what the numbers may depend on."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    for package in ("edm2", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout; not installed
            found[package] = None
    return found


def for_json(value: Any) -> Any:
    """`value` with numbers that JSON lacks (inf, nan) as texts, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return str(value) if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)) else value


def _entry(name: str, summary: Summary) -> dict[str, Any]:
    return {
        "values": summary.values,
        "errors": None if None in summary.errors else summary.errors,
        "minimum": summary.minimum,
        "mean": summary.mean,
        "std": summary.std,
        "lower_is_better": METRICS[name].lower_is_better,
        "description": METRICS[name].description,
    }


def _repeated(summaries: Mapping[str, Summary]) -> bool:
    return any(summary.std is not None for summary in summaries.values())


def _number(value: float) -> str:
    """Four decimals, or three digits where these are zeros."""
    return f"{value:.4f}" if value == 0 or not math.isfinite(value) or abs(value) >= 0.01 else f"{value:.3g}"
