"""Learning rate, forced normalization, cleared gradients, fused Adam and loss scale, each against its formula."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from dnnlib.errors import ConfigError
from tests.helpers import oracle
from tests.helpers.dispatched import Launches
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.tiny import assert_same_state, tiny_config
from tests.helpers.training_step import RGB, batch_of, make_state, wake
from torch_utils.loss_scale import LossScale, check_loss_scale
from training.networks_edm2 import MPConv
from training.run.run_network import make_network
from training.run.update import (
    clear_nonfinite,
    flat_gradients,
    joined,
    learning_rate_schedule,
    make_optimizer,
    normalize_rows,
    normalize_weights,
    pack_weights,
    weights_of,
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
    empty = MPConv(4, 0, [1, 1])  # as in a process without rows of a sharded weight
    normalize_weights(torch.nn.ModuleList([*layers, empty]))
    for layer, value in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), value, rtol=1e-6, atol=0)
    assert pointers == [layer.weight.data_ptr() for layer in layers]


def test_packed_weights_are_normalized_to_the_same_bits_in_place():
    torch.manual_seed(0)
    alone = make_network(tiny_config(Path("none"), channels=7, channels_per_head=7), RGB)
    with torch.no_grad():
        for param in alone.parameters():
            param.mul_(3)
    packed = copy.deepcopy(alone)
    pack_weights(packed)
    assert_same_state(packed.state_dict(), alone.state_dict())
    pointers = [param.data_ptr() for param in packed.parameters()]
    assert len(joined(weights_of(packed))) < len(weights_of(packed)) / 2
    for net in (alone, packed):
        normalize_weights(net)
    assert_same_state(packed.state_dict(), alone.state_dict())
    assert pointers == [param.data_ptr() for param in packed.parameters()]


def test_gradients_become_flat_in_the_memory_that_adam_reads():
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ([2, 3], [], [4], [2, 2], [0])]
    params[0].grad, params[1].grad, params[4].grad = torch.randn(2, 3), torch.ones([]), torch.zeros(0)
    params[3].grad = torch.randn(2, 2).t()
    expected = [None if param.grad is None else 2 * param.grad for param in params]
    (flat,) = flat_gradients(params)
    flat.mul_(2)
    for param, grad in zip(params, expected, strict=True):
        assert (param.grad is None) == (grad is None)
        assert param.grad is None or torch.equal(param.grad, grad)
    assert flat_gradients([torch.nn.Parameter(torch.ones(1))]) == []


def test_gradients_in_a_bucket_are_not_copied():
    bucket = torch.arange(12.0)
    params = [torch.nn.Parameter(torch.zeros(1, 2)) for _ in range(5)]
    for param, grad in zip(params, reversed(bucket[2:].split(2)), strict=True):
        param.grad = grad.view(1, 2)
    (flat,) = flat_gradients(params)
    assert flat.data_ptr() == bucket[2:].data_ptr() and torch.equal(flat, bucket[2:])


def test_a_network_of_the_depth_of_s_takes_few_launches_after_the_gradients():
    """All sorts of blocks and as many as in edm2-img512-s: before packing and foreach, these were about 700."""
    depth = {"channels": 4, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (16, 8)}
    state = make_state(tiny_config(Path("none"), **depth), SimpleNamespace(**{**vars(RGB), "resolution": 64}))
    assert len(list(state.net.parameters())) == 199
    images, labels = batch_of(RGB, 1)[0], torch.eye(3)[:1]
    state.config = dataclasses.replace(state.config, batch=1)
    for _ in range(2):  # the first makes the optimizer's state
        for param in state.net.parameters():
            param.grad = torch.ones_like(param)
        state.accumulate_gradients = lambda *_: torch.zeros(1)
        with Launches() as launches:
            state.step(images, labels)
    assert len(launches.names) <= 60, launches.names


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


def test_an_adaptive_loss_scale_on_an_apple_gpu_needs_a_recent_pytorch(monkeypatch: pytest.MonkeyPatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    with pytest.raises(ConfigError, match="--ls=auto on an Apple GPU needs PyTorch 2"):
        check_loss_scale("auto", mps)
    check_loss_scale(1.0, mps)
    check_loss_scale("auto", CPU)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0+cpu"))
    check_loss_scale("auto", mps)


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


def test_a_compiled_step_is_the_eager_one_to_rounding(monkeypatch: pytest.MonkeyPatch):
    """With a backend that generates no code. tests/training/fast compiles the same network with the default one."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    states = [make_state(tiny_config(Path("none"), compile=value, channel_mult=(1,))) for value in (False, True)]
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


@pytest.mark.parametrize("layout", ["channels-last", "transposed", "every other row", "a part of each row"])
def test_weights_in_any_layout_are_normalized_in_place_and_nothing_else_changes(layout: str):
    whole = torch.randn(8, 6, 3, 3)
    expected = whole.clone()
    views = {
        "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 1),
        "every other row": lambda x: x[::2],
        "a part of each row": lambda x: x[:, 2:5],
    }
    weight, wanted = views[layout](whole), views[layout](expected).clone()
    norm = wanted.flatten(1).norm(dim=1) / wanted[0].numel() ** 0.5
    normalize_rows([weight])
    torch.testing.assert_close(weight, wanted / (norm + 1e-4).view(-1, 1, 1, 1))
    if layout in ("every other row", "a part of each row"):
        rest = (slice(1, None, 2),) if layout == "every other row" else (slice(None), slice(0, 2))
        assert torch.equal(whole[rest], expected[rest])
