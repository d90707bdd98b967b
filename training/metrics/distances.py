"""Distances between sets of images by their features: Fréchet distance and KID; and the Inception Score of one set.

Shape legend: M and N images, F features, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from torch_utils.distributed import World
from training.metrics.statistics import accumulation_device

NUM_SPLITS = 10  # of the Inception Score

_TILE = 4096  # rows and columns of the kernel matrix at a time: 128 MiB


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Fréchet distance d^2 of Gaussians with means mu [F] and covariances sigma [F, F], in float64 on the CPU.

    Source: Heusel et al., arXiv 1706.08500, Eq. 6: d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).
    Covariances may be singular, as they are with fewer samples than features.
    """
    mean_a, cov_a, mean_b, cov_b = (
        torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (mu_a, sigma_a, mu_b, sigma_b)
    )
    squared = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    return float(squared - 2 * _trace_of_root(cov_a, cov_b))


def _trace_of_root(cov_a: torch.Tensor, cov_b: torch.Tensor) -> torch.Tensor:
    """Return tr((A B)^(1/2)) for positive semidefinite A and B, float64 [F, F].

    For any factor A = R R^T, the product A B has the eigenvalues of the symmetric R^T B R, zeros aside. Symmetric
    eigenvalues take a fraction of the time of a general matrix root, and stay real. Rounding turns eigenvalues that
    should be zero into +-eps times the largest one; the root of that is 1e-8 of the largest root.
    """
    for first, second in ((cov_a, cov_b), (cov_b, cov_a)):
        factor, failed = torch.linalg.cholesky_ex(first)
        if not failed:
            return _sum_of_roots(factor, second)
    # Both singular: a factor of full column rank, which drops the null space and its rounding errors.
    values, vectors = torch.linalg.eigh(cov_a)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return _sum_of_roots(vectors[:, kept] * values[kept].sqrt(), cov_b)


def _sum_of_roots(factor: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    if factor.shape[1] == 0:
        return cov.new_zeros(())
    product = factor.T @ cov @ factor
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def inception_score(logits: np.ndarray, num_splits: int = NUM_SPLITS) -> tuple[float, float]:
    """Inception Score of logits [N, K]: mean and standard deviation (divisor: number of parts) over successive parts.

    The score of a part is exp of the mean divergence of an image's class distribution from that of all its images
    (Salimans et al., arXiv 1606.03498, Section 4); ten parts are usual. N images make at most N parts.
    """
    scores = []
    for part in np.array_split(logits, min(num_splits, len(logits))):
        log_p = torch.from_numpy(part).to(torch.float64).log_softmax(1)
        p = log_p.exp()
        log_mean = p.mean(0).log().clamp(min=torch.finfo(torch.float64).min)  # a class of probability 0 counts 0
        scores.append(float((p * (log_p - log_mean)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric's value. `error` is KID's standard error, or Inception Score's deviation over parts; else None."""

    value: float
    error: float | None = None


def kid(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> Score:
    """Kernel Inception Distance of features x [M, F] and y [N, F], at least two of each.

    That is the squared maximum mean discrepancy (MMD) under the kernel (x.y / F + 1)^3, without bias. Up to
    num_subsets^(1/2) * subset_size images (10,000) it is estimated over all pairs, which costs no more than the usual
    average over random subsets; above, by that average. Both estimate the same number.
    Sources: Binkowski et al., arXiv 1801.01401; Gretton et al., JMLR 13 (2012), Eq. 3.
    """
    device = accumulation_device(device or World().device)
    a, b = (torch.from_numpy(part).to(device) for part in (x, y))
    if max(len(a), len(b)) <= num_subsets**0.5 * subset_size:
        sums = _Sums(a, b)
        # The standard error by leaving out one image of either set at a time (jackknife).
        squared = sum(float(part.var(correction=0)) * (len(part) - 1) for part in sums.leave_one_out())
        return Score(value=sums.mmd(), error=squared**0.5)
    size = min(subset_size, len(a), len(b))
    random = np.random.default_rng(seed)
    values = np.empty(num_subsets)
    for i in range(num_subsets):
        chosen = [torch.from_numpy(random.choice(len(part), size, replace=False)).to(device) for part in (a, b)]
        values[i] = _Sums(a[chosen[0]], b[chosen[1]]).mmd()
    # The subsets overlap. The variance of one is inversely proportional to its size, so the estimate over all pairs has
    # the share size / n of it, which no number of subsets removes.
    share = size / min(len(a), len(b))
    variance = values.var(ddof=1) * (share + (1 - share) / num_subsets)
    return Score(value=float(values.mean()), error=float(variance**0.5))


class _Sums:
    """Sums of the kernel over pairs, by row, from which the estimate and its jackknife follow."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.aa, self.bb = _row_sums(a, a, skip_diagonal=True)[0], _row_sums(b, b, skip_diagonal=True)[0]
        self.ab, self.ba = _row_sums(a, b, skip_diagonal=False)  # [M], [N]

    def mmd(self) -> float:
        m, n = len(self.aa), len(self.bb)
        within = self.aa.sum() / (m * (m - 1)) + self.bb.sum() / (n * (n - 1))
        return float(within - 2 * self.ab.sum() / (m * n))

    def leave_one_out(self) -> list[torch.Tensor]:
        """Return the estimates without each one of a [M] and of b [N]; sets of two have no fewer pairs to offer."""
        found = []
        for own, other, cross in ((self.aa, self.bb, self.ab), (self.bb, self.aa, self.ba)):
            m, n = len(own), len(other)
            if m > 2:
                within = (own.sum() - 2 * own) / ((m - 1) * (m - 2)) + other.sum() / (n * (n - 1))
                found.append(within - 2 * (cross.sum() - cross) / ((m - 1) * n))
        return found


def _row_sums(a: torch.Tensor, b: torch.Tensor, *, skip_diagonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of k(a_i, b_j) over j [M] and over i [N], in float64, computed in tiles."""
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
