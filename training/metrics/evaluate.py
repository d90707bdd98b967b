"""One pass of images through the detectors, over all processes, and what it gives: statistics, or scores at once.

Nothing here draws from a global random generator.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.metrics.detectors import Detector, DetectorOutput
from training.metrics.metric_table import METRICS, Layer, moments_entry
from training.metrics.reference import Stats, require_suffix, save_stats
from training.metrics.scores import Score, shared_scores
from training.metrics.statistics import Moments, Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class StatsStep:
    """A batch of this process has gone through the detectors."""

    batch_idx: int
    num_batches: int | None  # of this process; None where the batches have no length
    num_images: int  # of this batch
    stats: Stats | None  # of all images of all processes, with the last batch; None before


class StatsPass:
    """The pass as a sequence of StatsStep; every process must go through it to its end, since the end is collective.

    `batches` of this process: uint8 tensors [N, C, H, W], or objects with such `images` and with `indices` int [N], the
    images' positions among those of all processes (ImageBatch, PictureBatch). Plain tensors count as dealt to the
    processes in turn. `keep_features`: also keep the features of the images at these positions
    (None: only where a metric needs single features, and then of all images). `dest`: a file for the statistics, which
    the main process writes at the end. The statistics depend neither on the
    batch size nor on the number of processes, rounding in the fifteenth digit aside.
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
        moments = {moments_entry(metric): Moments() for metric in self._metrics if metric.kind == "frechet"}
        rows: dict[tuple[Layer, str], Rows] = {
            (metric.layer, metric.detector): Rows() for metric in self._metrics if metric.needs_rows
        }
        if self._keep is not None:
            rows |= {("features", name): Rows() for name in self._detectors}
        num_batches = len(self._batches) if isinstance(self._batches, Sized) else None
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
            save_stats(stats, self._dest)
        yield replace(pending, stats=stats)

    def _unpack(self, batch: Any, batch_idx: int) -> tuple[torch.Tensor | None, np.ndarray]:
        """The images, and the keys by which they are put in order."""
        images, indices = (batch, None) if isinstance(batch, torch.Tensor) else (batch.images, batch.indices)
        if indices is None:
            first = (batch_idx * self._world.size + self._world.rank) << 32
            indices = first + np.arange(0 if images is None else len(images))
        return images, np.asarray(indices, dtype=np.int64)

    def _add(
        self,
        images: torch.Tensor,
        indices: np.ndarray,
        moments: dict[str, Moments],
        rows: dict[tuple[Layer, str], Rows],
    ) -> None:
        for name, detector in self._detectors.items():
            outputs = detector.outputs(images)
            for metric in self._metrics:
                if metric.detector == name and metric.kind == "frechet":
                    moments[moments_entry(metric)].add(_layer(outputs, metric.layer, name))
            for (layer, of), kept in rows.items():
                if of == name:
                    output = _layer(outputs, layer, name)
                    chosen = slice(None) if self._keep is None else np.isin(indices, self._keep).nonzero()[0]
                    kept.add(indices[chosen], output[chosen])

    def _collect(self, num_images: int, moments: dict[str, Moments], rows: dict[tuple[Layer, str], Rows]) -> Stats:
        total = sum(self._world.all_gather_objects(num_images))
        if total < 2:
            raise ConfigError(f"{total} images cannot be measured; two are the least")
        stats: Stats = {"num_images": total}
        for entry, gathered in moments.items():
            _, mu, sigma = gathered.merge(self._world)
            stats[entry] = {"mu": mu, "sigma": sigma}
        for (layer, name), kept in rows.items():
            stats.setdefault(layer, {})[name] = kept.merge(self._world)
        return stats


def _layer(outputs: DetectorOutput, layer: Layer, detector: str) -> torch.Tensor:
    found = getattr(outputs, layer)
    if found is None:
        raise ConfigError(f"the detector {detector} gives no {layer}, which a metric needs")
    return found


def evaluate_images(
    batches: Iterable[Any],
    *,
    metrics: Sequence[str],
    detectors: Mapping[str, Detector],
    reference: Stats | None,
    world: World,
) -> dict[str, Score]:
    """The metrics of the images in `batches` of all processes, in each process; `batches` as for StatsPass.

    To be called by every process of `world`. `metrics` and `detectors` as `training.metrics.available.plan_metrics`
    gives
    them, `reference` as `load_stats`. Draws from no global random generator. Raises ConfigError in every process.
    """
    stats = None
    for step in StatsPass(batches, metrics=metrics, detectors=detectors, world=world):
        stats = step.stats
    assert stats is not None
    return shared_scores(stats, reference, metrics, world)
