"""The sampler against reference numbers, closed forms, and counts of evaluations."""

import json
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.paths import Golden
from tests.helpers.sampling import CASES, GaussianDenoiser, golden_network
from training.sampling.denoisers import bind_labels
from training.sampling.options import SamplerOptions
from training.sampling.sampler import StackedRandomGenerator, edm_sampler
from training.sampling.schedule import HeunOptions
from training.sampling.solvers import result_of


@pytest.mark.parametrize("case", CASES)
def test_the_sampler_agrees_with_reference_numbers(case: str, golden: Callable[[str], Golden]):
    tensors, metadata = golden("sampler.safetensors")
    options = json.loads(metadata["cases"])
    assert set(options) == set(CASES)
    kwargs = options[case]
    net = golden_network(tensors, metadata["config"], "net")
    match kwargs.pop("gnet", None):
        case "c":
            kwargs["gnet"] = golden_network(tensors, metadata["config"], "gnet_cond")
        case "u":
            kwargs["gnet"] = golden_network(tensors, metadata["config_gnet_uncond"], "gnet_uncond")
    if kwargs.pop("dtype", None) == "f64":
        kwargs["dtype"] = torch.float64
    if "S_churn" in kwargs:
        kwargs["randn_like"] = StackedRandomGenerator("cpu", json.loads(metadata["churn_seeds"])).randn_like
    actual = edm_sampler(net, tensors["in.noise"], tensors["in.labels"], **kwargs)
    expected = tensors[f"out.{case}"]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_noise_levels_follow_the_equation_and_include_their_ends():
    for num_steps, low, high, rho in [(32, 0.002, 80, 7), (6, 0.02, 10, 3), (5, 0.1, 3, 1), (9, 0.002, 80, 0.5)]:
        i = np.arange(num_steps, dtype=np.longdouble)
        ends = np.longdouble(high) ** (1 / np.longdouble(rho)), np.longdouble(low) ** (1 / np.longdouble(rho))
        expected = (ends[0] + i / (num_steps - 1) * (ends[1] - ends[0])) ** rho
        sigmas = HeunOptions(num_steps=num_steps, sigma_min=low, sigma_max=high, rho=rho).sigmas()
        np.testing.assert_allclose(sigmas[:-1], expected.astype(float), rtol=1e-9)
        assert (sigmas[0], sigmas[-2], sigmas[-1]) == (high, low, 0)


def test_no_rho_overflows():
    for rho in (1e-6, 1e-3, 1e6):
        sigmas = HeunOptions(rho=rho).sigmas()
        assert all(math.isfinite(sigma) for sigma in sigmas) and sigmas == sorted(sigmas, reverse=True)


def test_the_error_falls_with_the_square_of_the_step():
    # For Gaussian data the flow is known: (x - mean) shrinks in proportion to sqrt(std^2 + sigma^2).
    net = GaussianDenoiser(mean=0.3, std=0.5)
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(4, 1, 4, 4)
    # Down to sigma_min only: the step from there to zero is an Euler step by design.
    options = {"sigma_min": 0.5, "sigma_max": 10.0, "rho": 3.0}
    start = noise * 10
    at_sigma_min = net.mean + (start - net.mean) * math.sqrt((0.25 + 0.25) / (0.25 + 100))
    slope = (at_sigma_min - net(at_sigma_min, torch.tensor(0.5))) / 0.5
    exact = at_sigma_min - 0.5 * slope
    errors = []
    for num_steps in (17, 33, 65, 129):
        actual = edm_sampler(net, noise, num_steps=num_steps, dtype=torch.float64, **options)
        errors.append(float((actual - exact).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(1.8 < order < 2.3 for order in orders), orders


def test_samples_have_the_distribution_of_the_data():
    noise = torch.randn([2, 1, 100, 100], generator=torch.Generator().manual_seed(0))
    images = edm_sampler(GaussianDenoiser(mean=0.3, std=0.5), noise)
    assert abs(float(images.mean()) - 0.3) < 0.02 and abs(float(images.std()) - 0.5) < 0.02


def test_churn_keeps_the_distribution():
    random = StackedRandomGenerator("cpu", [1, 2])
    noise = random.randn([2, 1, 100, 100])
    images = edm_sampler(
        GaussianDenoiser(mean=0.3, std=0.5), noise, num_steps=64, S_churn=40, randn_like=random.randn_like
    )
    assert abs(float(images.mean()) - 0.3) < 0.02 and abs(float(images.std()) - 0.5) < 0.02


def test_32_steps_take_63_evaluations_at_the_right_noise_levels():
    net = GaussianDenoiser()
    edm_sampler(net, torch.zeros([1, 1, 2, 2]))
    sigmas = HeunOptions().sigmas()[:-1]
    assert len(net.calls) == 63
    expected = [sigmas[0]] + [sigma for sigma in sigmas[1:] for _ in range(2)]
    assert net.calls == pytest.approx(expected)


@pytest.mark.parametrize(("guidance", "guide_calls"), [(1, 0), (1.0, 0), (1.4, 63), (0, 63), (0.5, 63)])
def test_the_guide_runs_exactly_when_it_counts(guidance: float, guide_calls: int):
    net, gnet = GaussianDenoiser(), GaussianDenoiser(mean=1)
    edm_sampler(net, torch.zeros([1, 1, 2, 2]), gnet=gnet, guidance=guidance)
    assert (len(net.calls), len(gnet.calls)) == (63, guide_calls)


def test_one_step_gives_the_denoisers_answer_at_the_first_noise_level():
    net = GaussianDenoiser(mean=0.3)
    noise = torch.randn([1, 1, 4, 4], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(edm_sampler(net, noise, num_steps=1), net(noise * 80, torch.tensor(80.0)))
    assert net.calls == [80, 80]


def test_churn_is_drawn_at_the_noise_levels_in_its_range_with_the_given_strength():
    drawn = []

    def randn_like(x: torch.Tensor) -> torch.Tensor:
        drawn.append(x.shape)
        return torch.zeros_like(x)

    net = GaussianDenoiser()
    options = HeunOptions(num_steps=10, S_churn=2, S_min=0.05, S_max=80)
    result_of(SamplerOptions(heun=options).solve(bind_labels(net, None), torch.zeros([1, 1, 2, 2]), randn_like))
    churned = [sigma for sigma in options.sigmas() if 0.05 <= sigma <= 80]
    assert len(drawn) == len(churned) > 3
    assert net.calls[:: len(net.calls)][0] == pytest.approx(80 * 1.2)  # 1 + S_churn / num_steps
    strong = GaussianDenoiser()
    edm_sampler(strong, torch.zeros([1, 1, 2, 2]), num_steps=10, S_churn=1e6)
    assert strong.calls[0] == pytest.approx(80 * math.sqrt(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "0 sampling steps"),
        ({"num_steps": -3}, "-3 sampling steps"),
        ({"num_steps": 2.5}, "2.5 sampling steps"),
        ({"sigma_min": 0}, "sigma_min"),
        ({"sigma_min": 90}, "sigma_min=90"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"sigma_max": math.nan}, "sigma_max=nan"),
        ({"rho": 0}, "rho=0"),
        ({"S_churn": -1}, "S_churn=-1"),
        ({"S_noise": math.nan}, "S_noise=nan"),
        ({"guidance": math.nan}, "guidance=nan"),
        ({"guidance": 1.4}, "needs a guiding network"),
        ({"solver": "rk4"}, "unknown solver 'rk4'; choose from heun, euler, dpmpp2m"),
        (
            {"solver": "dpmpp2m", "S_churn": 5},
            r"S_churn=5 is for solvers .* \(heun or euler\), not dpmpp2m",
        ),
    ],
)
def test_values_that_cannot_work_are_named_before_the_network_runs(options: dict, message: str):
    net = GaussianDenoiser()
    with pytest.raises(ConfigError, match=message):
        edm_sampler(net, torch.zeros([1, 1, 2, 2]), **options)
    assert net.calls == []


def test_what_is_drawn_for_an_image_depends_on_its_seed_alone():
    together = StackedRandomGenerator("cpu", [3, 1, 4])
    alone = StackedRandomGenerator("cpu", [1])
    for draw in (
        lambda random, n: random.randn([n, 2, 5]),
        lambda random, n: random.randint(1000, size=[n]),
        lambda random, n: random.randn_like(torch.zeros([n, 7], dtype=torch.float64)),
    ):
        assert torch.equal(draw(together, 3)[1:2], draw(alone, 1))


def test_seeds_count_modulo_2_to_the_32():
    random = StackedRandomGenerator("cpu", [5, 2**32 + 5, 5 - 2**32])
    rows = random.randn([3, 4])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0], torch.randn([4], generator=torch.Generator().manual_seed(5)))


def test_drawing_for_another_number_of_images_is_an_error():
    with pytest.raises(ValueError, match="3 rows of 2"):
        StackedRandomGenerator("cpu", [1, 2]).randn([3, 4])
