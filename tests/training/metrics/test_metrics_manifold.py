"""Precision, recall, density and coverage against their definitions, point by point, and the memory that they take."""

import subprocess
import sys

import numpy as np
import pytest

from training.metrics.manifold import manifold
from training.presets import REPOSITORY_DIR


def brute_force(real, generated, k):
    real, generated = real.astype(float), generated.astype(float)

    def squared(a, b):
        return float(((a - b) ** 2).sum())

    def radius(points, i):
        return sorted(squared(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    inside = [[squared(x, g) <= r for x, r in zip(real, real_radii, strict=True)] for g in generated]
    reached = [any(squared(x, g) <= r for g, r in zip(generated, generated_radii, strict=True)) for x in real]
    return (
        np.mean([any(row) for row in inside]),
        np.mean(reached),
        sum(map(sum, inside)) / (k * len(generated)),
        np.mean([any(row[i] for row in inside) for i in range(len(real))]),
    )


def figures(found):
    return found.precision, found.recall, found.density, found.coverage


def draw(num, dims, seed, shift=0.0, scale=1.0):
    points = np.random.default_rng(seed).standard_normal((num, dims)) * scale + shift
    return points.astype(np.float32)


@pytest.mark.parametrize("tile", [4096, 16, 7])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_figures_are_those_of_the_definitions(tile, offset):
    real, generated = draw(40, 3, 1, offset), draw(55, 3, 2, offset + 0.7, scale=0.6)
    found = manifold(real, generated, (3, 5), tile=tile)
    for k in (3, 5):
        expected = brute_force(real, generated, k)
        assert figures(found[k]) == pytest.approx(expected, abs=1e-12)
        assert len({*expected, 0.0, 1.0}) == 6  # the example tells the four apart


@pytest.mark.parametrize("tile", [4096, 9])
def test_copies_are_at_distance_zero(tile):
    real = np.repeat(draw(8, 20, 3, shift=5.0), 5, axis=0)  # with k = 3, every ball has radius 0
    generated = np.concatenate([real[::5][:4], draw(6, 20, 4)])
    found = manifold(real, generated, (3,), tile=tile)[3]
    assert figures(found) == pytest.approx(brute_force(real, generated, 3))
    assert found.precision == 0.4 and found.coverage == 0.5


def test_points_on_a_line_by_hand():
    real = np.array([[0], [1], [2], [3]], dtype=np.float32)  # radii for k = 1: 1
    generated = np.array([[1.5], [3.5], [9.0], [9.5]], dtype=np.float32)  # radii for k = 1: 2, 2, 0.5, 0.5
    found = manifold(real, generated, (1,))[1]
    # 1.5 is in the balls of 1 and 2 (and not of 0, 3 at distance 1.5); 3.5 in that of 3 only.
    assert figures(found) == (0.5, 1.0, 3 / 4, 3 / 4)


def test_the_same_set_has_full_precision_recall_and_coverage():
    real = draw(30, 4, 5)
    found = manifold(real, real.copy(), (3, 5))
    for k in (3, 5):
        assert figures(found[k]) == (1.0, 1.0, pytest.approx((k + 1) / k), 1.0)


PEAK = """
import resource, sys
import numpy as np
from training.metrics.manifold import manifold
manifold(np.zeros((50, 4), np.float32), np.zeros((50, 4), np.float32), (3,))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
points = np.random.default_rng(0).standard_normal((7000, 4)).astype(np.float32)
before = peak()
manifold(points[:3500], points[3500:], (3, 5), tile=1024)
small = peak() - before
manifold(points, points[::-1].copy(), (3, 5), tile=1024)
print(small, peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
def test_memory_does_not_grow_with_the_number_of_pairs():
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=REPOSITORY_DIR, check=True, timeout=120
    )
    small, large = map(int, result.stdout.split())
    tile_bytes = 1024**2 * 8
    assert large < 12 * tile_bytes, "7000 x 7000 distances are 47 such tiles"
    assert large < small + 4 * tile_bytes
