"""Fréchet distance: published numbers, closed forms, a general matrix root, and singular covariances."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.helpers.paths import GOLDEN_DIR
from training.metrics.distances import frechet_distance


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def draw(num, dims, seed, scale=1.0):
    random = np.random.default_rng(seed)
    mix, offset = random.standard_normal((dims, dims)) * scale, random.standard_normal(dims)
    return random.standard_normal((num, dims)) @ mix + offset


def from_features(a, b):
    """Another way, which knows the features: tr((S_a S_b)^(1/2)) is the sum of the singular values of A B^T."""
    rows = [(part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (a, b)]
    squares = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((part**2).sum() for part in rows)
    return squares - 2 * np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()


@pytest.mark.parametrize("index", range(3))
def test_golden_distances(index):
    golden = json.loads((GOLDEN_DIR / "numbers.json").read_text())["frechet"][index]
    with np.load(GOLDEN_DIR / "frechet.npz") as file:
        a, b = file[f"a{index}"], file[f"b{index}"]
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(golden, rel=1e-4)
    assert from_features(a, b) == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("num_a, num_b", [(500, 300), (500, 20), (20, 500), (20, 30), (2, 2), (61, 61)])
def test_it_agrees_with_the_features_where_samples_are_fewer_than_dimensions(num_a, num_b):
    a, b = draw(num_a, 60, 1), draw(num_b, 60, 2, scale=0.7)
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(from_features(a, b), rel=1e-6)


def test_it_agrees_with_the_general_matrix_root():
    a, b = moments(draw(400, 30, 3)), moments(draw(400, 30, 4))
    root = scipy.linalg.sqrtm(a[1] @ b[1])
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root.real)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-9)


def test_gaussians_with_independent_features_have_a_closed_form():
    random = np.random.default_rng(0)
    mu_a, mu_b = random.standard_normal((2, 9))
    std_a, std_b = random.uniform(0, 3, (2, 9))
    std_a[0] = std_b[1] = 0
    expected = ((mu_a - mu_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(mu_a, np.diag(std_a**2), mu_b, np.diag(std_b**2)) == pytest.approx(expected, rel=1e-6)


def test_images_that_are_all_alike_have_no_covariance():
    mu, sigma = moments(draw(100, 8, 5))
    nothing = np.zeros((8, 8))
    assert frechet_distance(mu, nothing, mu, nothing) == 0
    assert frechet_distance(mu, nothing, mu, sigma) == pytest.approx(np.trace(sigma))


def test_it_is_a_distance():
    a, b = moments(draw(50, 20, 6)), moments(draw(12, 20, 7))
    scale = np.trace(a[1])
    for same in (a, b):
        assert frechet_distance(*same, *same) == pytest.approx(0, abs=1e-6 * scale)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-6)


def test_float32_statistics_are_taken_as_well():
    a, b = moments(draw(100, 10, 8)), moments(draw(100, 10, 9))
    rounded = [part.astype(np.float32) for part in (*a, *b)]
    assert frechet_distance(*rounded) == pytest.approx(frechet_distance(*a, *b), rel=1e-4)


def test_it_leaves_its_arguments_alone():
    parts = [*moments(draw(10, 12, 10)), *moments(draw(10, 12, 11))]
    copies = [part.copy() for part in parts]
    frechet_distance(*parts)
    assert all(np.array_equal(part, copy) for part, copy in zip(parts, copies, strict=True))
    assert torch.get_default_dtype() == torch.float32
