"""The true distribution of the 2-D toy example: a Gaussian mixture in the shape of two trees, one for each class.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Section 3 and
Appendix C. Noise of level sigma turns each covariance S into S + sigma**2 I, so that density and score are known in
closed form at every noise level.

Shape legend: N points, B branches, T components along a branch, K = B * T.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dnnlib.errors import ConfigError

CLASSES = {"A": math.pi / 4, "B": math.pi * 5 / 4}  # with the angles at which their trees grow
NUM_DEPTHS = 7

_POSITIONS = np.linspace(0.07, 0.93, num=8)  # of a branch's components, in units of its length
_TABLE_SIZE = 1 << 16  # resolution of the choice of a component
_CHUNK = 128  # points at a time on a CPU, so that a chunk's [N, K] numbers stay in its cache
_CHUNK_GPU = 8192  # points at a time elsewhere: few kernels, bounded memory

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Equal components, evenly spaced along a line."""

    weight: float  # of each component
    start: Array  # [2]
    extent: Array  # [2], from start to end
    covariance: Array  # [2, 2], of each component


class Mixture:
    """Gaussian mixture with density, log density, score and samples at any noise level.

    Points x are [..., 2], and `sigma` is a number or a tensor that broadcasts to [...]. Everything is computed in x's
    dtype and in log space: far from all components the log density and the score stay finite.
    """

    def __init__(self, branches: Sequence[Branch], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        weight = np.array([b.weight for b in branches])
        weight = weight / (weight.sum() * len(_POSITIONS))
        start, self._extent = (np.stack([getattr(b, name) for b in branches]) for name in ("start", "extent"))
        self._center = start + self._extent / 2
        self._covariance = np.stack([b.covariance for b in branches])
        self._log_weight = np.log(weight)
        means = start[:, None] + self._extent[:, None] * _POSITIONS[:, None]
        per_branch = len(_POSITIONS)
        self.phi = self._tensor(weight.repeat(per_branch))  # [K], component weights
        self.mu = self._tensor(means.reshape(-1, 2))  # [K, 2], means
        self.Sigma = self._tensor(self._covariance.repeat(per_branch, axis=0))  # [K, 2, 2], covariances
        # Component i owns the entries from round(weight before it * size) on.
        bounds = np.round(np.cumsum(weight.repeat(per_branch)) * _TABLE_SIZE).astype(np.int64)
        table = np.searchsorted(bounds, np.arange(_TABLE_SIZE), side="right").clip(max=len(bounds) - 1)
        self._table = torch.from_numpy(table).to(self.device)
        self.num_branches = len(branches)

    def logp(self, x: torch.Tensor, sigma: float | torch.Tensor = 0, max_batch_size: int = 1 << 14) -> torch.Tensor:
        """Log density [...]. No more than `max_batch_size` points are computed at once."""
        terms = self._chunked(lambda parts: parts.log_terms().flatten(1).logsumexp(1), x, sigma, max_batch_size)
        return terms.reshape(x.shape[:-1])

    def pdf(self, x: torch.Tensor, sigma: float | torch.Tensor = 0, max_batch_size: int = 1 << 14) -> torch.Tensor:
        """Density [...]; it may underflow to zero."""
        return self.logp(x, sigma, max_batch_size).exp()

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor = 0) -> torch.Tensor:
        """Gradient [..., 2] of the log density."""
        return self._chunked(_Parts.score, x, sigma).reshape(x.shape)

    def component(self, x: torch.Tensor, sigma: float | torch.Tensor = 0) -> torch.Tensor:
        """Index [...] of the component that most likely generated the point; its branch is index // (K / B)."""
        index = self._chunked(lambda parts: parts.log_terms().mT.flatten(1).argmax(1), x, sigma)
        return index.reshape(x.shape[:-1])

    def sample(
        self, shape: int | Sequence[int], sigma: float | torch.Tensor = 0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draw points [*shape, 2]: first an integer for each, which selects its component, then two normal numbers."""
        shape = [shape] if isinstance(shape, int) else list(shape)
        device = self.device if generator is None else generator.device
        entry = torch.randint(_TABLE_SIZE, shape, device=device, generator=generator).to(self.device)
        noise = torch.randn([*shape, 2], device=device, generator=generator).to(self.device)
        index = self._table[entry]
        added = torch.as_tensor(sigma, dtype=noise.dtype, device=self.device).square()[..., None, None]
        matrix = self.Sigma[index] + added * torch.eye(2, device=self.device)
        return self.mu[index] + (_sqrtm(matrix) @ noise[..., None])[..., 0]

    def _tensor(self, values: Array, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(values).to(dtype).to(self.device)  # in this order: MPS has no float64

    def _chunked(
        self,
        evaluate: Callable[["_Parts"], torch.Tensor],
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        max_batch_size: int = 1 << 14,
    ) -> torch.Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1]).flatten()
        values = (self._center, self._extent, self._covariance, self._log_weight, _POSITIONS - 0.5)
        branches = [self._tensor(value, x.dtype) for value in values]
        size = min(_CHUNK if x.device.type == "cpu" else _CHUNK_GPU, max_batch_size)
        chunks = zip(x.reshape(-1, 2).split(size), level.split(size), strict=True)
        return torch.cat([evaluate(_Parts(*chunk, branches)) for chunk in chunks])


class _Parts:
    """Common terms of density and score, for some points at their noise levels.

    A branch's components share a covariance and lie on a line through its center, at the steps t. The exponent is
    therefore a parabola in t, whose [N, B] coefficients are computed once per branch and not T times.
    """

    def __init__(self, x: torch.Tensor, sigma: torch.Tensor, branches: Sequence[torch.Tensor]) -> None:
        center, extent, covariance, log_weight, self.steps = branches
        variance = sigma.square()[:, None]
        s11, s12, s22 = covariance[:, 0, 0] + variance, covariance[:, 0, 1], covariance[:, 1, 1] + variance
        det = s11 * s22 - s12.square()
        dx, dy = x[:, :1] - center[:, 0], x[:, 1:] - center[:, 1]
        ex, ey = extent[:, 0], extent[:, 1]
        # The inverse covariance times the distance from the center, and times the extent: [N, B] each.
        self.dx, self.dy = (s22 * dx - s12 * dy) / det, (s11 * dy - s12 * dx) / det
        self.ex, self.ey = (s22 * ex - s12 * ey) / det, (s11 * ey - s12 * ex) / det
        self.offset = log_weight - math.log(2 * math.pi) - (det.log() + dx * self.dx + dy * self.dy) / 2
        self.cross = dx * self.ex + dy * self.ey
        self.curvature = ex * self.ex + ey * self.ey

    def log_terms(self) -> torch.Tensor:
        """Logarithm of each component's share of the density, [N, T, B]: many branches innermost, since T is small."""
        t = self.steps[:, None]
        return torch.addcmul(
            torch.addcmul(self.offset[:, None], self.cross[:, None], t), self.curvature[:, None], t.square(), value=-0.5
        )

    def score(self) -> torch.Tensor:
        """Gradient of the log density: [N, 2]."""
        terms = self.log_terms()
        weights = terms.flatten(1).softmax(1).view_as(terms)
        total, moment = weights.sum(1), (weights * self.steps[:, None]).sum(1)  # of each branch: [N, B]
        pulls = [moment * e - total * d for e, d in ((self.ex, self.dx), (self.ey, self.dy))]
        return torch.stack([pull.sum(1) for pull in pulls], dim=1)


def gt(
    classes: str = "A",
    device: torch.device | str = "cpu",
    seed: int = 2,
    origin: Sequence[float] = (0.0030, 0.0325),
    scale: Sequence[float] = (1.3136, 1.3844),
) -> Mixture:
    """The true distribution of 'A', 'B' or 'AB', where B is the same as alone. Raises ConfigError for other classes."""
    if not classes or any(name not in CLASSES for name in classes) or len(set(classes)) < len(classes):
        raise ConfigError(f"unknown classes={classes!r} of the toy example; use A, B or AB")
    rng = np.random.RandomState(seed)
    size = np.array(scale, dtype=np.float64)
    trees = {
        name: list(_grow(rng, size, 0, np.array(origin, dtype=np.float64), angle)) for name, angle in CLASSES.items()
    }
    return Mixture([branch for name in CLASSES if name in classes for branch in trees[name]], device)


def _grow(rng: np.random.RandomState, scale: Array, depth: int, position: Array, angle: float) -> Iterator[Branch]:
    """Yield a branch and all branches that grow from it. The order of the draws from `rng` is part of the result."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8**depth * (1 + 0.2 * rng.randn())
    thickness = 0.2 * 0.8**depth / length  # relative to the length
    size = scale * length * 0.06
    along = np.outer(direction, direction)
    yield Branch(
        weight=length * 0.5**depth,
        start=position * scale,
        extent=direction * length * scale,
        covariance=(along + (np.eye(2) - along) * thickness**2) * np.outer(size, size),
    )
    for sign in (1, -1):
        child_angle = angle + sign * 0.7**depth * (1 + 0.2 * rng.randn())  # drawn at the tips too, for the order
        if depth + 1 < NUM_DEPTHS:
            yield from _grow(rng, scale, depth + 1, position + direction * length, child_angle)


def _sqrtm(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of positive definite matrices [..., 2, 2], by the Cayley-Hamilton theorem."""
    (a, b), (_, d) = (row.unbind(-1) for row in matrix.unbind(-2))
    root = (a * d - b.square()).sqrt()
    norm = (a + d + 2 * root).sqrt()
    return (matrix + root[..., None, None] * torch.eye(2, device=matrix.device)) / norm[..., None, None]
