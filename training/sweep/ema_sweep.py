"""Scores as a function of the EMA length, the guidance weight, or both, from the snapshots of a training run.

Networks are reconstructed in memory and never written (arXiv 2312.02696, Section 3.2 and Figure 5).
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import shortened
from torch_utils.distributed import World
from torch_utils.processes.dealing import split_batches
from training.metrics.available import Plan
from training.metrics.distances import Score
from training.metrics.evaluate import StatsPass, shared_scores
from training.metrics.metric_table import best_of
from training.metrics.reference import Stats
from training.metrics.results import described_file, for_json, versions
from training.posthoc import MAX_FIT
from training.posthoc.inputs import Input
from training.posthoc.reconstruction import output_name, reconstruct_networks
from training.sampling.denoisers import SELF, WithoutLabels
from training.sampling.networks import load_network, require_label_dropout
from training.sampling.options import SamplerOptions
from training.sampling.request import SamplingRequest
from training.sampling.sampler import ForeignSampler, sampler_keywords
from training.snapshot import read_header

FORMAT = "edm2-sweep"
VERSION = 1

_DIGITS = 6  # to which lengths and weights are distinguished
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
        """Whether the reconstruction is close enough to count as the network of that length."""
        return self.fit <= MAX_FIT

    @property
    def key(self) -> tuple[float, float]:
        """Identity of the point: length and weight, rounded."""
        return point_key(self.std, self.guidance)

    def mean(self, metric: str) -> float:
        """Return the mean over the sets of seeds."""
        return fmean(self.values[metric])

    def as_json(self) -> dict[str, Any]:
        """Return the point as a sweep's file holds it."""
        means = {name: self.mean(name) for name in self.values}
        return {"ema_std": self.std, "guidance": self.guidance, "fit": self.fit, "values": self.values, "mean": means}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], metrics: Sequence[str]) -> "Point":
        """Read an entry of a sweep's file."""
        values = {name: [float(value) for value in entry["values"][name]] for name in metrics}
        std, guidance, fit = (float(entry[name]) for name in ("ema_std", "guidance", "fit"))
        return cls(std=std, guidance=guidance, fit=fit, values=values)


@dataclass(frozen=True, kw_only=True)
class SweepStep:
    """A batch of this process was generated and measured; `point` comes with the last batch of a point."""

    std: float
    guidance: float
    point: Point | None = None


def point_key(std: float, guidance: float) -> tuple[float, float]:
    """Return a key that is equal for lengths and weights that differ by rounding only."""
    return round(std, _DIGITS), round(guidance, _DIGITS)


class Sweep:
    """The work, as a sequence of SweepStep with a length; every process of `world` must iterate to its end.

    `inputs`: stored averages, see `training.posthoc.inputs`; `out_nimg`: None = the newest. `requests`: how to sample,
    one for each guidance weight; their `net` is ignored. Every set of `num` images has its own seeds, from `seed` on,
    with `repeat` sets for each point. `done`: keys of points that are left out. `build` networks are made at a time, by
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
        todo = {std: [r for r in requests if point_key(std, r.weight) not in done] for std in sorted(set(stds))}
        self._todo = {std: left for std, left in todo.items() if left}
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
        own = next(iter(self._todo.values()))[0].own_networks
        guides = {path: prepare(load_network(path, device, own), device) for path in paths}
        encoder = None
        for std, snapshot in reconstruct_networks(self._inputs, list(self._todo), self._out_nimg, self._build, own):
            encoder = encoder or snapshot.encoder  # a VAE is loaded once
            net = prepare(snapshot.net.to(device), device)
            for request in self._todo[std]:
                gnets = [WithoutLabels(net) if path == SELF else guides[path] for path in request.gnets]
                yield from self._measure(std, request, net, gnets, encoder, snapshot.info)
                del gnets
            del net  # with its CUDA graph, before the next one is recorded
            snapshot.net.to("cpu")  # frees the device while the others of its pass are measured

    def _measure(
        self, std: float, request: SamplingRequest, net: Any, gnets: list[Any], encoder: Any, info: Mapping[str, Any]
    ) -> Iterator[SweepStep]:
        runs: list[dict[str, Score]] = []
        for seeds in self._seeds:
            images = request.generate(
                net, gnets, encoder=encoder, condition=info.get("condition"), seeds=seeds,
                max_batch_size=self._batch, world=self._world,
            )  # fmt: skip
            work = StatsPass(images, metrics=self._plan.metrics, detectors=self._plan.detectors, world=self._world)
            for step in work:
                if step.stats is not None:
                    runs.append(shared_scores(step.stats, self._reference, self._plan.metrics, self._world))
                if len(runs) < len(self._seeds):
                    yield SweepStep(std=std, guidance=request.weight)
        values = {name: [run[name].value for run in runs] for name in runs[0]}
        point = Point(std=std, guidance=request.weight, fit=info["posthoc_fit"], values=values)
        yield SweepStep(std=std, guidance=request.weight, point=point)


def best_point(points: Sequence[Point], metric: str) -> Point | None:
    """Return the point with the best mean; None if no mean is finite."""
    return best_of(metric, points, lambda point: point.mean(metric))


def at_the_edge(points: Sequence[Point], best: Point) -> list[str]:
    """Return the settings of which a wider range may hold a better value. Weight 1, no guidance, is not an edge."""
    stds, weights = ({point.std for point in points}, {point.guidance for point in points})
    edges = []
    if len(stds) > 1 and best.std in (min(stds), max(stds)):
        edges.append("EMA lengths")
    if len(weights) > 1 and best.guidance in (min(weights), max(weights)) and best.guidance != 1:
        edges.append("guidance weights")
    return edges


def check_guides(inputs: Sequence[Input], requests: Sequence[SamplingRequest]) -> None:
    """Raise ConfigError if networks are to guide themselves and were not trained for it."""
    if any(SELF in request.gnets for request in requests):
        header = read_header(inputs[0].path, own_networks=requests[0].own_networks)
        require_label_dropout(header.config["arguments"]["label_dim"], header.info, inputs[0].path, "--gnet=self")


def settings_of(
    inputs: Sequence[Input],
    out_nimg: int | None,
    requests: Sequence[SamplingRequest],
    plan: Plan,
    *,
    ref: str | None,
    num: int,
    seed: int,
    repeat: int,
) -> dict[str, Any]:
    """Return all that the scores of a point depend on except its length and weight, in JSON's types."""
    guided, first = max(requests, key=lambda request: len(request.gnets)), requests[0]
    settings = {
        **({} if first.precision is None else {"precision": first.precision}),
        **first.decoder.settings,
        "snapshots": {os.path.basename(file.path): _ends_sha256(file.path) for file in inputs},
        "nimg": out_nimg,
        **{name: described_file(path)["sha256"] for name, path in first.condition_files().items()},
        "gnets": [SELF if path == SELF else described_file(path)["sha256"] for path in guided.gnets],
        "sampler": {name: value for name, value in sampler_keywords(guided.sampler).items() if name != "guidance"},
        "reference": None if ref is None else described_file(ref)["sha256"],
        "metrics": list(plan.metrics),
        "detectors": {name: described_file(d.weights_path)["sha256"] for name, d in plan.detectors.items()},
        "num_images": num,
        "seed": seed,
        "repeat": repeat,
    }
    return dict(json.loads(json.dumps(for_json(settings))))


def read_points(path: Path, settings: Mapping[str, Any]) -> list[Point]:
    """Return the points in the file of an earlier sweep; none if missing. Raises ConfigError for other settings."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["format_version"] != VERSION:
            raise ValueError
        old = dict(record["settings"])
        points = [Point.from_json(entry, old["metrics"]) for entry in record["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"{path} exists and is not a record of a sweep; name another file") from None
    changed = [key for key in settings.keys() | old.keys() if settings.get(key) != old.get(key)]
    if points and changed:
        shown = "; ".join(
            f"{k}: {shortened(old.get(k))} there, {shortened(settings.get(k))} now" for k in sorted(changed)
        )
        raise ConfigError(f"{path} holds a sweep with other settings ({shown}); name another file, or delete it")
    return points


def sweep_record(
    points: Sequence[Point], settings: Mapping[str, Any], plan: Plan, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the JSON file: all points, the best one of each metric, and what repeats them."""
    best = {name: best_point(points, name) for name in plan.metrics}
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "settings": dict(settings),
        "points": [point.as_json() for point in sorted(points, key=lambda point: point.key)],
        "best": {
            name: None if p is None else {"ema_std": p.std, "guidance": p.guidance, "mean": p.mean(name)}
            for name, p in best.items()
        },
        "skipped": plan.skipped,
        "versions": versions(),
        **extra,
    }


def commands_for(
    point: Point, request: SamplingRequest, *, reconstruct: Mapping[str, Any], nimg: int, seeds: range
) -> list[str]:
    """Return the two commands that make the network of `point` and images like those that were measured.

    `reconstruct`: options of reconstruct_phema.py besides --outdir and --outstd; None = left out.
    """
    net = f"out/{output_name('phema', nimg, point.std)}.{'safetensors' if request.own_networks else 'pkl'}"
    first = [f"--{name}={value}" for name, value in reconstruct.items() if value is not None]
    first += [f"--network={name}" for name in request.own_networks]
    defaults = SamplerOptions().keywords()
    names = {"num_steps": "steps", "shares": "gnet-shares"}
    second = [f"--net={net}", *(f"--gnet={path}" for path in request.gnets)]
    second += [f"--{name}={path}" for name, path in request.condition_files().items()]
    second += [f"--network={name}" for name in request.own_networks]
    if isinstance(request.sampler, ForeignSampler):
        second.append(f"--sampler={request.sampler.name}")
        given = ",".join(f"{name}={json.dumps(value)}" for name, value in request.sampler.keywords.items())
        second += [f"--sampler-args={given}"] if given else []
    keywords = request.sampler.keywords() if isinstance(request.sampler, SamplerOptions) else {}
    for name, value in keywords.items():
        if value != defaults[name]:
            text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
            second.append(f"--{names.get(name, name)}={text}")
    second += ["--outdir=out/images", f"--seeds={seeds[0]}-{seeds[-1]}"]
    return [
        shlex.join(["python", "reconstruct_phema.py", *first, "--outdir=out", f"--outstd={point.std:g}"]),
        shlex.join(["python", "generate_images.py", *second]),
    ]


def _ends_sha256(path: str) -> str:
    """SHA-256 of the first and the last 64 KiB of a file: enough to distinguish snapshots, which may be large."""
    try:
        with open(path, "rb") as file:
            first = file.read(_END_BYTES)
            file.seek(max(os.path.getsize(path) - _END_BYTES, 0))
            return hashlib.sha256(first + file.read()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
