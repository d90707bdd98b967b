"""The metrics that can be computed, among those asked for, with this reference and the weights on this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dnnlib.errors import ConfigError
from training.metrics.detectors import DETECTORS, Detector, make_detector
from training.metrics.evaluate import least_rows, reason_against
from training.metrics.metric_table import ALL, METRICS, Metric, parse_metrics
from training.metrics.reference import Stats


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The metrics to compute, with their detectors; `skipped` are the others, each with the reason."""

    metrics: list[str]
    detectors: dict[str, Detector]
    skipped: dict[str, str]


def plan_metrics(
    names: str | Sequence[str],
    reference: Stats | None,
    *,
    device: torch.device | str,
    weights: Mapping[str, str] | None = None,
    reference_images: int = 0,
) -> Plan:
    """Choose among `names` ('fid,fd_dinov2', a list of names, or 'all') and make the detectors on `device`.

    `weights`: files or folders by detector that replace the published ones. Metrics that `reference` lacks are skipped,
    unless there are enough `reference_images`, of which what is missing will be computed. Missing weights are
    downloaded, but with 'all' their metrics are skipped. Raises ConfigError if nothing is left, or if the weights of a
    metric asked for by name are not available.
    """

    def reason(metric: Metric) -> str | None:
        return None if reference_images >= least_rows(metric) else reason_against(metric, reference)

    return _plan(names, reason, device, weights or {})


def plan_reference(
    names: str | Sequence[str],
    *,
    keep_features: bool,
    device: torch.device | str,
    weights: Mapping[str, str] | None = None,
) -> Plan:
    """The same for making a reference that serves `names`, with or without the features of single images."""

    def reason(metric: Metric) -> str | None:
        if not metric.needs_reference:
            return "it needs no reference"
        return None if metric.kind == "frechet" or keep_features else "it needs --features=N"

    return _plan(names, reason, device, weights or {})


def _plan(
    names: str | Sequence[str],
    reason_to_skip: Callable[[Metric], str | None],
    device: torch.device | str,
    weights: Mapping[str, str],
) -> Plan:
    is_all = names == ALL or list(names) == [ALL]
    plan = Plan(metrics=[], detectors={}, skipped={})
    for name in parse_metrics(names):
        metric = METRICS[name]
        reason = reason_to_skip(metric)
        if reason is None and metric.detector not in plan.detectors:
            given = weights.get(metric.detector)
            if is_all and given is None and not DETECTORS[metric.detector].has_weights():
                reason = f"the weights of {metric.detector} are not on this machine"
            else:
                plan.detectors[metric.detector] = make_detector(metric.detector, device, given)
        if reason is None:
            plan.metrics.append(name)
        else:
            plan.skipped[name] = reason
    if not plan.metrics:
        reasons = [f"{name}: {reason}" for name, reason in plan.skipped.items()]
        raise ConfigError(
            f"none of the metrics can be computed: {'; '.join(reasons[:4] + ['...'][: len(reasons) > 4])}"
        )
    return plan
