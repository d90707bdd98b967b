"""Precision, recall, density and coverage of generated images, by nearest neighbors in feature space.

Sources: Kynkäänniemi et al., arXiv 1904.06991 (precision, recall; k = 3); Naeem et al., arXiv 2002.09797 (density,
coverage; k = 5). The manifold of a set is the union of closed balls around its points, each with the distance to the
k-th nearest other point of the set as its radius.

Shape legend: R real and G generated images, F features, K neighborhood sizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.metrics.statistics import accumulation_device

# Distances are computed in tiles of this many rows and columns, 128 MiB in float64. Three of that size and the float64
# copies of two strips of features are alive at a time, whatever R and G are: under 0.6 GiB for 2048 features.
_TILE = 4096


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """The four metrics for one k."""

    precision: float  # share of generated images inside the real manifold
    recall: float  # share of real images inside the generated manifold
    density: float  # mean number of real balls around a generated image, over k; may exceed 1
    coverage: float  # share of real images whose ball holds a generated image


def manifold(
    real: np.ndarray, generated: np.ndarray, ks: Sequence[int], *, device: torch.device | None = None, tile: int = _TILE
) -> dict[int, Manifold]:
    """Compute the metrics for each k of features real [R, F] and generated [G, F], with more than max(ks) rows each."""
    device = accumulation_device(device or torch.device("cpu"))
    center = torch.from_numpy(real.mean(0, dtype=np.float64)).to(device)
    real_points, generated_points = (_Points(torch.from_numpy(part).to(device), center) for part in (real, generated))
    radii_real, radii_generated = _radii(real_points, ks, tile), _radii(generated_points, ks, tile)  # [K, R], [K, G]
    precise = torch.zeros(len(ks), len(generated), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(ks), len(real), dtype=torch.bool, device=device)
    covered = torch.zeros_like(recalled)
    inside = [0] * len(ks)  # pairs of a generated image and a real ball around it
    for rows, columns, squared in _tiles(generated_points, real_points, tile):
        for index in range(len(ks)):
            near_real = squared <= radii_real[index, columns]
            precise[index, rows] |= near_real.any(1)
            covered[index, columns] |= near_real.any(0)
            inside[index] += int(near_real.sum())
            recalled[index, columns] |= (squared <= radii_generated[index, rows, None]).any(0)
    return {
        k: Manifold(
            precision=float(precise[index].double().mean()),
            recall=float(recalled[index].double().mean()),
            density=inside[index] / (k * len(generated)),
            coverage=float(covered[index].double().mean()),
        )
        for index, k in enumerate(ks)
    }


@dataclass(frozen=True)
class _Points:
    features: torch.Tensor  # [N, F], as given
    center: torch.Tensor  # float64 [F]; relative to it, squared norms are small and distances cancel less

    def __len__(self) -> int:
        return len(self.features)

    def strip(self, rows: slice) -> torch.Tensor:
        return self.features[rows].to(torch.float64) - self.center


def _radii(points: _Points, ks: Sequence[int], tile: int) -> torch.Tensor:
    """Return each point's squared distance to its k-th nearest other point, for each k: float64 [K, R]."""
    most = max(ks)
    nearest = torch.full([len(points), most], float("inf"), dtype=torch.float64, device=points.center.device)
    for rows, columns, squared in _tiles(points, points, tile):
        if rows == columns:
            squared.fill_diagonal_(float("inf"))
        found = squared.topk(min(most, squared.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], dim=1).topk(most, largest=False).values
    # Room for rounding: copies of a point's k-th neighbor lie on the surface of its ball, which belongs to it.
    return nearest[:, [k - 1 for k in ks]].T.contiguous() * (1 + 1e-9)


def _tiles(a: _Points, b: _Points, tile: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield the squared distances between a and b in tiles, each with its rows and columns."""
    for i in range(0, len(a), tile):
        rows = slice(i, min(i + tile, len(a)))
        first = a.strip(rows)
        first_norms = first.square().sum(1, keepdim=True)
        for j in range(0, len(b), tile):
            columns = slice(j, min(j + tile, len(b)))
            second = b.strip(columns)
            norms = first_norms + second.square().sum(1)
            squared = torch.addmm(norms, first, second.T, alpha=-2)
            # Copies are at distance 0: rounding of the norms must not leave a remainder.
            squared.masked_fill_(squared < norms.mul_(1e-12), 0)
            yield rows, columns, squared
