"""Learning rate, forced normalization, cleared gradients, fused Adam and loss scale, each against its formula."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import oracle
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.tiny import assert_same_state, tiny_config
from tests.training.run.test_training_state import RGB, batch_of, make_state, wake
from torch_utils.loss_scale import LossScale
from training.networks_edm2 import MPConv
from training.run.update import (
    clear_nonfinite,
    learning_rate_schedule,
    make_optimizer,
    normalize_weights,
    with_fused_adam,
)

CPU = torch.device("cpu")
LEARNING_RATES = json.loads((GOLDEN_DIR / "numbers.json").read_text(encoding="utf-8"))["learning_rate"]


def test_normalization_is_the_one_of_a_training_forward_pass():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([MPConv(3, 5, [3, 3]), MPConv(5, 4, [1, 1]), MPConv(7, 2, [])])
    with torch.no_grad():
        layers[0].weight.mul_(3)
        layers[2].weight[1].zero_()
    expected = [oracle.normalize(layer.weight.detach()) for layer in layers]
    pointers = [layer.weight.data_ptr() for layer in layers]
    normalize_weights(layers)
    for layer, value in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), value, rtol=1e-6, atol=0)
    assert pointers == [layer.weight.data_ptr() for layer in layers]


def test_adam_takes_the_steps_of_the_plain_one_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    ours, plain = (torch.nn.Linear(4, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer, reference = make_optimizer(ours.parameters(), lr=0.01), oracle.PlainAdam(plain)
    for step in range(4):
        for name, param in ours.named_parameters():
            grad = torch.randn_like(param)
            grad.flatten()[step % param.numel()] = [float("nan"), float("inf"), -float("inf"), 1.0][step]
            param.grad, plain.get_parameter(name).grad = grad, grad.clone()
        clear_nonfinite([param.grad for param in ours.parameters()])
        optimizer.step()
        reference.step(0.01)
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param, plain.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_a_state_of_another_form_of_adam_goes_on_in_the_fused_one():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    old = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99), foreach=True)
    net(torch.ones(1, 4)).sum().backward()
    old.step()
    stored = copy.deepcopy(old.state_dict())
    new = make_optimizer(net.parameters(), lr=0.01)
    new.load_state_dict(with_fused_adam(stored))
    assert new.param_groups[0]["fused"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    new.step()
    fused = copy.deepcopy(net.state_dict())
    net.load_state_dict(before)
    old.load_state_dict(stored)
    old.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fused[name], value)


def test_the_adaptive_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScale("auto", CPU)
    start = float(scale.factor)
    grads = [torch.ones(3) * start, torch.tensor([start, float("inf")])]
    scale.unscale_(grads)
    assert float(scale.factor) == start / 2 and float(scale.overflow) == 1
    assert torch.equal(grads[0], torch.ones(3)) and float(grads[1][0]) == 1
    for _ in range(1999):
        scale.unscale_([torch.ones(1)])
    assert float(scale.factor) == start / 2 and float(scale.overflow) == 0
    stored = copy.deepcopy(scale.state_dict())
    scale.unscale_([torch.ones(1)])
    assert float(scale.factor) == start
    other = LossScale("auto", CPU)
    other.load_state_dict(stored)
    other.unscale_([torch.ones(1)])
    assert_same_state(other.state_dict(), scale.state_dict())


def test_a_constant_loss_scale_stays_in_the_gradients_and_has_no_state():
    scale, grads = LossScale(8.0, CPU), [torch.ones(2)]
    scale.unscale_(grads)
    assert scale.factor == 8.0 and torch.equal(grads[0], torch.ones(2)) and scale.state_dict() == {}
    scale.load_state_dict(LossScale("auto", CPU).state_dict())
    assert scale.factor == 8.0


def test_a_step_that_overflows_an_adaptive_scale_is_not_taken():
    state = make_state(tiny_config(Path("none"), ls="auto"))
    state.step(*batch_of(RGB))
    wake(state.net)
    before = copy.deepcopy(state.state_dict())
    spoilt = state.net.unet.out_conv.weight.register_hook(lambda grad: grad * float("inf"))
    state.step(*batch_of(RGB))
    spoilt.remove()
    expected = make_state(tiny_config(Path("none")))
    expected.net.load_state_dict(before["net"])
    normalize_weights(expected.net)
    assert_same_state(state.net.state_dict(), expected.net.state_dict())
    first = before["optimizer"]["state"][1]
    assert all(torch.equal(state.optimizer.state_dict()["state"][1][key], first[key]) for key in first)
    assert state.nimg == 16 and float(state.loss_scale.factor) == 0.5
    state.step(*batch_of(RGB))
    assert not torch.equal(state.net.state_dict()["unet.out_conv.weight"], before["net"]["unet.out_conv.weight"])


@pytest.mark.parametrize("change", [{"ls": "auto"}, {"recompute": True}], ids=["adaptive scale", "recompute"])
def test_a_step_is_the_plain_one_to_rounding(change: dict[str, Any]):
    states = [make_state(tiny_config(Path("none"), **options)) for options in ({}, change)]
    for state in states:
        wake(state.net)
        for _ in range(2):
            state.step(*batch_of(RGB))
    for name, value in states[0].net.state_dict().items():
        torch.testing.assert_close(states[1].net.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_training_in_bfloat16_follows_float32():
    states = [make_state(tiny_config(Path("none"), precision=precision)) for precision in ("fp32", "bf16")]
    losses = [torch.stack([state.step(*batch_of(RGB)).mean() for _ in range(4)]) for state in states]
    assert all(param.dtype == torch.float32 for param in states[1].net.parameters())
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one_to_rounding():
    config = {"channel_mult": (1,)}
    states = [make_state(tiny_config(Path("none"), compile=value, **config)) for value in (False, True)]
    for state in states:
        wake(state.net)
        for _ in range(2):
            state.step(*batch_of(RGB))
    for name, value in states[0].net.state_dict().items():
        torch.testing.assert_close(states[1].net.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", LEARNING_RATES, ids=lambda case: f"{case['cur_nimg']}-{case['batch_size']}")
def test_learning_rates_equal_the_published_ones(case):
    expected = case.pop("lr")
    assert learning_rate_schedule(**case) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("nimg", [0, 1, 8, 5_000, 10**7, 2**31])
@pytest.mark.parametrize("options", [{}, {"ref_batches": 0}, {"rampup_Mimg": 0}, {"ref_lr": 0.3, "ref_batches": 3}])
def test_learning_rates_equal_the_oracle(nimg, options):
    expected = oracle.plain_learning_rate(nimg, 8, **options)
    assert learning_rate_schedule(nimg, 8, **options) == pytest.approx(expected, rel=1e-12)
