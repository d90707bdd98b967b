"""Inception Score against its definition and where it has a closed form."""

import math

import numpy as np
import pytest

from training.metrics.distances import inception_score


def brute_force(logits, num_splits):
    scores = []
    for part in np.array_split(logits.astype(float), num_splits):
        p = [[math.exp(v - max(row)) for v in row] for row in part]
        p = [[v / sum(row) for v in row] for row in p]
        mean = [sum(row[c] for row in p) / len(p) for c in range(len(p[0]))]
        divergence = [sum(v * math.log(v / m) for v, m in zip(row, mean, strict=True)) for row in p]
        scores.append(math.exp(sum(divergence) / len(divergence)))
    middle = sum(scores) / len(scores)
    return middle, math.sqrt(sum((s - middle) ** 2 for s in scores) / len(scores))


def test_it_is_that_of_the_definition():
    logits = np.random.default_rng(0).standard_normal((53, 7)).astype(np.float32) * 3
    assert inception_score(logits) == pytest.approx(brute_force(logits, 10), rel=1e-9)


def test_sure_and_diverse_images_score_the_number_of_classes():
    logits = np.tile(np.eye(6, dtype=np.float32) * 1e4, (20, 1))
    score, deviation = inception_score(logits)
    assert score == pytest.approx(6) and deviation == pytest.approx(0, abs=1e-9)


def test_images_that_say_nothing_score_one():
    assert inception_score(np.full((40, 5), 0.3, dtype=np.float32)) == (pytest.approx(1), pytest.approx(0))


def test_fewer_images_than_parts():
    score, _ = inception_score(np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32))
    assert score == pytest.approx(1)  # every part has one image, which differs from no other
