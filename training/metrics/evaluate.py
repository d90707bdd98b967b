"""From images to numbers: a pass of images through the detectors, over all processes, and the scores of its statistics.

Nothing here draws from a global random generator.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from dnnlib.errors import ConfigError
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.dataset.image_set import ImageSet, ImageSetBatches, choose_images
from training.metrics.detectors import Detector, make_detector
from training.metrics.detectors.common import DetectorOutput
from training.metrics.distances import Score, frechet_distance, inception_score, kid
from training.metrics.manifold import Manifold, manifold
from training.metrics.metric_table import DEFAULT, METRICS, NEIGHBORS, Layer, Metric, parse_metrics
from training.metrics.reference import Stats, require_suffix, save_stats
from training.metrics.statistics import Moments, Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class StatsStep:
    """A batch of this process has passed the detectors."""

    batch_idx: int
    num_batches: int | None  # of this process; None if the batches have no length
    num_images: int  # of this batch
    stats: Stats | None  # of all images of all processes, with the last batch; None before


class StatsPass:
    """The pass as a sequence of StatsStep. Every process must iterate to the end, which is collective.

    `batches` of this process are uint8 tensors [N, C, H, W], or objects with such `images`, or a list of [C, H, W] of
    several sizes, and with `indices` int [N], the positions among the images of all processes. Plain tensors count as
    dealt to the processes in turn.
    `keep_features`: also keep the features of the images at these positions (None: only if a metric needs single
    features, and then of all images). `dest`: a file to which the main process writes the statistics at the end.

    The statistics depend neither on the batch size nor on the number of processes, but for rounding in the fifteenth
    digit.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        metrics: Sequence[str],
        detectors: Mapping[str, Detector],
        world: World,
        keep_features: np.ndarray | None = None,
        dest: Path | None = None,
    ) -> None:
        if dest is not None:
            require_suffix(dest)
        self._batches = batches
        self._metrics = [METRICS[name] for name in metrics]
        self._detectors = {name: detectors[name] for name in {metric.detector: None for metric in self._metrics}}
        self._world = world
        self._keep = keep_features
        self._dest = dest

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches)

    def __iter__(self) -> Iterator[StatsStep]:
        moments = {metric.name: Moments() for metric in self._metrics if metric.kind == "frechet"}
        rows: dict[tuple[Layer, str], Rows] = {
            (metric.layer, metric.detector): Rows() for metric in self._metrics if metric.needs_rows
        }
        if self._keep is not None:
            rows |= {("features", name): Rows() for name in self._detectors}
        num_batches = len(self._batches) if isinstance(self._batches, Sized) else None
        # Each step is yielded when the next batch is due, so that the last one can carry the statistics.
        pending = StatsStep(batch_idx=0, num_batches=num_batches, num_images=0, stats=None)
        num_images = 0
        for batch_idx, batch in enumerate(self._batches):
            if batch_idx:
                yield pending
            images, indices = self._unpack(batch, batch_idx)
            num_images += len(indices)
            if images is not None and len(images):
                self._add(images, indices, moments, rows)
            pending = replace(pending, batch_idx=batch_idx, num_images=len(indices))
        stats = self._collect(num_images, moments, rows)
        if self._dest is not None and self._world.is_main:
            save_stats(stats | {"made_with": {"pillow": PIL.__version__}}, self._dest)
        yield replace(pending, stats=stats)

    def _unpack(self, batch: Any, batch_idx: int) -> tuple[torch.Tensor | list[torch.Tensor] | None, np.ndarray]:
        images, indices = (batch, None) if isinstance(batch, torch.Tensor) else (batch.images, batch.indices)
        if indices is None:
            first = (batch_idx * self._world.size + self._world.rank) << 32
            indices = first + np.arange(0 if images is None else len(images))
        return images, np.asarray(indices, dtype=np.int64)

    def _add(
        self,
        images: torch.Tensor | list[torch.Tensor],
        indices: np.ndarray,
        moments: dict[str, Moments],
        rows: dict[tuple[Layer, str], Rows],
    ) -> None:
        for name, detector in self._detectors.items():
            outputs = detector.outputs(images)
            for metric in self._metrics:
                if metric.detector == name and metric.kind == "frechet":
                    moments[metric.name].add(_layer(outputs, metric.layer, name))
            for (layer, of), kept in rows.items():
                if of == name:
                    output = _layer(outputs, layer, name)
                    chosen = slice(None) if self._keep is None else np.isin(indices, self._keep).nonzero()[0]
                    kept.add(indices[chosen], output[chosen])

    def _collect(self, num_images: int, moments: dict[str, Moments], rows: dict[tuple[Layer, str], Rows]) -> Stats:
        total = sum(self._world.all_gather_objects(num_images))
        if total < 2:
            raise ConfigError(f"{total} images cannot be measured; at least two are needed")
        stats: Stats = {"num_images": total}
        for entry, gathered in moments.items():
            _, mu, sigma = gathered.merge(self._world)
            stats[entry] = {"mu": mu, "sigma": sigma}
        for (layer, name), kept in rows.items():
            stats.setdefault(layer, {})[name] = kept.merge(self._world)
        return stats


def _layer(outputs: DetectorOutput, layer: Layer, detector: str) -> torch.Tensor:
    output = getattr(outputs, layer)
    if output is None:
        raise ConfigError(f"the detector {detector} gives no {layer}, which a metric needs")
    return output


def stats_of(steps: Iterable[StatsStep]) -> Stats:
    """Go through the steps of a StatsPass, bare or inside a progress bar, and return its statistics."""
    stats = None
    for step in steps:
        stats = step.stats
    assert stats is not None
    return stats


def evaluate_images(
    batches: Iterable[Any],
    *,
    metrics: Sequence[str],
    detectors: Mapping[str, Detector],
    reference: Stats | None,
    world: World,
) -> dict[str, Score]:
    """Return the metrics of the images in `batches` of all processes; `batches` as for StatsPass.

    Every process of `world` must call this and gets the result. `metrics` and `detectors` come from
    `training.metrics.available.plan_metrics`, `reference` from `load_stats`. Raises ConfigError in every process.
    """
    stats = stats_of(StatsPass(batches, metrics=metrics, detectors=detectors, world=world))
    return shared_scores(stats, reference, metrics, world)


def calculate_stats_for_iterable(
    image_iter: Iterable[Any],
    metrics: Sequence[str] = DEFAULT,
    verbose: bool = True,
    dest_path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> StatsPass:
    """Return the pass of this process's batches (uint8 [N, C, H, W]) through the detectors of `metrics`.

    Iterate over the result: the last item's `stats` are those of all processes' images. They are also written to
    `dest_path`. `verbose` is accepted and prints nothing: progress is the caller's.
    """
    world = distributed.init(None if device is None else str(device))
    names = parse_metrics(metrics)
    detectors = {name: make_detector(name, world.device) for name in {METRICS[name].detector for name in names}}
    dest = None if dest_path is None else Path(dest_path)
    return StatsPass(image_iter, metrics=names, detectors=detectors, world=world, dest=dest)


def calculate_stats_for_files(
    image_path: str | os.PathLike[str],
    num_images: int | None = None,
    seed: int = 0,
    max_batch_size: int = 64,
    num_workers: int = 2,
    prefetch_factor: int = 2,
    verbose: bool = True,
    device: torch.device | str | None = None,
    **stats_options: Any,
) -> StatsPass:
    """The same for the images in a folder or ZIP file: all, or `num_images` of them, which the seed chooses.

    `stats_options` are further arguments of `calculate_stats_for_iterable`. `prefetch_factor` is accepted; how far
    workers read ahead does not change the result.
    """
    image_set = ImageSet(image_path)
    (choice,) = choose_images(image_set, len(image_set) if num_images is None else num_images, seed=seed)
    world = distributed.init(None if device is None else str(device))
    batches = ImageSetBatches(image_set, choice, batch=max_batch_size, workers=num_workers, world=world)
    return calculate_stats_for_iterable(batches, verbose=verbose, device=world.device, **stats_options)


def reason_against(metric: Metric, reference: Mapping[str, Any] | None) -> str | None:
    """Return in a few words why the metric cannot be computed with this reference; None if it can."""
    if not metric.needs_reference:
        return None
    if reference is None:
        return "there is no reference"
    if metric.kind == "frechet":
        return None if metric.name in reference else "the reference lacks it"
    rows = reference.get("features", {}).get(metric.detector)
    if rows is None:
        return f"the reference keeps no {metric.detector} features (ref --features=N makes one that does)"
    least = least_rows(metric)
    return None if len(rows) >= least else f"the reference keeps {len(rows)} features, and {least} are needed"


def compute_scores(
    stats: Stats, reference: Stats | None, metrics: Sequence[str], *, device: torch.device | None = None
) -> dict[str, Score]:
    """Return the value of each of `metrics`; KID and manifolds are computed on `device`. Raises ConfigError."""
    manifolds: dict[str, dict[int, Manifold]] = {}
    scores = {}
    for name in metrics:
        metric = METRICS[name]
        reason = reason_against(metric, reference)
        if reason is not None:
            raise ConfigError(f"{name} cannot be computed: {reason}")
        if metric.kind == "frechet":
            scores[name] = Score(value=_frechet(metric, stats, reference or {}))
        elif metric.kind == "inception_score":
            value, error = inception_score(_rows(metric, stats))
            scores[name] = Score(value=value, error=error)
        else:
            generated = _rows(metric, stats)
            real = (reference or {})["features"][metric.detector]
            _require_same_width(metric, generated.shape[1], real.shape[1])
            if metric.kind == "kid":
                scores[name] = kid(generated, real, device=device)
            else:
                if metric.detector not in manifolds:
                    rows = [METRICS[other] for other in metrics]
                    ks = [k for k in NEIGHBORS if any((row.k, row.detector) == (k, metric.detector) for row in rows)]
                    manifolds[metric.detector] = manifold(real, generated, ks, device=device)
                scores[name] = Score(value=getattr(manifolds[metric.detector][metric.k], metric.kind))
    return scores


def compute_possible_scores(
    stats: Stats, reference: Stats, metrics: Sequence[str]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Return the scores that the reference allows, and the reasons against the others. ConfigError if none is left."""
    reasons = {name: reason_against(METRICS[name], reference) for name in parse_metrics(metrics)}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(skipped) == len(reasons):
        raise ConfigError(f"none of the metrics can be computed: {'; '.join(f'{n}: {r}' for n, r in skipped.items())}")
    return compute_scores(stats, reference, [name for name in reasons if name not in skipped]), skipped


def shared_scores(stats: Stats, reference: Stats | None, metrics: Sequence[str], world: World) -> dict[str, Score]:
    """`compute_scores` in the main process; every process gets the result, or the ConfigError."""
    return on_main(world, lambda: compute_scores(stats, reference, metrics, device=world.device))


def least_rows(metric: Metric) -> int:
    """Return the least number of images of which the metric can be computed."""
    return metric.k + 1 if metric.k else 2


def _frechet(metric: Metric, stats: Stats, reference: Stats) -> float:
    if metric.name not in stats:
        raise ConfigError(f"{metric.name} cannot be computed: the images' statistics lack {metric.name}")
    ours, theirs = stats[metric.name], reference[metric.name]
    _require_same_width(metric, len(ours["mu"]), len(theirs["mu"]))
    return frechet_distance(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])


def _rows(metric: Metric, stats: Stats) -> np.ndarray:
    rows = stats.get(metric.layer, {}).get(metric.detector)
    if rows is None:
        raise ConfigError(f"{metric.name} cannot be computed: the images' statistics keep no {metric.layer}")
    if len(rows) < least_rows(metric):
        raise ConfigError(f"{metric.name} needs at least {least_rows(metric)} images; there are {len(rows)}")
    return rows


def _require_same_width(metric: Metric, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ConfigError(
            f"{metric.name} cannot be computed: the images have {ours} features and the reference has {theirs}; both"
            " must come from the same detector"
        )
