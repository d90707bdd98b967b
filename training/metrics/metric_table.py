"""The metrics by name: what each one is, what it needs, and which of its values are better."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dnnlib.errors import ConfigError
from dnnlib.text import unknown

T = TypeVar("T")

Kind = Literal["frechet", "kid", "inception_score", "precision", "recall", "density", "coverage"]
# Outputs of a detector for an image: its features, a spatial slice of an earlier layer, or class logits.
Layer = Literal["features", "spatial", "logits"]

NEIGHBORS = (3, 5)  # as in improved precision and recall (arXiv 1904.06991) and in PRDC (arXiv 2002.09797)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table. `detector` names a network of training.metrics.detectors."""

    name: str
    kind: Kind
    detector: str
    layer: Layer = "features"
    k: int = 0  # nearest neighbors that make up the manifold; 0 for other metrics

    @property
    def needs_rows(self) -> bool:
        """True if it takes the outputs of every image, not only their mean and covariance."""
        return self.kind != "frechet"

    @property
    def needs_reference(self) -> bool:
        """True if it compares images with a reference."""
        return self.kind != "inception_score"

    @property
    def lower_is_better(self) -> bool:
        """True for distances."""
        return self.kind in ("frechet", "kid")

    @property
    def description(self) -> str:
        """A description in a few words."""
        network = _NETWORKS[self.detector]
        if self.kind == "frechet":
            return f"Fréchet distance of {network} {'spatial ' if self.layer == 'spatial' else ''}features"
        if self.kind == "kid":
            return f"kernel distance (KID) of {network} features"
        if self.kind == "inception_score":
            return f"Inception Score by {network}; needs no reference"
        return f"{self.kind} by {self.k} nearest neighbors in {network} features"


_NETWORKS = {"inception": "Inception-v3", "dinov2": "DINOv2", "efflite0": "EfficientNet-Lite0"}
# Fréchet distances have their published names; names without a detector in them are Inception's.
_FRECHET = {"inception": "fid", "dinov2": "fd_dinov2", "efflite0": "fd_efflite0"}
_MANIFOLD: tuple[Kind, ...] = ("precision", "recall", "density", "coverage")


def _rows() -> Iterable[Metric]:
    for detector, name in _FRECHET.items():
        yield Metric(name=name, kind="frechet", detector=detector)
    yield Metric(name="sfid", kind="frechet", detector="inception", layer="spatial")
    yield Metric(name="is", kind="inception_score", detector="inception", layer="logits")
    for detector in _FRECHET:
        yield Metric(name=f"kid_{detector}", kind="kid", detector=detector)
    for detector in _FRECHET:
        for kind in _MANIFOLD:
            for k in NEIGHBORS:
                yield Metric(name=f"{kind}{k}_{detector}", kind=kind, detector=detector, k=k)


METRICS: Mapping[str, Metric] = {row.name: row for row in _rows()}
DETECTORS: Sequence[str] = tuple(_FRECHET)
DEFAULT = ("fid", "fd_dinov2")  # as published
ALL = "all"


def parse_metrics(text: str | Sequence[str]) -> list[str]:
    """Parse metric names such as 'fid,fd_dinov2', or 'all' of them; drops duplicates. Raises ConfigError."""
    parts = [text] if isinstance(text, str) else list(text)
    names = list(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))
    if names == [ALL]:
        return list(METRICS)
    if not names:
        raise ConfigError("no metric is named; write e.g. fid,fd_dinov2 (--list-metrics shows all)")
    for name in names:
        if name not in METRICS:
            raise ConfigError(unknown("metric", name, METRICS))
    return names


def compact_names(names: Iterable[str]) -> list[str]:
    """Return `names` with one pattern in place of those of one detector that differ only in kind and k."""
    groups: dict[str, list[Metric]] = {}
    for metric in (METRICS[name] for name in names):
        groups.setdefault(f"_{metric.detector}" if metric.k else metric.name, []).append(metric)
    texts: list[str] = []
    for suffix, rows in groups.items():
        kinds, ks = list(dict.fromkeys(row.kind for row in rows)), list(dict.fromkeys(row.k for row in rows))
        is_pattern = len(rows) > 1 and len(rows) == len(kinds) * len(ks)
        texts += [_braced(kinds) + _braced(ks) + suffix] if is_pattern else [row.name for row in rows]
    return texts


def _braced(choices: Sequence[object]) -> str:
    text = ",".join(map(str, choices))
    return f"{{{text}}}" if len(choices) > 1 else text


def listing() -> list[str]:
    """Return the lines of --list-metrics: a name, or a pattern of names, and its description."""
    rows = [(name, metric.description) for name, metric in METRICS.items() if not metric.k and metric.kind != "kid"]
    rows += [("kid_{detector}", "kernel distance (KID) of features")]
    ks = " or ".join(map(str, NEIGHBORS))
    rows += [
        (f"{kind}{_braced(NEIGHBORS)}_{{detector}}", f"{kind} by {ks} nearest neighbors in features")
        for kind in _MANIFOLD
    ]
    rows += [("{detector}", f"one of {', '.join(DETECTORS)}")]
    return [f"{name:<27}{description}" for name, description in rows]


def is_lower_better(name: str) -> bool:
    """Return the direction of a metric; names that the table lacks, as in other versions' files, count as distances."""
    return name not in METRICS or METRICS[name].lower_is_better


def best_of(name: str, items: Iterable[T], value: Callable[[T], float]) -> T | None:
    """Return the first item with the best finite `value` of the metric `name` (see `is_lower_better`)."""
    finite = [item for item in items if math.isfinite(value(item))]
    return (min if is_lower_better(name) else max)(finite, key=value) if finite else None
