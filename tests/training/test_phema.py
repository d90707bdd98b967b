"""EMA profiles, decays and coefficients against closed forms, quadrature and golden numbers; tracking too."""

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from tests.helpers.paths import GOLDEN_DIR
from training import phema

NUMBERS: dict[str, Any] = json.loads((GOLDEN_DIR / "numbers.json").read_text())


def close(ours, golden):
    np.testing.assert_allclose(ours, golden, rtol=1e-9, atol=0)


def sampled_profiles(in_ofs, in_std, out_ofs, out_std):
    """Profiles at the nodes of a quadrature over time, whose weights are in them: [nodes, inputs], [nodes, outputs].

    A squared length over the nodes is the integral of the square. Intervals rise by 2 % at most.
    """
    in_ofs, in_std = np.asarray(in_ofs, float), np.asarray(in_std, float)
    last = max(in_ofs.max(), out_ofs)
    edges = np.unique(np.concatenate([[0], in_ofs, [out_ofs], last * 1.02 ** -np.arange(0.0, 700.0)]))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    t = ((edges[1:] + edges[:-1])[:, None] / 2 + np.diff(edges)[:, None] / 2 * nodes).ravel()
    w = (np.diff(edges)[:, None] / 2 * weights).ravel()

    def profile(ofs, std):
        exp = phema.std_to_exp(std)
        return np.where(t[:, None] <= ofs, (exp + 1) / ofs * np.minimum(t[:, None] / ofs, 1) ** exp, 0)

    root = np.sqrt(w)[:, None]
    return root * profile(in_ofs, in_std), root * profile(np.full(len(out_std), out_ofs), np.asarray(out_std))


def achieved_error(in_ofs, in_std, out_ofs, out_std, x):
    """The fit by quadrature: squares are summed, so nothing cancels."""
    stored, wanted = sampled_profiles(in_ofs, in_std, out_ofs, out_std)
    return np.linalg.norm(stored @ x - wanted, axis=0) / np.linalg.norm(wanted, axis=0)


def grid(times, stds):
    return np.repeat(np.asarray(times, float), len(stds)), np.tile(stds, len(times))


def test_golden_exponents_widths_and_decays():
    for case in NUMBERS["std_to_exp"]:
        close(phema.std_to_exp(case["std"]), case["exp"])
    for case in NUMBERS["exp_to_std"]:
        close(phema.exp_to_std(case["exp"]), case["std"])
    for case in NUMBERS["beta"]:
        close(phema.power_function_beta(case["std"], case["t_next"], case["t_delta"]), case["beta"])


def test_golden_responses_and_inner_products():
    for case in NUMBERS["response"]:
        close(phema.power_function_response(case["ofs"], case["std"], case["len"]), case["resp"])
    for case in NUMBERS["correlation"]:
        ours = phema.power_function_correlation(case["a_ofs"], case["a_std"], case["b_ofs"], case["b_std"])
        close(ours, case["corr"])


@pytest.mark.parametrize("case", NUMBERS["posthoc"], ids=lambda case: f"{len(case['in_ofs'])} inputs")
def test_golden_coefficients(case):
    ours = phema.solve_posthoc_coefficients(case["in_ofs"], case["in_std"], case["out_ofs"], case["out_std"])
    np.testing.assert_allclose(ours, case["coefficients"], rtol=1e-9, atol=1e-9)


def test_width_and_exponent_are_inverses_over_the_whole_range():
    exp = np.concatenate([[0], np.logspace(-6, 5, 200)])
    np.testing.assert_allclose(phema.std_to_exp(phema.exp_to_std(exp)), exp, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("std", [0, -0.1, 0.3, float("nan"), [0.1, 0.5]])
def test_widths_that_no_profile_has_are_refused(std):
    with pytest.raises(ValueError, match=r"above 0 and below 0\.289"):
        phema.std_to_exp(std)


def test_responses_sum_to_one_on_the_chosen_axis_and_have_the_wanted_width():
    std = np.array([0.05, 0.1, 0.2])
    response = phema.power_function_response([[5000], [9999]], std, 10000, axis=2)
    assert response.shape == (2, 3, 10000)
    np.testing.assert_allclose(response.sum(axis=2), 1)
    t = np.arange(10000)
    mean = (response * t).sum(axis=2, keepdims=True)
    width = np.sqrt((response * (t - mean) ** 2).sum(axis=2)) / [[5000], [9999]]
    np.testing.assert_allclose(width, np.broadcast_to(std, (2, 3)), rtol=1e-2)


def test_the_widest_accepted_response_is_finite():
    assert np.isfinite(phema.power_function_response(10, 0.2889, 11)).all()


def test_inner_products_are_integrals_over_time():
    for a_ofs, a_std, b_ofs, b_std in [(1, 0.05, 1, 0.1), (0.7, 0.1, 1, 0.25), (1, 0.2, 0.4, 0.08)]:
        ea, eb = float(phema.std_to_exp(a_std)), float(phema.std_to_exp(b_std))

        def product(t, a=(a_ofs, ea), b=(b_ofs, eb)):
            return (a[1] + 1) / a[0] * (t / a[0]) ** a[1] * (b[1] + 1) / b[0] * (t / b[0]) ** b[1]

        integral = quad(product, 0, min(a_ofs, b_ofs), epsabs=0, epsrel=1e-11)[0]
        assert float(phema.power_function_correlation(a_ofs, a_std, b_ofs, b_std)) == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("stds", [(0.05, 0.1), (0.01, 0.02, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2)])
@pytest.mark.parametrize("num_inputs", [64, 512])
def test_many_close_inputs_give_a_response_as_near_as_a_plain_solve(stds, num_inputs):
    in_ofs, in_std = grid(np.arange(1, num_inputs // len(stds) + 1) * 8388608, stds)
    out_std = [0.02, 0.05, 0.075, 0.13, 0.2, 0.25]
    out_ofs = in_ofs[-1]
    gram = phema.power_function_correlation(in_ofs[:, None], in_std[:, None], in_ofs, in_std)
    rhs = phema.power_function_correlation(in_ofs[:, None], in_std[:, None], out_ofs, out_std)
    plain = np.linalg.solve(gram, rhs)
    plain /= plain.sum(axis=0)
    ours = phema.solve_posthoc_coefficients(in_ofs, in_std, out_ofs, out_std)
    assert np.isfinite(ours).all()
    errors = [achieved_error(in_ofs, in_std, out_ofs, out_std, x) for x in (ours, plain)]
    assert (errors[0] <= 1.001 * errors[1] + 1e-7).all()
    assert np.abs(ours).sum(axis=0).max() < 100


def test_512_inputs_of_two_lengths_and_256_times_fit_as_well_as_anything_can():
    in_ofs, in_std = grid(np.arange(1, 257) * 8388608, (0.05, 0.1))
    out_std = [0.02, 0.05, 0.075, 0.13, 0.2, 0.25]
    ours = phema.solve_posthoc_coefficients(in_ofs, in_std, in_ofs[-1], out_std)
    stored, wanted = sampled_profiles(in_ofs, in_std, in_ofs[-1], out_std)
    # Least squares on the profiles themselves, without the squared condition number of their inner products.
    scale = np.linalg.norm(stored, axis=0)[:, None]
    best = np.linalg.lstsq(stored / scale.T, wanted, rcond=None)[0] / scale
    best_error = achieved_error(in_ofs, in_std, in_ofs[-1], out_std, best / best.sum(axis=0))
    error = achieved_error(in_ofs, in_std, in_ofs[-1], out_std, ours)
    assert (error <= 1.001 * best_error + 1e-7).all() and error.max() < 0.01
    assert np.isfinite(ours).all() and np.linalg.norm(ours, axis=0).max() < 100
    np.testing.assert_allclose(
        phema.posthoc_fit(in_ofs, in_std, in_ofs[-1], out_std, ours), error, rtol=1e-3, atol=1e-7
    )


def test_a_singular_system_has_finite_coefficients_and_no_worse_a_fit_than_without_the_repeated_inputs():
    in_ofs, in_std = grid(np.arange(1.0, 9.0), (0.05, 0.1))
    once = phema.solve_posthoc_coefficients(in_ofs, in_std, 8, [0.08])
    twice = phema.solve_posthoc_coefficients(np.tile(in_ofs, 2), np.tile(in_std, 2), 8, [0.08])
    np.testing.assert_allclose(twice[:16] + twice[16:], once, atol=1e-9)
    near = phema.solve_posthoc_coefficients(*grid(1 + np.arange(512) * 1e-12, (0.1,)), 1 + 511e-12, [0.1, 0.2])
    assert np.isfinite(near).all()


def test_the_fit_is_the_distance_of_the_responses():
    in_ofs, in_std = grid(np.arange(1.0, 9.0), (0.05, 0.1))
    out_std = [0.02, 0.05, 0.075, 0.2]
    x = phema.solve_posthoc_coefficients(in_ofs, in_std, 8, out_std)
    fit = phema.posthoc_fit(in_ofs, in_std, 8, out_std, x)
    np.testing.assert_allclose(fit, achieved_error(in_ofs, in_std, 8.0, out_std, x), rtol=1e-6, atol=1e-7)
    assert fit[1] < 1e-7  # 0.05 is among the inputs


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3))
        self.gain = torch.nn.Parameter(torch.zeros([]))
        self.register_buffer("count", torch.zeros([], dtype=torch.int64))
        self.dropout = torch.nn.Dropout()


def random_walk(net, steps, batch, *emas):
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
            net.count.fill_(step)
        for ema in emas:
            ema.update(cur_nimg=step * batch, batch_size=batch)
        yield net.weight.detach().clone()


def test_tracked_averages_are_the_history_weighted_by_the_profile():
    torch.manual_seed(0)
    net = Small().train()
    ema = phema.PowerFunctionEMA(net, stds=[0.05, 0.1, 0.2])
    history = list(random_walk(net, 400, 32, ema))
    for (average, suffix), std in zip(ema.get(), [0.05, 0.1, 0.2], strict=True):
        assert suffix == f"-{std:.3f}"
        # Telescoped Eq. 127: step i of n counts (i/n)^(gamma+1) - ((i-1)/n)^(gamma+1).
        weights = np.diff((np.arange(401) / 400) ** (phema.std_to_exp(std) + 1))
        wanted = sum(w * h.double() for w, h in zip(weights, history, strict=True))
        torch.testing.assert_close(average.weight.double(), wanted, rtol=1e-5, atol=1e-5)


def test_averages_are_frozen_copies_with_current_buffers():
    torch.manual_seed(0)
    net = Small().train()
    ema, traditional = phema.PowerFunctionEMA(net), phema.TraditionalEMA(net)
    list(random_walk(net, 5, 32, ema, traditional))
    for average in [*(average for average, _ in ema.get()), traditional.get()]:
        assert not average.training and not average.dropout.training
        assert not any(p.requires_grad for p in average.parameters())
        assert average.count == 5 and average.weight.data_ptr() != net.weight.data_ptr()
    assert net.training and all(p.requires_grad for p in net.parameters())
    ema.reset()
    traditional.reset()
    for average in [*(average for average, _ in ema.get()), traditional.get()]:
        assert torch.equal(average.weight, net.weight)


@pytest.mark.parametrize("halflife, ratio", [(float("inf"), 0.09), (1e-4, 0.09), (1e-4, None)])
def test_the_traditional_average_halves_what_is_one_half_life_old(halflife, ratio):
    torch.manual_seed(0)
    net = Small()
    ema = phema.TraditionalEMA(net, halflife_Mimg=halflife, rampup_ratio=ratio)
    wanted = net.weight.detach().double()
    for step, weight in enumerate(random_walk(net, 50, 10, ema), start=1):
        life = min(halflife * 1e6, ratio * step * 10) if ratio is not None else halflife * 1e6
        beta = 0.5 ** (10 / life)
        wanted = beta * wanted + (1 - beta) * weight.double()
    torch.testing.assert_close(ema.get().weight.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [phema.PowerFunctionEMA, phema.TraditionalEMA])
def test_a_stored_state_continues_bit_for_bit(kind):
    torch.manual_seed(0)
    net = Small()
    ema = kind(net)
    list(random_walk(net, 5, 32, ema))
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = kind(Small())
    other.load_state_dict(torch.load(file, weights_only=True))
    other.net = net
    list(random_walk(net, 5, 32, ema, other))
    for ours, theirs in zip(_tensors(ema.state_dict()), _tensors(other.state_dict()), strict=True):
        assert torch.equal(ours, theirs)


def _tensors(state):
    return [t for tensors in state.get("emas", [state.get("ema")]) for t in tensors.values()]


def test_a_state_of_other_widths_or_tensors_is_refused():
    ema = phema.PowerFunctionEMA(Small(), stds=[0.05])
    with pytest.raises(ValueError, match="widths"):
        ema.load_state_dict(phema.PowerFunctionEMA(Small(), stds=[0.1]).state_dict())
    state = ema.state_dict()
    del state["emas"][0]["gain"]
    with pytest.raises(ValueError, match="does not belong"):
        ema.load_state_dict(state)
    with pytest.raises(ValueError, match="halflife"):
        phema.TraditionalEMA(Small()).load_state_dict(phema.TraditionalEMA(Small(), halflife_Mimg=1).state_dict())


def test_a_network_whose_parameters_changed_is_refused():
    ema = phema.PowerFunctionEMA(net := Small())
    net.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="extra"):
        ema.update(32, 32)


def test_an_average_of_states_sums_parameters_and_takes_the_last_buffers():
    nets = [torch.nn.BatchNorm1d(3) for _ in range(3)]
    for index, net in enumerate(nets):
        net(torch.randn(4, 3) + index)
        torch.nn.init.normal_(net.weight)
    states = [net.half().state_dict() for net in nets]
    average = phema.posthoc_average(states, np.array([0.5, -1.0, 1.5]), [name for name, _ in nets[0].named_buffers()])
    expected = sum(weight * state["weight"].float() for weight, state in zip((0.5, -1, 1.5), states, strict=True))
    torch.testing.assert_close(average["weight"], expected)
    assert average["weight"].dtype == torch.float32
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(average[name], states[-1][name])
    with pytest.raises(ValueError, match="2 weights need as many states"):
        phema.posthoc_average(states, [1, 0])


def test_a_reconstruction_from_states_is_the_average_that_was_tracked():
    net = torch.nn.Linear(3, 2).double()
    ema = phema.PowerFunctionEMA(net, stds=[0.05, 0.10, 0.15])
    stored = []
    for step in range(1, 257):
        torch.nn.init.normal_(net.weight)
        ema.update(step, 1)
        if step % 16 == 0:
            for std, (average, _) in zip((0.05, 0.1), ema.get()[:2], strict=True):
                stored.append((step, std, copy.deepcopy(average.state_dict())))
    times, stds, states = zip(*stored, strict=True)
    coefficients = phema.solve_posthoc_coefficients(times, stds, 256, 0.15)[:, 0]
    result = phema.posthoc_average(states, coefficients)["weight"]
    wanted = ema.get()[2][0].weight
    assert (result - wanted).norm() < 0.1 * (net.weight - wanted).norm()
