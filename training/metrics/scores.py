"""From statistics to numbers: every metric of the table, between the statistics of images and those of a reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.metrics.frechet import frechet_distance
from training.metrics.inception_score import inception_score
from training.metrics.kernel import kid
from training.metrics.manifold import Manifold, manifold
from training.metrics.metric_table import METRICS, NEIGHBORS, Metric, moments_entry
from training.metrics.reference import Stats


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric's value. `error` is KID's standard error, or Inception Score's deviation over parts; else None."""

    value: float
    error: float | None = None


def lacking(metric: Metric, reference: Mapping[str, Any] | None) -> str | None:
    """Why the metric cannot be had from this reference, in a few words; None if it can."""
    if not metric.needs_reference:
        return None
    if reference is None:
        return "there is no reference"
    if metric.kind == "frechet":
        return None if moments_entry(metric) in reference else "the reference lacks it"
    rows = reference.get("features", {}).get(metric.detector)
    if rows is None:
        return f"the reference keeps no {metric.detector} features (ref --features=N makes one that does)"
    least = _least_rows(metric)
    return None if len(rows) >= least else f"the reference keeps {len(rows)} features, and {least} are needed"


def compute_scores(
    stats: Stats, reference: Stats | None, metrics: Sequence[str], *, device: torch.device | None = None
) -> dict[str, Score]:
    """The value of each of `metrics` for the images of `stats`. What needs it is computed on `device`.

    Raises ConfigError where the statistics or the reference lack what a metric needs, or do not fit each other.
    """
    manifolds: dict[str, dict[int, Manifold]] = {}
    scores = {}
    for name in metrics:
        metric = METRICS[name]
        reason = lacking(metric, reference)
        if reason is not None:
            raise ConfigError(f"{name} cannot be computed: {reason}")
        if metric.kind == "frechet":
            scores[name] = Score(value=_frechet(metric, stats, reference or {}))
        elif metric.kind == "inception_score":
            value, error = inception_score(_rows(metric, stats))
            scores[name] = Score(value=value, error=error)
        else:
            real, generated = _matching_features(metric, stats, reference or {})
            if metric.kind == "kid":
                estimate = kid(generated, real, device=device)
                scores[name] = Score(value=estimate.value, error=estimate.error)
            else:
                if metric.detector not in manifolds:
                    manifolds[metric.detector] = manifold(real, generated, _wanted_ks(metrics, metric), device=device)
                scores[name] = Score(value=getattr(manifolds[metric.detector][metric.k], metric.kind))
    return scores


def shared_scores(stats: Stats, reference: Stats | None, metrics: Sequence[str], world: World) -> dict[str, Score]:
    """`compute_scores` in the main process; the result in all. A ConfigError is raised in all, too."""
    result: dict[str, Score] | str | None = None
    if world.is_main:
        try:
            result = compute_scores(stats, reference, metrics, device=world.device)
        except ConfigError as error:
            result = str(error)
    shared = world.all_gather_objects(result)[0]
    if isinstance(shared, str):
        raise ConfigError(shared)
    assert shared is not None
    return shared


def _least_rows(metric: Metric) -> int:
    return metric.k + 1 if metric.k else 2


def _wanted_ks(metrics: Sequence[str], metric: Metric) -> list[int]:
    rows = [METRICS[name] for name in metrics]
    return [k for k in NEIGHBORS if any(row.k == k and row.detector == metric.detector for row in rows)]


def _frechet(metric: Metric, stats: Stats, reference: Stats) -> float:
    entry = moments_entry(metric)
    if entry not in stats:
        raise ConfigError(f"{metric.name} cannot be computed: the images' statistics lack {entry}")
    ours, theirs = stats[entry], reference[entry]
    if len(ours["mu"]) != len(theirs["mu"]):
        raise ConfigError(
            f"{metric.name} cannot be computed: the images have {len(ours['mu'])} features and the reference has"
            f" {len(theirs['mu'])}; both must come from the same detector"
        )
    return frechet_distance(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])


def _rows(metric: Metric, stats: Stats) -> np.ndarray:
    rows = stats.get(metric.layer, {}).get(metric.detector)
    if rows is None:
        raise ConfigError(f"{metric.name} cannot be computed: the images' statistics keep no {metric.layer}")
    if len(rows) < _least_rows(metric):
        raise ConfigError(f"{metric.name} needs {_least_rows(metric)} images or more; there are {len(rows)}")
    return rows


def _matching_features(metric: Metric, stats: Stats, reference: Stats) -> tuple[np.ndarray, np.ndarray]:
    real, generated = reference["features"][metric.detector], _rows(metric, stats)
    if real.shape[1] != generated.shape[1]:
        raise ConfigError(
            f"{metric.name} cannot be computed: the images have {generated.shape[1]} features and the reference has"
            f" {real.shape[1]}; both must come from the same detector"
        )
    return real, generated
