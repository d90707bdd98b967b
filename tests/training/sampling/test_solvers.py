"""Each solver converges to the exact flow at its order."""

import math
from itertools import pairwise

import pytest
import torch

from training.sampling.schedule import HeunOptions
from training.sampling.solvers import SOLVERS, euler, heun

MEANS = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
STD = 0.15


def mixture_denoiser(x, sigma, step_sigma):
    """E[clean | x] for data from a mixture of three Gaussians on the line, exactly; elements are independent."""
    variance = STD**2 + sigma**2
    logits = WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * variance)
    return (logits.softmax(-1) * (STD**2 * x[..., None] + sigma**2 * MEANS) / variance).sum(-1)


def gaussian_denoiser(x, sigma, step_sigma):
    return (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)


NOISE = torch.linspace(-2, 2, 41, dtype=torch.float64)


def levels(num_steps, low=0.3, high=10.0):
    """From high to low, without the last step to zero, which is of first order by design."""
    return HeunOptions(num_steps=num_steps, sigma_min=low, sigma_max=high, rho=3).sigmas()[:-1]


def order(solver, denoise, exact, counts=(129, 257, 513)):
    errors = [float((solver(denoise, levels(n), NOISE) - exact).abs().max()) for n in counts]
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("dpmpp2m", 2)])
def test_order_on_a_gaussian_whose_flow_is_known(name: str, expected: int):
    # (x - mean) shrinks in proportion to sqrt(std^2 + sigma^2).
    exact = 0.3 + (NOISE * 10 - 0.3) * math.sqrt((0.25 + 0.09) / (0.25 + 100))
    orders = order(SOLVERS[name], gaussian_denoiser, exact)
    assert all(abs(found - expected) < 0.25 for found in orders), orders


@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("dpmpp2m", 2)])
def test_order_on_a_mixture(name: str, expected: int):
    exact = heun(mixture_denoiser, levels(8193), NOISE)
    orders = order(SOLVERS[name], mixture_denoiser, exact)
    assert all(abs(found - expected) < 0.25 for found in orders), orders


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_have_the_distribution_of_the_data(name: str):
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = SOLVERS[name](mixture_denoiser, HeunOptions(num_steps=64).sigmas(), noise)
    nearest = (images[:, None] - MEANS).abs().argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(images)
    assert torch.allclose(shares.double(), WEIGHTS, atol=0.02)
    assert abs(float((images - MEANS[nearest]).std()) - STD) < 0.02


def test_second_order_pays():
    """At 20 evaluations, DPM-Solver++ is closer to the exact flow than Euler's method."""
    exact = heun(mixture_denoiser, HeunOptions(num_steps=4097).sigmas(), NOISE)
    sigmas = HeunOptions(num_steps=20).sigmas()
    errors = {name: float((SOLVERS[name](mixture_denoiser, sigmas, NOISE) - exact).abs().mean()) for name in SOLVERS}
    assert errors["dpmpp2m"] < errors["euler"] / 2, errors


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_gives_the_denoisers_answer(name: str):
    images = SOLVERS[name](mixture_denoiser, [80.0, 0.0], NOISE)
    torch.testing.assert_close(images, mixture_denoiser(NOISE * 80, 80.0, 80.0))


def test_the_denoiser_is_told_where_the_step_began():
    seen = []

    def denoise(x, sigma, step_sigma):
        seen.append((sigma, step_sigma))
        return torch.zeros_like(x)

    heun(denoise, [4.0, 2.0, 0.0], NOISE)
    assert seen == [(4, 4), (2, 4), (2, 2)]
    seen.clear()
    euler(denoise, [4.0, 2.0, 0.0], NOISE, churn=lambda x, sigma: (x, sigma * 1.5))
    assert seen == [(6, 4), (3, 2)]
