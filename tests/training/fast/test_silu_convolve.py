"""The convolution that computes SiLU again, against its plain form."""

import pytest
import torch
import torch.nn.functional as F

from training.fast.ops import silu_convolve


def inputs(scale_rows: int | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, 3, 5, 4), torch.randn(6, 3, 3, 3)]
    if scale_rows is not None:
        made.append(torch.randn(scale_rows, 3))
    return [tensor.double().requires_grad_() for tensor in made]


@pytest.mark.parametrize("scale_rows", [None, 1, 2])
@pytest.mark.parametrize("side", [1, 3])
def test_value_and_gradients_are_those_of_the_formula(scale_rows, side):
    x, weight, *scale = inputs(scale_rows)
    weight = weight[:, :, :side, :side].detach().clone().requires_grad_()
    leaves = [x, weight, *scale]
    modulated = x * scale[0][:, :, None, None] if scale else x
    plain = F.conv2d(F.silu(modulated), weight, padding=side // 2)
    ours = silu_convolve(x, weight, *scale)
    torch.testing.assert_close(ours, plain)
    up = torch.randn_like(plain)
    for left, right in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(plain, leaves, up), strict=True):
        torch.testing.assert_close(left, right)
    with torch.no_grad():
        before = x.clone()
        torch.testing.assert_close(silu_convolve(x, weight, *scale), plain)
        assert torch.equal(x, before)


def test_what_is_dropped_forward_is_dropped_backward():
    leaves = inputs(2)

    def value(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return silu_convolve(x, weight, scale, dropout=0.4)

    torch.autograd.gradcheck(value, leaves)
    assert not torch.allclose(value(*leaves), silu_convolve(*leaves))


def test_half_of_the_elements_are_dropped_and_the_others_make_up_for_them():
    x, weight = torch.full([1, 1, 100, 100], 2.0), torch.ones(1, 1, 1, 1)
    torch.manual_seed(0)
    y = silu_convolve(x.requires_grad_(), weight, dropout=0.5)
    kept = y != 0
    assert 0.45 < kept.double().mean() < 0.55
    torch.testing.assert_close(y[kept], 2 * F.silu(x)[kept])


def test_only_what_goes_in_is_kept_for_the_backward_pass():
    kept: list[torch.Tensor] = []
    x, weight, scale = inputs(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        silu_convolve(x, weight, scale)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, scale)}


def test_the_layout_of_the_activations_is_kept():
    x, weight, scale = (t.detach().float() for t in inputs(2))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = silu_convolve(x, weight, scale)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
