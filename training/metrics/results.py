"""Results: a summary of repeated values, a table, and a JSON record with everything needed to repeat them."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import write_text
from dnnlib.download import is_url, open_url
from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import installed_version
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.metrics.available import Plan
from training.metrics.detectors import Detector
from training.metrics.detectors.common import file_sha256
from training.metrics.distances import Score
from training.metrics.metric_table import METRICS, compact_names
from training.sampling.request import SamplingRequest
from training.sampling.sampler import sampler_keywords

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
    """Summarize the scores of all runs, by metric."""
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
    """Return the lines of a table with a metric per line; a note follows if there are fewer images than `wanted`."""
    repeated = any(summary.std is not None for summary in summaries.values())
    rows = [["metric", "images", "value", *(["minimum", "mean ± std"] if repeated else [])]]
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
            f"* fewer than the {wanted} that were asked for: not comparable to results for {wanted} images; Fréchet"
            " distances are too high"
        )
    return lines


def notes(skipped: Mapping[str, str], detectors: Mapping[str, Detector]) -> list[str]:
    """Return lines on skipped metrics, by reason, and on weights that are not the published ones."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"Skipped {', '.join(compact_names(names))}: {reason}" for reason, names in by_reason.items()]
    for name, detector in detectors.items():
        if not detector.published:
            path = detector.weights_path
            lines.append(f"{path} is not the published weights file of {name}: not comparable to published numbers")
    return lines


@dataclass(frozen=True, kw_only=True)
class Request:
    """A measurement that was asked for. `facts` are entries of its record; making them may read large files."""

    command: str
    num_images: int
    wanted: int  # number of images asked for
    ref: str | None
    facts: Callable[[], dict[str, Any]]

    def origin(self) -> dict[str, Any]:
        """Return the entries of the record that tell what was measured."""
        reference = None if self.ref is None else described_file(self.ref)
        return {"command": self.command, "reference": reference, **self.facts()}


def result_record(summaries: Mapping[str, Summary], plan: Plan, *, world: World, request: Request) -> dict[str, Any]:
    """Return the results and everything needed to repeat them, for a JSON file."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "results": {name: _entry(name, summary) for name, summary in summaries.items()},
        "skipped": plan.skipped,
        "num_images": request.num_images,
        "num_images_wanted": request.wanted,
        "fewer_images_than_wanted": request.num_images < request.wanted,
        "detectors": described_detectors(plan),
        "device": str(world.device),
        "device_name": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "processes": world.size,
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **request.origin(),
    }


def described_detectors(plan: Plan) -> dict[str, Any]:
    """Return files and digests of the detectors' weights."""
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
    """Return each metric's mean in the record at `path`; None if missing. Raises ConfigError for other requests."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["format_version"] != VERSION:
            raise ValueError
        results = {name: fmean(map(float, entry["values"])) for name, entry in record["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ConfigError(f"{path} exists and is not a record of results; name another file") from None
    wanted = json.loads(json.dumps(for_json(request)))
    changed = sorted(key for key in wanted if record.get(key) != wanted[key])
    if changed:
        raise ConfigError(
            f"{path} holds results of another request (other {', '.join(changed)}); name another file, or delete it"
        )
    return results


def existing_results(world: World, path: Path, request: Request, plan: Plan) -> dict[str, float] | None:
    """Return in every process the means in the record at `path`; None if it does not exist. Raises ConfigError."""

    def read() -> dict[str, float] | None:
        counts = {"num_images": request.num_images, "num_images_wanted": request.wanted}
        results = read_results(path, {**counts, **request.origin(), "detectors": described_detectors(plan)})
        if results is not None and set(results) != set(plan.metrics):
            raise ConfigError(
                f"{path} holds {', '.join(results)}, not {', '.join(plan.metrics)}; name another file, or delete it"
            )
        return results

    return on_main(world, read)


def described_file(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Return name and SHA-256 digest of a file, a URL (of its local copy) or a folder (`folder_sha256`)."""
    path = Path(open_url(str(source), return_filename=True)) if is_url(source) else Path(source)
    digest = folder_sha256(path) if path.is_dir() else file_sha256(path) if path.is_file() else None
    return {"path": str(source), "sha256": digest}


def described_sampling(request: SamplingRequest) -> dict[str, Any]:
    """Return files and settings of the sampling behind generated images."""
    return {
        "net": described_file(request.net),
        "gnets": [described_file(guide) for guide in request.gnets],
        **{name: described_file(path) for name, path in request.condition_files().items()},
        "sampler": sampler_keywords(request.sampler),
        **request.prepare().settings,
        **request.decoder.settings,
    }


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the lines `{digest of the file}  {name}` of a folder's files, sorted by name.

    With GNU tools: find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum
    """
    names = sorted(
        (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), key=str.encode
    )
    lines = (f"{file_sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> dict[str, str | None]:
    """Return the versions of software that the numbers may depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {**found, **{package: installed_version(package) for package in ("edm2", "transformers")}}


def for_json(value: Any) -> Any:
    """Return `value` with numbers that JSON lacks (inf, nan) as texts, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return str(value) if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)) else value


def _entry(name: str, summary: Summary) -> dict[str, Any]:
    return {
        **asdict(summary),
        "errors": None if None in summary.errors else summary.errors,
        "lower_is_better": METRICS[name].lower_is_better,
        "description": METRICS[name].description,
    }


def _number(value: float) -> str:
    """Four decimals, or three digits for values so small that these would be mostly zeros."""
    return f"{value:.4f}" if value == 0 or not math.isfinite(value) or abs(value) >= 0.01 else f"{value:.3g}"
