"""Conversion of networks between published pickle, .safetensors and model folder, from files, URLs and hub names."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from dnnlib import hub
from dnnlib.disk import make_folder, require_folder
from dnnlib.download import is_url
from dnnlib.errors import ConfigError, reason_of
from dnnlib.parse import split_url
from training.run.run_folder import RunFolder
from training.sharing.model_card import CardFacts, is_published
from training.sharing.write_folder import require_free, save_folder
from training.snapshot import SUFFIXES, Snapshot, load_snapshot, save_snapshot

Form = Literal["pkl", "safetensors", "folder"]


@dataclass(frozen=True, kw_only=True)
class ConversionJob:
    """One network to convert."""

    source: str  # path of a file or folder, http(s) URL, or name on the hub
    path: Path
    form: Form


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One converted network."""

    source: str
    path: Path
    snapshot: Snapshot


class Conversion:
    """An iterable that converts a network in each step and writes it whole or not at all."""

    def __init__(self, jobs: list[ConversionJob], facts: CardFacts) -> None:
        self.jobs = jobs
        self._facts = facts  # for model cards, in addition to those of the run

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Converted]:
        for job in self.jobs:
            snapshot = load_snapshot(job.source)
            make_folder(job.path.parent)
            if job.form != "pkl":  # a file in the published layout stays as it is
                snapshot = _with_source(snapshot, job.source)
            if job.form == "folder":
                save_folder(snapshot, job.path, _facts_of_run(job.source, snapshot, self._facts))
            else:
                save_snapshot(snapshot, job.path)
            yield Converted(source=job.source, path=job.path, snapshot=snapshot)


def convert_snapshots(
    sources: Sequence[str],
    *,
    outdir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    to: Form | None = None,
    licence: str | None = None,
    metrics: Sequence[str | os.PathLike[str]] = (),
) -> Conversion:
    """Check the request and return the conversion of `sources`, named as for `load_snapshot`.

    `to` is the form to write. By default it follows the suffix of `out`; with `outdir` it is the other one of .pkl and
    .safetensors, or .safetensors for folders and repositories. `out` is the output of a single source; `outdir` gets
    outputs with the sources' names. `licence` and `metrics` (files of calculate_metrics.py --json) are for the card of
    a model folder. Everything in the sources is kept. Raises ConfigError before a network is read or anything written.
    """
    if (outdir is None) == (out is None):
        raise ConfigError("give either --outdir=DIR or --out=FILE, where to write to")
    if out is not None and len(sources) != 1:
        raise ConfigError(f"--out={out} is one file for {len(sources)} inputs; give --outdir=DIR for several")
    if out is not None:
        jobs = [ConversionJob(source=sources[0], path=Path(out), form=_form_of(Path(out), to))]
    else:
        jobs = [_named(source, Path(outdir or ""), to) for source in sources]
    if (licence is not None or metrics) and all(job.form != "folder" for job in jobs):
        raise ConfigError("--license and --metrics are for the card of a model folder; add --to=folder")
    facts = CardFacts(licence=licence, results=tuple(_read_result(Path(path)) for path in metrics))
    paths = [job.path for job in jobs]
    for job in jobs:
        _refuse_input(job, sources)
        if paths.count(job.path) > 1:
            raise ConfigError(f"several inputs would be written to {job.path}; convert them one by one with --out=FILE")
        if job.form == "folder":
            require_free(job.path)
        elif job.path.is_dir():
            raise ConfigError(f"{job.path} is a folder; name a file to write, or add --to=folder")
        require_folder(job.path.parent)
    return Conversion(jobs, facts)


def _with_source(snapshot: Snapshot, source: str) -> Snapshot:
    """Record the origin of a published network in `info`, since its license depends on it."""
    if not is_published(source, snapshot) or "source" in snapshot.info:
        return snapshot
    return replace(snapshot, info={**snapshot.info, "source": source if is_url(source) else Path(source).name})


def _facts_of_run(source: str, snapshot: Snapshot, facts: CardFacts) -> CardFacts:
    """Add to `facts` the options and scores of the training run, if the file `source` is in its folder."""
    run = RunFolder(Path(source).parent)
    if is_url(source) or hub.is_hub_url(source) or not Path(source).is_file() or not run.options_file.is_file():
        return facts
    try:
        options = json.loads(run.options_file.read_text("utf-8"))
    except (OSError, ValueError):
        return facts
    return replace(facts, training_options=options, scores=_scores_of_run(run, snapshot))


def _scores_of_run(run: RunFolder, snapshot: Snapshot) -> dict[str, float]:
    if snapshot.nimg is None or snapshot.ema_std is None:
        return {}
    prefix, suffix = "Metrics/", f"-{snapshot.ema_std:.3f}"
    scores: dict[str, float] = {}
    for line in run.recorded_stats(snapshot.nimg):
        if round(line["Progress/kimg"] * 1e3) != snapshot.nimg:
            continue
        for key, value in line.items():
            if key.startswith(prefix) and key.endswith(suffix) and isinstance(value, float):
                scores[key.removeprefix(prefix).removesuffix(suffix)] = value
    return scores


def _form_of(path: Path, to: Form | None) -> Form:
    if to == "folder":
        if path.suffix in SUFFIXES:
            raise ConfigError(f"--out={path} has the suffix of a file; name a folder for --to=folder")
        return to
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--out={path} has none of the suffixes {' and '.join(SUFFIXES)} of network files; add --to=folder for a"
            " model folder"
        )
    form: Form = "pkl" if path.suffix == ".pkl" else "safetensors"
    if to not in (None, form):
        raise ConfigError(f"--out={path} and --to={to} contradict each other; leave --to out")
    return form


def _named(source: str, outdir: Path, to: Form | None) -> ConversionJob:
    name, may_be_folder = _name_of(source)
    suffix = Path(name).suffix if Path(name).suffix in SUFFIXES else ""
    if not suffix and not may_be_folder:
        raise ConfigError(f"{source} has none of the suffixes {' and '.join(SUFFIXES)}; name its output by --out=FILE")
    form: Form = to if to is not None else "pkl" if suffix == ".safetensors" else "safetensors"
    stem = name.removesuffix(suffix)
    return ConversionJob(source=source, path=outdir / (stem if form == "folder" else f"{stem}.{form}"), form=form)


def _name_of(source: str) -> tuple[str, bool]:
    """Return the last part of the name of `source`, and True if it may be a model folder or a repository."""
    if hub.is_hub_url(source):
        name = hub.parse_hub_url(source)
        return Path(name.file or name.repo).name, name.file is None
    if is_url(source):
        return Path(unquote(split_url(source).path)).name, False
    repository = None if Path(source).exists() else hub.parse_repository(source)
    if repository is not None and Path(source).suffix not in SUFFIXES:
        return Path(repository.repo).name, True
    return Path(os.path.abspath(source)).name, Path(source).is_dir()


def _refuse_input(job: ConversionJob, sources: Sequence[str]) -> None:
    for other in sources:
        if is_url(other) or hub.is_hub_url(other):
            continue
        path, own = Path(other), job.path
        if own.resolve() == path.resolve() or (own.exists() and path.exists() and own.samefile(path)):
            raise ConfigError(f"{job.source} would be written to {job.path}, which is an input; choose another path")


def _read_result(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
        for entry in record["results"].values():
            for key in ("minimum", *(("mean", "std") if entry.get("std") else ())):
                float(entry[key])
    except OSError as error:
        raise ConfigError(f"cannot read --metrics={path}: {reason_of(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"--metrics={path} is not a result of calculate_metrics.py --json") from None
    return dict(record)
