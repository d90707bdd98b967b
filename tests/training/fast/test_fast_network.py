"""The fast network against the published numbers, the plain oracle and the network whose parameters it uses."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import oracle
from tests.helpers.small_network import OPTIONS, SMALL, small_network, worst
from training.fast.ops import (
    ATTENTION_KERNELS,
    cosine_attention,
    effective_weight,
    head_order,
    pinned_attention,
    pixel_norm,
    stacked_weight,
)
from training.fast.training_network import FastPrecond
from training.loss import EDM2Loss
from training.networks_edm2 import Precond, normalize
from training.presets import TRAINING


def gradients(forward: Any, net: Any, num_images: int = 4) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss per element and gradients of `net`'s parameters, with `forward` standing for it, on fixed data."""
    channels, label_dim = net.unet.out_conv.weight.shape[0], net.label_dim
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(num_images, channels, 16, 16, generator=generator) for _ in range(2))
    rnd_normal = torch.randn(num_images, 1, 1, 1, generator=generator)
    labels = torch.eye(label_dim)[torch.arange(num_images) % label_dim] if label_dim else None
    net.zero_grad(set_to_none=True)
    loss = EDM2Loss()(forward, images, labels, rnd_normal=rnd_normal, unit_noise=noise)
    loss.sum().backward()
    return loss.detach(), {name: param.grad.clone() for name, param in net.named_parameters()}


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_outputs_are_the_published_ones(golden, name):
    g, metadata = golden(f"precond-{name}.safetensors")
    net = Precond(**json.loads(metadata["config"])).eval()
    net.load_state_dict({key[6:]: value for key, value in g.items() if key.startswith("state.")})
    with torch.no_grad():
        denoised, logvar = FastPrecond(net)(g["in.x"], g["in.sigma"], g.get("in.class_labels"), return_logvar=True)
    for ours, theirs in ((denoised, g["out.D_x"]), (logvar, g["out.logvar"])):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_are_those_of_the_network_and_of_the_oracle(options):
    net = small_network(**options)
    plain = oracle.PlainPrecond(**(SMALL | options)).train()
    plain.load_state_dict(net.state_dict())
    expected_loss, expected = gradients(net, net)
    for forward in (FastPrecond(net), FastPrecond(net, recompute=True)):
        loss, grads = gradients(forward, net)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
        assert worst(grads, expected) < 1e-4

    def call(x, sigma, labels, return_logvar):
        assert return_logvar
        return plain.with_logvar(x, sigma, labels)

    assert worst(gradients(call, plain)[1], expected) < 1e-4


def test_the_stored_weights_are_left_alone():
    net = small_network()
    before = copy.deepcopy(net.state_dict())
    gradients(FastPrecond(net), net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_bfloat16_is_near_float32():
    net = small_network()
    expected_loss, expected = gradients(FastPrecond(net), net)
    loss, grads = gradients(FastPrecond(net, dtype=torch.bfloat16), net)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert float((loss - expected_loss).norm() / expected_loss.norm()) < 0.02
    # A scalar's gradient is a small difference of large sums; as one vector, the gradient keeps its direction.
    flat, reference = (torch.cat([g[k].flatten() for k in sorted(g)]) for g in (grads, expected))
    assert float((flat - reference).norm() / reference.norm()) < 0.03


def test_recomputation_draws_the_same_dropout_again():
    net = small_network(dropout=0.3)
    results = []
    for recompute in (False, True):
        torch.manual_seed(7)
        results.append(gradients(FastPrecond(net, recompute=recompute), net)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    torch.manual_seed(8)
    assert worst(gradients(FastPrecond(net), net)[1], results[0]) > 0.1


@pytest.mark.parametrize("gain", [0.7, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)])
def test_the_effective_weight_has_the_gradient_of_its_formula(gain):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (weight, gain)
    torch.autograd.gradcheck(lambda w, g: effective_weight(w, g, torch.float64, torch.contiguous_format), inputs)
    plain = normalize(weight.detach().float()) * (0.7 / 18**0.5)
    ours = effective_weight(weight.detach().float(), 0.7, torch.float32, torch.channels_last)
    torch.testing.assert_close(ours, plain)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_zero_rows_and_pixels_have_a_finite_gradient():
    weight = torch.zeros(2, 3, requires_grad=True)
    effective_weight(weight, 1.0, torch.float32, torch.contiguous_format).sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().min() > 0
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    pixel_norm(x).sum().backward()
    assert x.grad.isfinite().all()


def test_pixel_norm_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    x, up = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    results = []
    for function in (pixel_norm, lambda x: normalize(x, dim=1)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(up)
        results.append((y.detach(), leaf.grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_head_order_follows_the_stored_order():
    heads, depth = 2, 3
    rows = torch.tensor([(h * depth + c) * 3 + part for part in range(3) for h in range(heads) for c in range(depth)])
    weight = torch.arange(3 * heads * depth, dtype=torch.float32)[:, None]
    assert torch.equal(head_order(weight, heads), weight[rows])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_traced_graph_is_whole_and_is_not_traced_again(recompute):
    """Without the default backend, whose compilation takes long: noise levels and labels of other values, one graph."""
    net = small_network()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    expected = gradients(FastPrecond(net), net)[1]
    traced = torch.compile(FastPrecond(net, recompute=recompute), fullgraph=True, backend=backend)
    assert worst(gradients(traced, net)[1], expected) < 1e-4
    for sigma in (0.1, 1.0, 60.0):
        traced(torch.randn(4, 3, 16, 16), torch.full([4, 1, 1, 1], sigma), torch.eye(5)[:4], return_logvar=True)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_by_the_default_backend_it_trains_as_in_eager_mode():
    net = small_network(channel_mult=[1], attn_resolutions=[16], num_blocks=0)
    expected_loss, expected = gradients(FastPrecond(net), net)
    loss, grads = gradients(torch.compile(FastPrecond(net), fullgraph=True), net)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert worst(grads, expected) < 1e-4


def test_the_stack_of_embedding_layers_has_the_rows_and_gradients_of_each_layer():
    torch.manual_seed(0)
    weights = [torch.randn(rows, 5, requires_grad=True) for rows in (2, 3, 4)]
    gains = [torch.tensor(gain, requires_grad=True) for gain in (0.5, 1.0, -2.0)]
    each = [effective_weight(w, g, torch.float32, torch.contiguous_format) for w, g in zip(weights, gains, strict=True)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stack = stacked_weight(weights, gains)
    assert torch.equal(stack, torch.cat(each))
    assert {t.data_ptr() for t in saved if t.shape[1:] == (5,)} == {weight.data_ptr() for weight in weights}
    up = torch.randn(9, 5)
    ours, theirs = (torch.autograd.grad(x, [*weights, *gains], up) for x in (stack, torch.cat(each)))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


def test_attention_is_eligible_for_fused_kernels_at_every_width_of_the_presets(monkeypatch):
    """Flash attention and cuDNN need contiguous vectors of a fit length, aligned to 16 bytes, and no mask."""
    plain, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(args) or plain(*args))
    networks = [config.network for name, config in TRAINING.items() if name.startswith("edm2-img")]
    for channels in sorted({network.channels * mult for network in networks for mult in network.channel_mult}):
        qkv = torch.randn(2, 3 * channels, 2, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        cosine_attention(qkv.requires_grad_(), channels // 64)
        for vectors in calls.pop():
            assert vectors.shape == (2, channels // 64, 8, 64) and vectors.dtype == torch.float16
            assert vectors.stride(3) == 1
            assert all(number % 8 == 0 for number in (*vectors.stride()[:3], vectors.storage_offset()))
        assert not calls


def test_the_attention_kernels_are_pinned_in_eager_and_in_compiled_code(monkeypatch):
    plain, allowed = F.scaled_dot_product_attention, []
    backends = torch.backends.cuda

    def recorded(*args):
        allowed.append((backends.flash_sdp_enabled(), backends.math_sdp_enabled(), backends.cudnn_sdp_enabled()))
        return plain(*args)

    q, k, v = torch.randn(3, 1, 2, 8, 16)
    names: list[str] = []

    def backend(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(pinned_attention, fullgraph=True, backend=backend)(q, k, v)
    assert any("sdpa_kernel" in name for name in names)
    before = backends.cudnn_sdp_enabled()
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    torch.testing.assert_close(pinned_attention(q, k, v), compiled)
    assert allowed == [(True, True, False)] and backends.cudnn_sdp_enabled() == before
    assert ATTENTION_KERNELS[0].name == "FLASH_ATTENTION"


class Types(TorchDispatchMode):
    """Records the types of the inputs of convolutions, matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kind = next((kind for kind in ("convolution", "mm", "attention") if kind in name), None)
        if kind is not None:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim > 1 and x.is_floating_point()]
            self.found.setdefault(kind, set()).update(x.dtype for x in tensors if x.ndim != 3)
        return func(*args, **(kwargs or {}))


def test_convolutions_and_attention_are_in_half_precision_and_embeddings_in_float32():
    net = small_network()
    for dtype in (torch.bfloat16, torch.float16):
        with Types() as types:
            gradients(FastPrecond(net, dtype=dtype), net)
        assert types.found == {"convolution": {dtype}, "attention": {dtype}, "mm": {torch.float32}}
