"""The network against the published numbers, the plain oracle, and the properties that the paper asks of it."""

import copy
import json
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import oracle
from tests.helpers.paths import Golden
from training.networks_edm2 import (
    Block,
    MPConv,
    MPFourier,
    Precond,
    image_size,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    preconditioning,
    resample,
)

Load = Callable[[str], Golden]
NETWORKS = ["precond-cond.safetensors", "precond-uncond.safetensors"]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.abs().max())


def load_network(golden: Load, name: str) -> tuple[Precond, dict[str, torch.Tensor], dict[str, str]]:
    """The golden network with its stored weights."""
    tensors, metadata = golden(name)
    net = Precond(**json.loads(metadata["config"]))
    net.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("state.")})
    return net, tensors, metadata


def test_primitives_equal_the_published_ones(golden: Load) -> None:
    g, _ = golden("primitives.safetensors")
    x, b, c = g["x"], g["b"], g["c"]
    results = {
        "normalize_all": normalize(x),
        "normalize_dim1": normalize(x, dim=1),
        "resample_up": resample(x, mode="up"),
        "resample_down": resample(x, mode="down"),
        "mp_silu": mp_silu(x),
    }
    for t in (0.3, 0.5, 0.8):
        results |= {f"mp_sum_{t}": mp_sum(x, b, t=t), f"mp_cat_{t}": mp_cat(x, c, t=t)}
    for name, value in results.items():
        assert relative_error(value, g[name]) < 1e-6, name


def test_layers_equal_the_published_ones(golden: Load) -> None:
    g, _ = golden("primitives.safetensors")
    fourier = MPFourier(16)
    fourier.load_state_dict({"freqs": g["fourier_freqs"], "phases": g["fourier_phases"]})
    assert relative_error(fourier(g["fourier_in"]), g["fourier_out"]) < 1e-6
    linear = MPConv(6, 12, kernel=[]).eval()
    linear.load_state_dict({"weight": g["mplinear_weight"]})
    assert relative_error(linear(g["mplinear_in"]), g["mplinear_out"]) < 1e-6
    conv = MPConv(6, 12, kernel=[3, 3]).eval()
    conv.load_state_dict({"weight": g["mpconv_weight"]})
    assert relative_error(conv(g["x"], gain=0.7), g["mpconv_eval_out"]) < 1e-6
    out = conv.train()(g["x"], gain=0.7)
    assert relative_error(out, g["mpconv_train_out"]) < 1e-6
    assert relative_error(conv.weight.detach(), g["mpconv_weight_after_train_forward"]) < 1e-6
    out.square().sum().backward()
    # What reaches the weight is a small remainder of large terms: normalization takes its radial part out.
    assert relative_error(conv.weight.grad, g["mpconv_weight_grad"]) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_are_the_published_ones(golden: Load, name: str) -> None:
    g, metadata = golden(name)
    torch.manual_seed(int(metadata["init_seed"]))
    state = Precond(**json.loads(metadata["config"])).state_dict()
    assert set(state) == {key[6:] for key in g if key.startswith("state.")}
    for key, value in state.items():
        if value.ndim > 0:  # the gains were set to other values afterwards
            assert torch.equal(value, g[f"state.{key}"]), key
        else:
            assert value == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_published_ones(golden: Load, name: str) -> None:
    net, g, _ = load_network(golden, name)
    net.eval()
    labels = g.get("in.class_labels")
    with torch.no_grad():
        denoised, logvar = net(g["in.x"], g["in.sigma"], labels, return_logvar=True)
        assert relative_error(denoised, g["out.D_x"]) < 1e-4
        assert relative_error(logvar, g["out.logvar"]) < 1e-4
        assert relative_error(net(g["in.x"], 1.5, labels), g["out.D_x_scalar_sigma"]) < 1e-4
        if "out.D_x_no_labels" in g:
            assert relative_error(net(g["in.x"], g["in.sigma"]), g["out.D_x_no_labels"]) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"img_channels": 1},
        {"img_channels": 8, "label_dim": 0},
        {"img_channels": 4, "channel_mult": [1, 1, 2], "attn_resolutions": [16, 8]},
        {
            "img_channels": 3,
            "channel_mult_noise": 2,
            "channel_mult_emb": 3,
            "label_balance": 0.3,
            "concat_balance": 0.7,
        },
        {"img_channels": 3, "resample_filter": [1, 3, 3, 1], "res_balance": 0.5, "attn_balance": 0.2, "clip_act": 1.0},
        {"img_channels": 3, "num_blocks": 2, "clip_act": None, "sigma_data": 0.7, "logvar_channels": 32},
    ],
)
def test_every_option_does_what_the_plain_oracle_does(options: dict) -> None:
    config: dict[str, Any] = {
        "img_resolution": 16,
        "label_dim": 5,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
    }
    config |= {"channels_per_head": 8, "attn_resolutions": [8]} | options
    torch.manual_seed(3)
    plain = oracle.PlainPrecond(**config).eval()
    with torch.no_grad():
        for param in plain.parameters():
            if param.ndim == 0:
                param.copy_(torch.rand([]) + 0.5)
    net = Precond(**config).eval()
    net.load_state_dict(plain.state_dict())
    x = torch.randn(2, config["img_channels"], 16, 16) * 3
    labels = torch.eye(5)[:2] if config["label_dim"] else None
    sigma = torch.tensor([0.1, 4.0])
    with torch.no_grad():
        assert relative_error(net(x, sigma, labels), plain(x, sigma, labels)) < 1e-5


def test_a_rectangle_is_handled_like_a_square() -> None:
    options = {"img_channels": 2, "label_dim": 0, "model_channels": 8, "channel_mult": [1, 2], "channels_per_head": 8}
    torch.manual_seed(0)
    square = Precond(8, num_blocks=1, attn_resolutions=[], **options).eval()
    torch.manual_seed(0)
    oblong = Precond((8, 12), num_blocks=1, attn_resolutions=[], **options).eval()
    assert sum(p.numel() for p in square.parameters()) == sum(p.numel() for p in oblong.parameters())
    with torch.no_grad():
        for p, q in zip(square.parameters(), oblong.parameters(), strict=True):
            assert torch.equal(p, q)
            if p.ndim == 0:
                p.fill_(0.8), q.fill_(0.8)
        x = torch.randn(1, 2, 8, 12)
        assert torch.equal(square(x, 1.0), oblong(x, 1.0))


def test_sizes_that_do_not_halve_are_refused_with_the_divisor() -> None:
    options = {"img_channels": 1, "label_dim": 0, "model_channels": 8, "num_blocks": 1, "channels_per_head": 8}
    with pytest.raises(ValueError, match="divisible by 4"):
        Precond(10, channel_mult=[1, 1, 1], **options)
    net = Precond(8, channel_mult=[1, 1, 1], **options)
    with pytest.raises(ValueError, match="8x10 pixels"):
        net(torch.zeros(1, 1, 8, 10), 1.0)
    with pytest.raises(ValueError, match="do not divide over 3 attention heads"):
        Block(8, 224, 8, attention=True, channels_per_head=70)


def test_the_published_sizes_have_the_published_parameter_counts() -> None:
    expected = {64: 31.309029, 128: 124.713253, 192: 280.212837, 256: 497.807781, 320: 777.498085, 384: 1119.283749}
    for channels, millions in expected.items():
        with torch.device("meta"):
            net = Precond(64, 4, 1000, model_channels=channels)
        assert sum(p.numel() for p in net.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("sigma_data", [0.5, 0.7])
def test_preconditioning_follows_the_printed_formulas(sigma_data: float) -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0])
    level = sigma.double()
    expected = (
        sigma_data**2 / (level**2 + sigma_data**2),
        level * sigma_data / (level**2 + sigma_data**2).sqrt(),
        1 / (level**2 + sigma_data**2).sqrt(),
        level.log() / 4,
    )
    for ours, theirs, shape in zip(
        preconditioning(sigma, sigma_data), expected, [[3, 1, 1, 1]] * 3 + [[3]], strict=True
    ):
        torch.testing.assert_close(ours, theirs.float().reshape(shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mult", [[1], [1, 2], [1, 2, 1], [2, 1, 1]])
@pytest.mark.parametrize("num_blocks", [0, 2])
def test_the_blocks_that_take_a_skip_are_those_of_the_published_names(mult: list[int], num_blocks: int) -> None:
    options: dict[str, Any] = {"model_channels": 4, "channel_mult": mult, "num_blocks": num_blocks}
    for channels in (1, 4):
        unet = Precond(16, channels, 0, channels_per_head=4, **options).unet
        assert unet.takes_skip() == ["block" in name for name in unet.dec]


def test_the_size_of_images_is_one_side_or_two() -> None:
    assert image_size(types.SimpleNamespace(img_resolution=8)) == (8, 8)
    assert image_size(types.SimpleNamespace(img_resolution=[8, 12])) == (8, 12)


def test_normalize_has_a_finite_gradient_at_zero() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    normalize(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_activations_keep_unit_magnitude_through_the_network() -> None:
    torch.manual_seed(0)
    net = Precond(16, 4, 10, model_channels=32, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[8])
    net.eval()
    for block in net.modules():
        if isinstance(block, Block):
            block.emb_gain.data.fill_(0.3)
    magnitudes = []
    for block in [*net.unet.enc.values(), *net.unet.dec.values()]:
        block.register_forward_hook(lambda m, i, out: magnitudes.append(float(out.square().mean().sqrt())))
    with torch.no_grad():
        net(torch.randn(8, 4, 16, 16) * 0.5**0.5, torch.full([8], 0.5), torch.eye(10)[:8])
    assert len(magnitudes) == 15
    assert all(0.7 < magnitude < 1.4 for magnitude in magnitudes), magnitudes


def test_training_mode_normalizes_the_stored_weights_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    net = Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8)
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(3)
    before = copy.deepcopy(net.state_dict())
    net.eval()(torch.zeros(1, 1, 8, 8), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.train()(torch.zeros(1, 1, 8, 8), 1.0, return_logvar=True)
    for module in net.modules():
        if isinstance(module, MPConv):
            magnitude = module.weight.flatten(1).square().mean(dim=1).sqrt()
            torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=2e-4, atol=0)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net = Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8, dropout=0.5)
    net.unet.out_gain.data.fill_(1)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(net.eval()(x, 1.0), net(x, 1.0))
        assert not torch.equal(net.train()(x, 1.0), net(x, 1.0))
