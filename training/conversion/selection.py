"""Which of the pictures of a source are taken."""

from collections.abc import Sequence

import numpy as np

from dnnlib.errors import ConfigError
from training.conversion.image_source import Source


def choose_rows(source: Source, max_images: int | None, *, balanced: bool = False) -> Sequence[int]:
    """Which pictures of `source` to take: the first max_images, or `balanced` the first of every class, in order.

    A class with fewer pictures than its share gives all of them, and the others give more; what does not divide goes
    to the classes of the smallest index.
    """
    count = len(source.names)
    if max_images is None or (max_images >= count and not balanced):
        return range(count)
    if not balanced:
        return range(max_images)
    if source.labels is None or isinstance(source.labels[0], list):
        kind = "no labels" if source.labels is None else "labels that are vectors"
        raise ConfigError(f"--balanced takes images evenly over classes, but {source.path} has {kind}; leave it out")
    classes = np.asarray(source.labels)
    available = np.bincount(classes)
    taken = np.zeros_like(available)
    left = min(max_images, count)
    while left:
        open_classes = np.flatnonzero(taken < available)[:left]
        share = max(1, left // len(open_classes))
        more = np.minimum(share, (available - taken)[open_classes])
        taken[open_classes] += more
        left -= int(more.sum())
    place = np.zeros(count, dtype=np.int64)  # of each picture within its class
    order = np.argsort(classes, kind="stable")
    starts = np.cumsum(available) - available
    place[order] = np.arange(count) - starts[classes[order]]
    rows: list[int] = np.flatnonzero(place < taken[classes]).tolist()
    return rows
