"""References that are images: their statistics are computed on the way, as far as the file does not hold them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.download import is_url, open_url
from torch_utils.distributed import World
from torch_utils.pickles.safe_pickle import file_format
from training.dataset.image_set import ImageSet, ImageSetBatches, choose_images
from training.dataset.item_files import find_shards
from training.dataset.sample_array import KEY, npz_arrays
from training.metrics.available import Plan
from training.metrics.evaluate import StatsPass, reason_against
from training.metrics.metric_table import METRICS
from training.metrics.reference import Stats, load_stats


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The statistics in a file, and images for all others."""

    stats: Stats
    images: ImageSet | None = None

    @property
    def num_images(self) -> int:
        """Number of images; 0 if there are only statistics."""
        return 0 if self.images is None else len(self.images)

    def work(self, plan: Plan, *, batch: int, workers: int, world: World) -> StatsPass | None:
        """Return the pass of the images through the detectors that `plan` needs; None if the statistics suffice."""
        missing = [name for name in plan.metrics if reason_against(METRICS[name], self.stats)]
        if self.images is None or not missing:
            return None
        (everything,) = choose_images(self.images, len(self.images), seed=0)
        batches = ImageSetBatches(self.images, everything, batch=batch, workers=workers, world=world)
        return StatsPass(batches, metrics=missing, detectors=plan.detectors, world=world)

    def with_computed(self, computed: Stats) -> Stats:
        """Return the statistics in the file and those `computed` by `work`."""
        features = {**computed.get("features", {}), **self.stats.get("features", {})}
        return {**computed, **self.stats, **({"features": features} if features else {})}


def open_reference(name: str) -> Reference:
    """Open a file of statistics, as `load_stats`, or images, as ImageSet: the content tells which. Raises ConfigError.

    An .npz file may hold both, as the reference batches of other programs do.
    """
    path = Path(open_url(name, return_filename=True)) if is_url(name) else Path(name)
    if path.is_dir() or path.suffix.lower() == ".npy" or (not path.exists() and find_shards(path)):
        return Reference(stats={}, images=ImageSet(path))
    if not path.is_file() or file_format(path) != "zip":
        return Reference(stats=load_stats(name))
    arrays = npz_arrays(path)
    if not arrays:  # a ZIP file of images
        return Reference(stats={}, images=ImageSet(path))
    images = ImageSet(path) if KEY in arrays and arrays[KEY].dtype == np.uint8 else None
    return Reference(stats={} if images and "mu" not in arrays else load_stats(name), images=images)
