"""Guidance around a denoiser: by how much, by which guides, in which steps."""

import copy
import json
import math
import pickle
from itertools import pairwise

import pytest
import torch

from dnnlib.errors import ConfigError
from dnnlib.parse import PrintedNumber, half_unit
from tests.helpers.sampling import GaussianDenoiser
from training.sampling.denoisers import bind_labels
from training.sampling.guidance import Guidance, extrapolate
from training.sampling.options import SamplerOptions
from training.sampling.sampler import edm_sampler
from training.sampling.schedule import HeunOptions

NOISE = torch.randn([2, 1, 3, 3], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_guidance_extrapolates_from_the_guide_through_the_main_network():
    main, guide = (bind_labels(GaussianDenoiser(mean=mean), None) for mean in (0.3, -0.2))
    at = (NOISE, 1.7, 2.0)
    for weight in (0.0, 0.5, 1.0, 2.5):
        guided = Guidance(weight=weight, num_guides=1).wrap(main, [guide])
        torch.testing.assert_close(guided(*at), guide(*at) + weight * (main(*at) - guide(*at)))


def test_extrapolation_is_equation_3():
    guide, main = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    for weight in (0.0, 0.5, 1.0, 2.5):
        torch.testing.assert_close(extrapolate(guide, main, weight), guide + weight * (main - guide))


def test_several_guides_share_the_weight():
    main, *guides = (bind_labels(GaussianDenoiser(mean=mean), None) for mean in (0.3, -0.2, 0.9, 0.1))
    at = (NOISE, 1.7, 2.0)
    for shares in (None, (0.5, 0.2, 0.3), (0.0, 1.0, 0.0)):
        guided = Guidance(weight=2.5, num_guides=3, shares=shares).wrap(main, guides)
        expected = main(*at) + 1.5 * sum(
            share * (main(*at) - guide(*at)) for share, guide in zip(shares or (1 / 3,) * 3, guides, strict=True)
        )
        torch.testing.assert_close(guided(*at), expected)


def test_one_guide_among_several_is_bitwise_that_guide_alone_and_the_others_rest():
    nets = [GaussianDenoiser(mean=mean) for mean in (0.3, -0.2, 0.9)]
    together = edm_sampler(nets[0], NOISE, gnet=nets[1:], guidance=2, shares=[0, 1])
    assert torch.equal(together, edm_sampler(nets[0], NOISE, gnet=nets[2], guidance=2))
    assert nets[1].calls == []


def stepped_by_hand(net, gnet, noise, sigmas, guidance, low, high):
    """Heun's method written out, guided on the steps that start in (low, high]."""
    x = noise * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        guided = low < sigma <= high

        def slope(x, at, guided=guided):
            denoised = net(x, torch.tensor(at))
            if guided:
                denoised = denoised + (guidance - 1) * (denoised - gnet(x, torch.tensor(at)))
            return (x - denoised) / at

        first = slope(x, sigma)
        ahead = x + (sigma_next - sigma) * first
        if sigma_next > 0:
            ahead = x + (sigma_next - sigma) * (first + slope(ahead, sigma_next)) / 2
        x = ahead
    return x


@pytest.mark.parametrize(("low", "high"), [(0.28, 2.90), (0.0, math.inf), (0.0, 0.002), (40, 80), (3, 3.001)])
def test_an_interval_is_what_stepping_by_hand_gives_and_the_guide_runs_as_often(low: float, high: float):
    sigmas = HeunOptions(num_steps=18).sigmas()
    net, gnet = GaussianDenoiser(mean=0.3), GaussianDenoiser(mean=-0.2, std=0.8)
    expected = stepped_by_hand(net, gnet, NOISE, sigmas, 2.1, low, high)
    calls_by_hand = gnet.calls
    net.calls, gnet.calls = [], []
    actual = edm_sampler(net, NOISE, gnet=gnet, num_steps=18, guidance=2.1, interval=(low, high), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # networks see float32 noise levels by hand
    assert len(net.calls) == 35 and gnet.calls == pytest.approx(calls_by_hand)
    starts = [sigma for sigma in sigmas[:-1] if low < sigma <= high]
    assert len(gnet.calls) == 2 * len(starts) - (sigmas[-2] in starts)  # the last step has no correction


def test_the_ends_of_the_interval_are_open_below_and_closed_above():
    sigmas = HeunOptions(num_steps=8).sigmas()
    gnet = GaussianDenoiser()
    edm_sampler(GaussianDenoiser(), NOISE, gnet=gnet, num_steps=8, guidance=2, interval=(sigmas[5], sigmas[3]))
    assert gnet.calls == pytest.approx([sigmas[3], sigmas[4], sigmas[4], sigmas[5]])


def test_churn_does_not_move_a_step_into_or_out_of_the_interval():
    sigmas = HeunOptions(num_steps=8).sigmas()
    gnet = GaussianDenoiser()
    options = {"S_churn": 2, "randn_like": torch.zeros_like}
    edm_sampler(GaussianDenoiser(), NOISE, gnet=gnet, num_steps=8, guidance=2, interval=(0, sigmas[4]), **options)
    assert len(gnet.calls) == 2 * 4 - 1 and gnet.calls[0] > sigmas[4]


def guided_steps(interval: tuple[float, float], num_steps: int = 32, **options: float) -> list[int]:
    return SamplerOptions.from_keywords(
        num_guides=1, guidance=2, interval=interval, num_steps=num_steps, **options
    ).guided_steps


def printed(low: str, high: str) -> tuple[PrintedNumber, PrintedNumber]:
    return PrintedNumber(low), PrintedNumber(high)


@pytest.mark.parametrize(
    ("interval", "first", "last"),
    [
        (("0.28", "2.90"), 15, 21),
        (("0.60", "5.00"), 13, 19),
        (("0.19", "1.61"), 17, 22),
        (("0.6", "5"), 13, 19),
        (("0.283", "2.902"), 15, 21),
        (("0", "2.90"), 15, 31),
        (("0.00", "inf"), 0, 31),
        (("0.28", "80"), 0, 21),
        (("2.8e-1", "2.90e0"), 15, 21),
        (("0.282", "2.8"), 16, 22),  # neither is a level
    ],
)
def test_printed_bounds_mean_the_levels_that_they_are_rounded_from(interval, first, last):
    expected = list(range(first, last + 1))
    assert guided_steps(printed(*interval)) == expected
    assert guided_steps(tuple(map(float, interval))) == expected  # Python prints floats, without trailing zeros


@pytest.mark.parametrize("num_steps", [8, 16, 18, 32, 40, 64, 128, 256])
def test_bounds_printed_to_two_or_more_decimals_give_their_steps_for_any_number_of_steps(num_steps: int):
    for options in ({}, {"rho": 5, "sigma_max": 40}):
        levels = HeunOptions(num_steps=num_steps, **options).sigmas()[:-1]
        wanted = [i for i, level in enumerate(levels) if 0.3 < level < 20]
        for first, after in ((wanted[0], wanted[-1]), (wanted[len(wanted) // 3], wanted[len(wanted) // 2 + 1])):
            for digits in (2, 3, 4, 17):
                bounds = printed(f"{levels[after]:.{digits}f}", f"{levels[first]:.{digits}f}")
                for interval in (bounds, tuple(map(float, bounds))):
                    assert guided_steps(interval, num_steps, **options) == list(range(first, after)), (bounds, digits)


def test_levels_in_float32_are_levels_and_a_single_level_can_be_enclosed():
    levels = HeunOptions().sigmas()
    low, high = torch.tensor([levels[22], levels[15]])
    assert guided_steps((float(low), float(high))) == guided_steps((low, high)) == list(range(15, 22))
    assert guided_steps(printed("2.9", "3")) == [15]  # both are nearest to level 15


def test_a_printed_number_keeps_its_digits_in_copies():
    number = PrintedNumber(" 2.90 ")
    again = pickle.loads(pickle.dumps(copy.deepcopy(number)))
    assert number == again == 2.9 and str(number) == str(again) == "2.90"
    assert [half_unit(value) for value in (number, 2.9, 3, math.inf)] == [0.005, 0.05, 0.5, 0]
    assert json.dumps(number) == "2.9"


def test_the_guide_runs_on_the_steps_that_printed_bounds_mean():
    sigmas = HeunOptions().sigmas()
    gnet = GaussianDenoiser()
    edm_sampler(GaussianDenoiser(), NOISE, gnet=gnet, guidance=2, interval=(0.28, 2.90))
    assert gnet.calls[0] == pytest.approx(sigmas[15]) and gnet.calls[-1] == pytest.approx(sigmas[22])
    assert len(gnet.calls) == 14


@pytest.mark.parametrize(("solver", "calls"), [("heun", 63), ("euler", 32), ("dpmpp2m", 32)])
def test_every_solver_calls_each_network_once_an_evaluation(solver: str, calls: int):
    net, gnet = GaussianDenoiser(), GaussianDenoiser()
    edm_sampler(net, NOISE, gnet=gnet, guidance=1.4, solver=solver)
    assert (len(net.calls), len(gnet.calls)) == (calls, calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2, "interval": (1, 1)}, "interval 1,1"),
        ({"guidance": 2, "interval": (-1, 1)}, "interval -1,1"),
        ({"guidance": 2, "interval": (0, math.nan)}, "interval 0,nan"),
        ({"guidance": 2, "interval": (1,)}, "interval 1 must be two noise levels"),
        ({"guidance": 2, "shares": [0.5, 0.5]}, "2 shares do not fit 1 guides"),
        ({"guidance": 2, "shares": [2]}, "share the weight as 2"),
        ({"guidance": 2, "shares": [math.nan]}, "share the weight as nan"),
        ({"guidance": math.inf}, "guidance=inf"),
    ],
)
def test_guidance_that_cannot_work_is_named_before_a_network_runs(options: dict, message: str):
    net, gnet = GaussianDenoiser(), GaussianDenoiser()
    with pytest.raises(ConfigError, match=message):
        edm_sampler(net, NOISE, gnet=gnet, **options)
    assert net.calls == gnet.calls == []


def test_shares_that_are_negative_are_refused():
    with pytest.raises(ConfigError, match=r"share the weight as 1\.5,-0\.5"):
        Guidance(weight=2, num_guides=2, shares=(1.5, -0.5))
