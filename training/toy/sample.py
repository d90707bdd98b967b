"""Sampling in the 2-D toy example, and measures of how well samples keep to the true distribution.

Shape legend: N points, S sampling steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from training.sampling.sampler import edm_sampler
from training.toy.mixture import Mixture

TREE_SHARE = 0.999  # of the true samples are on the tree
CONTOUR_SHARE = 0.99  # of the true samples are inside the paper's contour
_THRESHOLD_SAMPLES = 1 << 16


class Density(Protocol):
    """A distribution to sample from: a Mixture or a ToyModel."""

    def logp(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Log density [...] of points [..., 2]."""

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Its gradient [..., 2]."""


def do_sample(
    net: Density,
    x_init: torch.Tensor,
    guidance: float = 1,
    gnet: Density | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 5,
    rho: float = 7,
    *,
    interval: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Return the trajectories [S + 1, N, 2] of the points `x_init` [N, 2] from noise level `sigma_max` to zero.

    The last entry contains the samples. The denoiser is D = x + sigma**2 score, the solver is Heun's. `interval`: see
    `edm_sampler`. Raises ConfigError for invalid values.
    """
    starts: dict[float, torch.Tensor] = {}
    denoise = _denoiser(net)

    def recorded(x: torch.Tensor, sigma: torch.Tensor, labels: None) -> torch.Tensor:
        # The solver evaluates the previous step's trial point at this noise level first; the step's start replaces it.
        starts[float(sigma)] = x
        return denoise(x, sigma, labels)

    with torch.no_grad():
        samples = edm_sampler(
            recorded,
            x_init / sigma_max,
            gnet=None if gnet is None else _denoiser(gnet),
            guidance=guidance,
            num_steps=num_steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            dtype=x_init.dtype,
            interval=interval,
        )
    return torch.stack([*starts.values(), samples])


def _denoiser(net: Density) -> Callable[..., torch.Tensor]:
    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: None) -> torch.Tensor:
        return x + sigma.square() * net.score(x, sigma)

    return denoise


def thin(points: torch.Tensor, spacing: float) -> torch.Tensor:
    """Return the points [N, 2] without those that are closer than `spacing` to an earlier one that was kept."""
    kept = points[:0]
    for point in points:
        if not len(kept) or bool((kept - point).square().sum(1).min() >= spacing**2):
            kept = torch.cat([kept, point[None]])
    return kept


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Measures of how well samples keep to the true distribution; all are shares from 0 to 1."""

    off_tree: float  # samples at a lower true density than 99.9 % of the true samples
    outside: float  # samples outside the contour with 99 % of the true distribution, the paper's measure
    components: float  # mixture components hit by at least one sample on the tree
    branches: float  # branches hit by at least one sample on the tree


def density_threshold(truth: Mixture, share: float = TREE_SHARE) -> float:
    """Log density without noise that `share` of the true samples exceed."""
    generator = torch.Generator(truth.device).manual_seed(0)
    logp = truth.logp(truth.sample(_THRESHOLD_SAMPLES, generator=generator))
    return float(logp.sort().values[round(_THRESHOLD_SAMPLES * (1 - share))])


def fidelity(
    truth: Mixture, samples: torch.Tensor, threshold: float | None = None, contour: float | None = None
) -> Fidelity:
    """Measure `samples` [N, 2]; each on the tree hits its likeliest component.

    `threshold` and `contour`: see `density_threshold`, for the tree and for the paper's contour.
    """
    threshold = density_threshold(truth) if threshold is None else threshold
    contour = density_threshold(truth, CONTOUR_SHARE) if contour is None else contour
    logp = truth.logp(samples)
    on_tree = logp >= threshold
    hit = truth.component(samples[on_tree]).unique()
    num_components = len(truth.phi)
    branches = (hit // (num_components // truth.num_branches)).unique()
    return Fidelity(
        off_tree=1 - float(on_tree.double().mean()),
        outside=float((logp < contour).double().mean()),
        components=len(hit) / num_components,
        branches=len(branches) / truth.num_branches,
    )
