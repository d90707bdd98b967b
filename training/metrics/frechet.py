"""Fréchet distance between Gaussians.

Source: Heusel et al., arXiv 1706.08500, Eq. 6: d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

Shape legend: F features.
"""

import numpy as np
import torch


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """d^2 between Gaussians with means mu [F] and covariances sigma [F, F], computed in float64 on the CPU.

    The covariances may be singular, as they are where samples are fewer than features.
    """
    mean_a, cov_a, mean_b, cov_b = (
        torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (mu_a, sigma_a, mu_b, sigma_b)
    )
    squared = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    return float(squared - 2 * trace_of_root(cov_a, cov_b))


def trace_of_root(cov_a: torch.Tensor, cov_b: torch.Tensor) -> torch.Tensor:
    """tr((A B)^(1/2)) for positive semidefinite A and B, float64 [F, F].

    With any factor A = R R^T, the product A B has the eigenvalues of the symmetric R^T B R, zeros aside. Symmetric
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
