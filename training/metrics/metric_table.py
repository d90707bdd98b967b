"""The metrics by name: what each is, and what it needs of the images and of the reference."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dnnlib.errors import ConfigError

Kind = Literal["frechet", "kid", "inception_score", "precision", "recall", "density", "coverage"]
# What a detector gives for an image: its features, a spatial slice of an earlier layer, or class logits.
Layer = Literal["features", "spatial", "logits"]

NEIGHBORS = (3, 5)  # as in improved precision and recall (arXiv 1904.06991) and in PRDC (arXiv 2002.09797)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row. `detector` names a network of training.metrics.detectors."""

    name: str
    kind: Kind
    detector: str
    layer: Layer = "features"
    k: int = 0  # nearest neighbours that make up the manifold; 0 where there is none

    @property
    def needs_rows(self) -> bool:
        """Whether it takes the outputs of every image, beyond their mean and covariance."""
        return self.kind != "frechet"

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference at all."""
        return self.kind != "inception_score"

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a distance."""
        return self.kind in ("frechet", "kid")

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        network = _NETWORKS[self.detector]
        if self.kind == "frechet":
            return f"Fréchet distance of {network} {'spatial ' if self.layer == 'spatial' else ''}features"
        if self.kind == "kid":
            return f"kernel distance (KID) of {network} features"
        if self.kind == "inception_score":
            return f"Inception Score by {network}; needs no reference"
        return f"{self.kind} by {self.k} nearest neighbours in {network} features"


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
    """Metric names out of 'fid,fd_dinov2', duplicates dropped, or all of them for 'all'. Raises ConfigError."""
    parts = [text] if isinstance(text, str) else list(text)
    names = list(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))
    if names == [ALL]:
        return list(METRICS)
    if not names:
        raise ConfigError("no metric is named; write e.g. fid,fd_dinov2 (--list-metrics shows all)")
    for name in names:
        if name not in METRICS:
            similar = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5) or list(DEFAULT)
            raise ConfigError(f"'{name}' is no metric; there are {len(METRICS)}, such as {', '.join(similar)}")
    return names


def moments_entry(metric: Metric) -> str:
    """The name under which statistics keep the mean and covariance that a Fréchet distance compares."""
    assert metric.kind == "frechet"
    return metric.name
