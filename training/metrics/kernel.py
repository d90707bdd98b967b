"""Kernel Inception Distance: the squared maximum mean discrepancy (MMD) under a polynomial kernel, without bias.

Sources: Binkowski et al., arXiv 1801.01401; Gretton et al., JMLR 13 (2012), Eq. 3.

Shape legend: M and N images, F features.
"""

from dataclasses import dataclass

import numpy as np
import torch

from torch_utils.distributed import World
from training.metrics.statistics import accumulation_device

_TILE = 4096  # rows and columns of the kernel matrix at a time: 128 MiB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its standard error."""

    value: float
    error: float


def kid(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> Estimate:
    """KID between features x [M, F] and y [N, F], at least two of each, with the kernel (x.y / F + 1)^3.

    Up to num_subsets^(1/2) * subset_size images (10,000), the estimate over all pairs, which costs no more than the
    usual average over random subsets; above, that average. Both estimate the same number without bias.
    """
    place = accumulation_device(device or World().device)
    a, b = (torch.from_numpy(part).to(place) for part in (x, y))
    if max(len(a), len(b)) <= num_subsets**0.5 * subset_size:
        return _over_all_pairs(a, b)
    size = min(subset_size, len(a), len(b))
    random = np.random.default_rng(seed)
    values = np.empty(num_subsets)
    for i in range(num_subsets):
        chosen = [torch.from_numpy(random.choice(len(part), size, replace=False)).to(place) for part in (a, b)]
        values[i] = _Sums(a[chosen[0]], b[chosen[1]]).mmd()
    # The subsets overlap. With the variance of one inversely proportional to its size, that of the estimate over all
    # pairs is a share size / n of it, which no number of subsets removes.
    share = size / min(len(a), len(b))
    variance = values.var(ddof=1) * (share + (1 - share) / num_subsets)
    return Estimate(value=float(values.mean()), error=float(variance**0.5))


def _over_all_pairs(a: torch.Tensor, b: torch.Tensor) -> Estimate:
    """The estimate over all pairs; its standard error by leaving out one image of either set at a time (jackknife)."""
    sums = _Sums(a, b)
    variance = 0.0
    for values in sums.leave_one_out():
        n = len(values)
        variance += float(values.var(correction=0)) * (n - 1)
    return Estimate(value=sums.mmd(), error=variance**0.5)


class _Sums:
    """Sums of the kernel over pairs, by row: everything that the estimate and its jackknife need."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.aa, self.bb = _row_sums(a, a, skip_diagonal=True)[0], _row_sums(b, b, skip_diagonal=True)[0]
        self.ab, self.ba = _row_sums(a, b, skip_diagonal=False)  # [M], [N]

    def mmd(self) -> float:
        """The unbiased estimate of the squared MMD."""
        m, n = len(self.aa), len(self.bb)
        within = self.aa.sum() / (m * (m - 1)) + self.bb.sum() / (n * (n - 1))
        return float(within - 2 * self.ab.sum() / (m * n))

    def leave_one_out(self) -> list[torch.Tensor]:
        """The estimates without each one of a [M] and of b [N]; none for a set of two, which has no fewer pairs."""
        found = []
        for own, other, cross in ((self.aa, self.bb, self.ab), (self.bb, self.aa, self.ba)):
            m, n = len(own), len(other)
            if m > 2:
                within = (own.sum() - 2 * own) / ((m - 1) * (m - 2)) + other.sum() / (n * (n - 1))
                found.append(within - 2 * (cross.sum() - cross) / ((m - 1) * n))
        return found


def _row_sums(a: torch.Tensor, b: torch.Tensor, *, skip_diagonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of k(a_i, b_j) over j [M] and over i [N], in float64, in tiles."""
    rows = a.new_zeros(len(a), dtype=torch.float64)
    columns = a.new_zeros(len(b), dtype=torch.float64)
    for i in range(0, len(a), _TILE):
        first = a[i : i + _TILE].to(torch.float64)
        for j in range(0, len(b), _TILE):
            tile = first @ b[j : j + _TILE].to(torch.float64).T
            tile = tile.div_(a.shape[1]).add_(1).pow_(3)
            if skip_diagonal and i == j:
                tile.fill_diagonal_(0)
            rows[i : i + _TILE] += tile.sum(1)
            columns[j : j + _TILE] += tile.sum(0)
    return rows, columns
