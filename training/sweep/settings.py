"""The score as a function of the EMA length, of the guidance weight, or of both, from the snapshots of a training run.

Networks are reconstructed in memory (arXiv 2312.02696, Section 3.2 and Figure 5); none is written.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from torch_utils.distributed import World
from torch_utils.processes.dealing import split_batches
from training.metrics import results as report
from training.metrics.available import Plan
from training.metrics.evaluate import StatsPass
from training.metrics.metric_table import METRICS
from training.metrics.reference import Stats
from training.metrics.scores import Score, shared_scores
from training.posthoc.inputs import Input
from training.posthoc.reconstruction import reconstruct_networks
from training.sampling.checks import require_label_dropout
from training.sampling.generation import generate_images
from training.sampling.guidance import SELF, WithoutLabels
from training.sampling.loading import load_network
from training.sampling.request import SamplingRequest
from training.snapshot import read_header

FORMAT = "edm2-sweep"
VERSION = 1

MAX_FIT = 0.1  # beyond it, the snapshots are too far apart for the length

_DIGITS = 6  # to which lengths and weights are told apart
_END_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Point:
    """The scores of one network under one guidance weight."""

    std: float  # relative EMA length
    guidance: float
    fit: float  # relative L2 error of the averaging profile, see phema.posthoc_fit
    values: dict[str, list[float]]  # by metric, one for each disjoint set of seeds

    @property
    def is_near(self) -> bool:
        """Whether the network is near enough to the one of that length to be taken for it."""
        return self.fit <= MAX_FIT

    @property
    def key(self) -> tuple[float, float]:
        """What tells it from other points."""
        return point_key(self.std, self.guidance)

    def mean(self, metric: str) -> float:
        """Over the sets of seeds."""
        return fmean(self.values[metric])


@dataclass(frozen=True, kw_only=True)
class SweepStep:
    """A batch of this process was generated and measured; `point` is there with the last one of a point."""

    std: float
    guidance: float
    point: Point | None = None


def point_key(std: float, guidance: float) -> tuple[float, float]:
    """The same for lengths and weights that differ by rounding only."""
    return round(std, _DIGITS), round(guidance, _DIGITS)


class Sweep:
    """The work, as a sequence of SweepStep with a length; every process of `world` must go through it to its end.

    `inputs`: stored averages, see `training.posthoc.inputs`; `out_nimg`: None = the newest. `requests`: how to sample,
    one for each guidance weight; their `net` plays no part. Every set of `num` images has its own seeds, from `seed`
    on; `repeat` sets for each point. `done`: keys of points that are left out. `build` networks are made at a time, by
    one pass over the inputs, in every process.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        stds: Sequence[float],
        requests: Sequence[SamplingRequest],
        *,
        out_nimg: int | None = None,
        plan: Plan,
        reference: Stats | None,
        world: World,
        num: int,
        seed: int = 0,
        repeat: int = 1,
        batch: int = 32,
        build: int = 8,
        done: frozenset[tuple[float, float]] = frozenset(),
    ) -> None:
        self._todo = {std: [r for r in requests if point_key(std, r.guidance) not in done] for std in sorted(set(stds))}
        self._todo = {std: left for std, left in self._todo.items() if left}
        self._inputs, self._out_nimg, self._build = inputs, out_nimg, build
        self._plan, self._reference, self._world = plan, reference, world
        self._seeds = [range(start, start + num) for start in range(seed, seed + num * repeat, num)]
        self._batch = batch
        self._batches = len(split_batches(num, batch, world)) * repeat

    def __len__(self) -> int:
        return self._batches * sum(len(left) for left in self._todo.values())

    def __iter__(self) -> Iterator[SweepStep]:
        if not self._todo:
            return
        device = self._world.device
        paths = dict.fromkeys(path for left in self._todo.values() for r in left for path in r.gnets if path != SELF)
        prepare = next(iter(self._todo.values()))[0].prepare()  # every request has the same precision
        guides = {path: prepare(load_network(path, device)[0], device) for path in paths}
        encoder = None
        for std, snapshot in reconstruct_networks(self._inputs, list(self._todo), self._out_nimg, self._build):
            encoder = encoder or snapshot.encoder  # a VAE is loaded once
            net = prepare(snapshot.net.to(device), device)
            for request in self._todo[std]:
                guide = [WithoutLabels(net) if path == SELF else guides[path] for path in request.gnets]
                seen = {**request.pictures(), "condition": snapshot.info.get("condition")}
                yield from self._measure(std, request, net, guide, encoder, snapshot.info["posthoc_fit"], seen)
            snapshot.net.to("cpu")  # it may be some while until the others of its pass are done

    def _measure(
        self,
        std: float,
        request: SamplingRequest,
        net: Any,
        guides: list[Any],
        encoder: Any,
        fit: float,
        seen: Mapping[str, Any],
    ) -> Iterator[SweepStep]:
        runs: list[dict[str, Score]] = []
        for seeds in self._seeds:
            images = generate_images(
                net, guides, encoder, seeds=seeds, max_batch_size=self._batch, world=self._world,
                decoder=request.decoder, **seen, **request.sampler_kwargs(),
            )  # fmt: skip
            work = StatsPass(images, metrics=self._plan.metrics, detectors=self._plan.detectors, world=self._world)
            for step in work:
                if step.stats is None:
                    yield SweepStep(std=std, guidance=request.guidance)
                else:
                    runs.append(shared_scores(step.stats, self._reference, self._plan.metrics, self._world))
                    if len(runs) < len(self._seeds):
                        yield SweepStep(std=std, guidance=request.guidance)
        values = {name: [run[name].value for run in runs] for name in runs[0]}
        point = Point(std=std, guidance=request.guidance, fit=fit, values=values)
        yield SweepStep(std=std, guidance=request.guidance, point=point)


def best_point(points: Sequence[Point], metric: str) -> Point | None:
    """The point with the best mean; None where no mean is finite."""
    finite = [point for point in points if math.isfinite(point.mean(metric))]
    choose = min if METRICS[metric].lower_is_better else max
    return choose(finite, key=lambda point: point.mean(metric)) if finite else None


def at_the_edge(points: Sequence[Point], best: Point) -> list[str]:
    """Of which settings a wider range may hold a better value; less than no guidance (weight 1) is not to be had."""
    stds, weights = ({point.std for point in points}, {point.guidance for point in points})
    found = []
    if len(stds) > 1 and best.std in (min(stds), max(stds)):
        found.append("EMA lengths")
    if len(weights) > 1 and best.guidance in (min(weights), max(weights)) and best.guidance != 1:
        found.append("guidance weights")
    return found


def described_inputs(inputs: Sequence[Input], out_nimg: int | None) -> dict[str, Any]:
    """What the networks are made of, for the record. The digests are of the files' ends; the files may be large."""
    return {"snapshots": {os.path.basename(file.path): _ends_sha256(file.path) for file in inputs}, "nimg": out_nimg}


def check_guides(inputs: Sequence[Input], requests: Sequence[SamplingRequest]) -> None:
    """Raise ConfigError where the networks of these inputs would guide themselves and were not trained for it."""
    if any(SELF in request.gnets for request in requests):
        header = read_header(inputs[0].path)
        require_label_dropout(header.config["arguments"]["label_dim"], header.info, inputs[0].path, "--gnet=self")


def settings_of(
    inputs: Mapping[str, Any],
    requests: Sequence[SamplingRequest],
    plan: Plan,
    *,
    ref: str | None,
    num: int,
    seed: int,
    repeat: int,
) -> dict[str, Any]:
    """All that the scores of a point depend on, its length and weight aside, as JSON has it."""
    gnets = next((request.gnets for request in requests if request.gnets), ())
    sampler = max(requests, key=lambda request: len(request.gnets)).sampler_kwargs()
    del sampler["guidance"]
    precision = requests[0].precision
    settings = {
        **({} if precision is None else {"precision": precision}),
        **requests[0].decoder.settings,
        **inputs,
        **{n: report.described_file(path)["sha256"] for n, path in requests[0].pictures().items() if path is not None},
        "gnets": [SELF if path == SELF else report.described_file(path)["sha256"] for path in gnets],
        "sampler": sampler,
        "reference": None if ref is None else report.described_file(ref)["sha256"],
        "metrics": list(plan.metrics),
        "detectors": {name: report.described_file(d.weights_path)["sha256"] for name, d in plan.detectors.items()},
        "num_images": num,
        "seed": seed,
        "repeat": repeat,
    }
    return dict(json.loads(json.dumps(report.for_json(settings))))


def read_points(path: Path, settings: Mapping[str, Any]) -> list[Point]:
    """The points in the file of an earlier sweep; none where there is no file.

    Raises ConfigError where it is no such file, or where its settings differ from `settings`, with the differences.
    """
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["format_version"] != VERSION:
            raise ValueError
        theirs = dict(record["settings"])
        points = [
            Point(
                std=float(entry["ema_std"]),
                guidance=float(entry["guidance"]),
                fit=float(entry["fit"]),
                values={name: [float(v) for v in entry["values"][name]] for name in theirs["metrics"]},
            )
            for entry in record["points"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"{path} is there, and is no record of a sweep; name another file") from None
    if not points:
        return []
    changed = [key for key in settings.keys() | theirs.keys() if settings.get(key) != theirs.get(key)]
    if changed:
        shown = "; ".join(f"{k}: {_short(theirs.get(k))} there, {_short(settings.get(k))} now" for k in sorted(changed))
        raise ConfigError(f"{path} holds a sweep with other settings ({shown}); name another file, or delete it")
    return points


def sweep_record(
    points: Sequence[Point], settings: Mapping[str, Any], plan: Plan, more: Mapping[str, Any]
) -> dict[str, Any]:
    """What the JSON file holds: the curve, the best point of each metric, and what repeats them."""
    best = {name: best_point(points, name) for name in plan.metrics}
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "settings": dict(settings),
        "points": [
            {
                "ema_std": point.std,
                "guidance": point.guidance,
                "fit": point.fit,
                "values": point.values,
                "mean": {name: point.mean(name) for name in point.values},
            }
            for point in sorted(points, key=lambda point: point.key)
        ],
        "best": {
            name: None if p is None else {"ema_std": p.std, "guidance": p.guidance, "mean": p.mean(name)}
            for name, p in best.items()
        },
        "skipped": plan.skipped,
        "versions": report.versions(),
        **more,
    }


def commands_for(
    point: Point, request: SamplingRequest, *, reconstruct: Mapping[str, Any], nimg: int, seeds: range
) -> list[str]:
    """The two commands that make the network of `point` and images like those that were measured.

    `reconstruct`: options of reconstruct_phema.py beside --outdir and --outstd; None = left out.
    """
    net = f"out/phema-{nimg // 1000:07d}-{point.std:.3f}.pkl"
    first = [f"--{name}={value}" for name, value in reconstruct.items() if value is not None]
    defaults = SamplingRequest(net="").sampler_kwargs()
    names = {"num_steps": "steps", "shares": "gnet-shares"}
    second = [f"--net={net}", *(f"--gnet={path}" for path in request.gnets)]
    second += [f"--{name}={path}" for name, path in request.pictures().items() if path is not None]
    for name, value in request.sampler_kwargs().items():
        if value != defaults[name]:
            text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
            second.append(f"--{names.get(name, name)}={text}")
    second += ["--outdir=out/images", f"--seeds={seeds[0]}-{seeds[-1]}"]
    return [
        shlex.join(["python", "reconstruct_phema.py", *first, "--outdir=out", f"--outstd={point.std:g}"]),
        shlex.join(["python", "generate_images.py", *second]),
    ]


def _ends_sha256(path: str) -> str:
    """SHA-256 of the first and the last 64 KiB of a file, which tell snapshots apart. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            first = file.read(_END_BYTES)
            file.seek(max(os.path.getsize(path) - _END_BYTES, 0))
            return hashlib.sha256(first + file.read()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
