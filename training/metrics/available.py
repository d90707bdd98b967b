"""Which of the metrics that were asked for can be had, from a reference and from the weights that are here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dnnlib.errors import ConfigError
from training.metrics.detectors import DETECTORS, Detector, make_detector
from training.metrics.metric_table import ALL, METRICS, Metric, parse_metrics
from training.metrics.reference import Stats
from training.metrics.scores import lacking


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What will be computed. `skipped`: the other metrics, each with the reason."""

    metrics: list[str]
    detectors: dict[str, Detector]
    skipped: dict[str, str]


def plan_metrics(
    names: str | Sequence[str],
    reference: Stats | None,
    *,
    device: torch.device | str,
    weights: Mapping[str, str] | None = None,
) -> Plan:
    """Choose among `names` ('fid,fd_dinov2', a list of names, or 'all') and make the detectors on `device`.

    `weights`: files or folders by detector, in place of the published ones. A metric that `reference` lacks is
    skipped. With 'all', so is one whose detector has no weights on this machine; otherwise these are downloaded. Raises
    ConfigError where nothing is left, and for a metric asked for by name whose weights cannot be had.
    """
    return _plan(names, lambda metric: lacking(metric, reference), device, weights or {})


def plan_reference(
    names: str | Sequence[str],
    *,
    keep_features: bool,
    device: torch.device | str,
    weights: Mapping[str, str] | None = None,
) -> Plan:
    """The same for making a reference: what it is to serve, with the features of single images kept or not."""

    def needless(metric: Metric) -> str | None:
        if not metric.needs_reference:
            return "it needs no reference"
        return None if metric.kind == "frechet" or keep_features else "it needs --features=N"

    return _plan(names, needless, device, weights or {})


def _plan(
    names: str | Sequence[str],
    reason_against: Callable[[Metric], str | None],
    device: torch.device | str,
    weights: Mapping[str, str],
) -> Plan:
    everything = names == ALL or list(names) == [ALL]
    plan = Plan(metrics=[], detectors={}, skipped={})
    for name in parse_metrics(names):
        metric = METRICS[name]
        reason = reason_against(metric)
        if reason is None and metric.detector not in plan.detectors:
            given = weights.get(metric.detector)
            if everything and given is None and not DETECTORS[metric.detector].has_weights():
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
