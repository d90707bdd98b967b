"""Whether mirrored pictures belong to a data set: they do among landscapes, and not among letters.

Shape legend: N pictures, C channels, H x W pixels.
"""

import numpy as np

from training.dataset.image_folder import ImageFolderDataset

NUM_PICTURES = 2048  # that are looked at, at most, spread evenly over the data set
NUM_ASKED = 512  # of them whose neighbours are searched, at most
SIDE = 16  # pixels; pictures are compared at this size
FOREIGN_FROM = 0.6  # a share from which mirrored pictures count as foreign: four standard errors above one half


def foreign_share(dataset: ImageFolderDataset) -> float:
    """How often a picture has a nearer neighbour in the set than its mirror image has, from 0 to 1.

    0.5 where mirrored pictures are as likely as pictures; towards 1 where they are foreign, and also where many
    pictures have a near copy in the set, which the mirror image lacks. Ties, as of pictures that are their own mirror
    image, count half. The arithmetic is exact, so that the result is the same on every machine.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), NUM_PICTURES)).round().astype(np.int64))
    pictures = np.concatenate([_reduced(dataset.read_batch([int(row)])[0]) for row in rows])
    return share_of(pictures)


def share_of(pictures: np.ndarray) -> float:
    """The same for `pictures` [N, C, H, W] of whole numbers."""
    if len(pictures) < 2:
        return 0.5
    asked = np.unique(np.linspace(0, len(pictures) - 1, min(len(pictures), NUM_ASKED)).round().astype(np.int64))
    own = _nearest(pictures[asked], pictures, asked)
    mirrored = _nearest(pictures[asked][..., ::-1], pictures, asked)
    return float(np.mean((own < mirrored) + 0.5 * (own == mirrored)))


def _nearest(asked: np.ndarray, pictures: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Squared distance of each of `asked` to the nearest of `pictures`, but for the one with the number `left_out`."""
    # Whole numbers below 2^53, which float64 adds without rounding.
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (asked, pictures))
    distances = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    distances[np.arange(len(a)), left_out] = np.inf
    return np.asarray(distances.min(axis=1))


def _reduced(pictures: np.ndarray) -> np.ndarray:
    """Sums over squares of pixels, so that SIDE x SIDE are left: [N, C, SIDE, SIDE], int64."""
    n, c, h, w = pictures.shape
    step = max(h // SIDE, 1)
    return np.asarray(pictures.reshape(n, c, h // step, step, w // step, step).sum(axis=(3, 5), dtype=np.int64))
