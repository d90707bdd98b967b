"""The toy example's true distribution, against golden numbers and against the plain formulas in float64."""

import math

import pytest
import torch

from dnnlib.errors import ConfigError
from training.toy.mixture import Mixture, gt


def plain_terms(mixture: Mixture, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Log of each component's share of the density, component by component: [N, K] in float64."""
    variance = sigma.double().square()[:, None, None, None] * torch.eye(2)
    normal = torch.distributions.MultivariateNormal(mixture.mu.double(), mixture.Sigma.double() + variance)
    return normal.log_prob(x.double()[:, None]) + mixture.phi.double().log()


@pytest.fixture(scope="module")
def noisy() -> tuple[Mixture, torch.Tensor, torch.Tensor]:
    """The mixture of both classes with some noisy points of it."""
    mixture, generator = gt("AB"), torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2.5, 0.5, 150)
    return mixture, mixture.sample(150, sigma, generator), sigma


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_the_mixture_is_the_published_one(golden, classes) -> None:
    reference, _ = golden("toy.safetensors")
    mixture = gt(classes)
    for name in ("phi", "mu", "Sigma"):
        torch.testing.assert_close(getattr(mixture, name), reference[f"{classes}.{name}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_density_and_score_are_the_published_ones_where_those_are_finite(golden, classes) -> None:
    reference, _ = golden("toy.safetensors")
    mixture, x, sigma = gt(classes), reference[f"{classes}.x"], reference[f"{classes}.sigma"]
    values = {
        "logp": mixture.logp(x, sigma),
        "logp0": mixture.logp(x),
        "score": mixture.score(x, sigma),
    }
    for name, value in values.items():
        wanted = reference[f"{classes}.{name}"]
        finite = wanted.isfinite()
        assert finite.sum() >= 16
        assert (value - wanted)[finite].abs().max() <= 1e-6 * wanted[finite].abs().max()
        assert value.isfinite().all()  # also where the published numbers underflow
    torch.testing.assert_close(mixture.pdf(x, sigma), values["logp"].exp())


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_the_same_generator_draws_the_published_samples(golden, classes) -> None:
    reference, _ = golden("toy.safetensors")
    sample = gt(classes).sample(256, 0.1, torch.Generator().manual_seed(92))
    torch.testing.assert_close(sample, reference[f"{classes}.sample"], rtol=0, atol=1e-6)


def test_density_score_and_component_follow_the_plain_formulas_at_every_noise_level(noisy) -> None:
    mixture, x, sigma = noisy
    point = x.double().requires_grad_()
    terms = plain_terms(mixture, point, sigma)
    logp = terms.logsumexp(1)
    score = torch.autograd.grad(logp.sum(), point)[0]
    torch.testing.assert_close(mixture.logp(x, sigma).double(), logp, rtol=1e-5, atol=1e-5)
    relative = (mixture.score(x, sigma) - score).norm(dim=1) / (score.norm(dim=1) + 1 / sigma)
    assert relative.max() < 1e-4
    assert torch.equal(mixture.component(x, sigma), terms.argmax(1))
    # In float64 the remaining difference is the rounding of the float32 parameters of the plain formulas.
    torch.testing.assert_close(mixture.logp(x.double(), sigma.double()), logp, rtol=1e-6, atol=1e-6)


def test_far_away_density_and_score_are_finite_and_point_home() -> None:
    mixture = gt("A")
    x = torch.tensor([[100.0, -300.0], [-1000.0, 0.0], [0.5, -5.0]])
    point = x.double().requires_grad_()
    logp = plain_terms(mixture, point, torch.zeros(3)).logsumexp(1)
    score = torch.autograd.grad(logp.sum(), point)[0]
    torch.testing.assert_close(mixture.logp(x).double(), logp, rtol=1e-4, atol=0)
    torch.testing.assert_close(mixture.score(x).double(), score, rtol=1e-3, atol=1)


def test_the_density_integrates_to_one() -> None:
    steps = (torch.arange(120) + 0.5) / 120 * 3 - 1.2
    grid = torch.cartesian_prod(steps, steps)
    assert float(gt("A").pdf(grid, 0.1).sum()) * (3 / 120) ** 2 == pytest.approx(1, abs=2e-3)


def test_a_sample_is_one_integer_for_the_component_and_then_two_normal_numbers() -> None:
    """The table's share of a component, rebuilt here by counting, and the symmetric square root by eigenvectors."""
    mixture, generator = gt("B"), torch.Generator().manual_seed(5)
    sigma = torch.rand(7, 11)
    sample = mixture.sample((7, 11), sigma, torch.Generator().manual_seed(5))
    entry = torch.randint(65536, (7, 11), generator=generator)
    noise = torch.randn(7, 11, 2, generator=generator)
    starts = (mixture.phi.double().cumsum(0) * 65536).round()
    index = (entry[..., None] >= starts).sum(-1)
    values, vectors = torch.linalg.eigh(mixture.Sigma[index] + sigma.square()[..., None, None] * torch.eye(2))
    root = vectors * values.sqrt()[..., None, :] @ vectors.mT
    torch.testing.assert_close(sample, mixture.mu[index] + (root @ noise[..., None])[..., 0], rtol=1e-5, atol=1e-5)


def test_samples_have_the_mean_and_covariance_of_the_mixture() -> None:
    mixture = gt("A")
    sample = mixture.sample(200_000, 0.3, torch.Generator().manual_seed(0))
    mean = mixture.phi @ mixture.mu
    offset = mixture.mu - mean
    covariance = torch.einsum("k,kij->ij", mixture.phi, mixture.Sigma + offset[:, :, None] * offset[:, None])
    torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=5e-3)
    torch.testing.assert_close(sample.T.cov(), covariance + 0.09 * torch.eye(2), rtol=0, atol=5e-3)


def test_the_largest_number_of_points_at_once_does_not_matter() -> None:
    mixture, x = gt("A"), torch.rand(9, 2)
    for size in (1, 4, 100):
        torch.testing.assert_close(mixture.logp(x, 0.1, size), mixture.logp(x, 0.1))
        torch.testing.assert_close(mixture.pdf(x, 0.1, max_batch_size=size), mixture.pdf(x, 0.1))


def test_points_may_have_any_shape_and_share_a_noise_level() -> None:
    mixture = gt("A")
    x = torch.linspace(-1, 1, 3 * 5 * 2).reshape(3, 5, 2)
    assert mixture.logp(x, 0.2).shape == (3, 5)
    torch.testing.assert_close(mixture.score(x, 0.2)[1, 2], mixture.score(x[1, 2], 0.2))
    assert mixture.logp(torch.zeros(0, 2)).shape == (0,)


def test_the_tree_has_seven_generations_of_branches_and_another_seed_grows_another() -> None:
    mixture = gt("A")
    assert (mixture.num_branches, len(mixture.phi)) == (2**7 - 1, (2**7 - 1) * 8)
    assert math.isclose(float(mixture.phi.double().sum()), 1, abs_tol=1e-6)
    assert not torch.equal(gt("A", seed=3).mu, mixture.mu)


@pytest.mark.parametrize("classes", ["", "C", "AA", "A,B"])
def test_other_classes_are_refused(classes) -> None:
    with pytest.raises(ConfigError, match=r"unknown classes=.* of the toy example; use A, B or AB"):
        gt(classes)
