"""KID against its definition, pair by pair, and its standard error against what repetition shows."""

import numpy as np
import pytest

from training.metrics import distances
from training.metrics.distances import kid


def draw(num, dims=6, seed=0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((num, dims)) + shift).astype(np.float32)


def brute_force(x, y):
    """Gretton et al., Eq. 3, one pair after another."""
    x, y = x.astype(float), y.astype(float)

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@pytest.mark.parametrize("tile", [4096, 5])
def test_the_value_is_that_of_the_definition(tile, monkeypatch):
    monkeypatch.setattr(distances, "_TILE", tile)
    x, y = draw(13, seed=1), draw(17, seed=2, shift=0.5)
    assert kid(x, y).value == pytest.approx(brute_force(x, y), rel=1e-9)


def test_the_error_is_that_of_leaving_one_image_out():
    x, y = draw(9, seed=3), draw(12, seed=4, shift=0.3)
    variance = 0.0
    for values in (
        [brute_force(np.delete(x, i, 0), y) for i in range(len(x))],
        [brute_force(x, np.delete(y, i, 0)) for i in range(len(y))],
    ):
        variance += (len(values) - 1) / len(values) * sum((v - np.mean(values)) ** 2 for v in values)
    assert kid(x, y).error == pytest.approx(variance**0.5, rel=1e-9)


def test_subsets_estimate_the_same_number():
    x, y = draw(300, seed=5), draw(400, seed=6, shift=0.3)
    whole = kid(x, y)
    parts = kid(x, y, num_subsets=25, subset_size=50)  # 25^(1/2) * 50 = 250 < 300
    assert parts.value != whole.value
    assert abs(parts.value - whole.value) < 3 * parts.error
    assert kid(x, y, num_subsets=25, subset_size=50) == parts
    assert kid(x, y, num_subsets=25, subset_size=50, seed=1).value != parts.value


@pytest.mark.parametrize("options", [{}, {"num_subsets": 16, "subset_size": 40}])
def test_the_error_is_what_repetition_shows_and_the_mean_is_the_truth(options):
    # With an offset of s per feature and the kernel above, the truth has a closed form: k is a polynomial of x.y.
    shift, dims = 0.5, 6
    estimates = [kid(draw(200, dims, 2 * i), draw(200, dims, 2 * i + 1, shift), **options) for i in range(100)]
    values = np.array([estimate.value for estimate in estimates])
    stated = np.sqrt(np.mean([estimate.error**2 for estimate in estimates]))
    assert 0.75 < stated / values.std(ddof=1) < 1.35
    assert values.mean() == pytest.approx(true_distance(shift, dims), abs=4 * values.std() / 10)


def true_distance(shift, dims):
    """|mean of the feature map|^2 for standard normals with offsets 0 and s: E k(y,y') + E k(x,x') - 2 E k(x,y)."""

    def expected(a, b):
        # x.y for independent normals of unit variance with means a, b in each of `dims` features: moments of the sum
        # of products p with E p = ab, var p = 1 + a^2 + b^2, third central moment 6ab.
        mean, variance, third = dims * a * b, dims * (1 + a * a + b * b), dims * 6 * a * b
        u, v, w = mean / dims + 1, variance / dims**2, third / dims**3
        return u**3 + 3 * u * v + w

    return expected(shift, shift) + expected(0, 0) - 2 * expected(0, shift)


def test_two_images_have_a_value_without_an_error():
    estimate = kid(draw(2, seed=7), draw(2, seed=8))
    assert np.isfinite(estimate.value) and estimate.error == 0
