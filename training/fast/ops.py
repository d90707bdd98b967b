"""Operations of the fast networks that save passes over memory; values and gradients are those of the plain forms.

Source of the functions themselves: Karras et al., arXiv 2312.02696; equation numbers are that paper's. The plain forms
are in training/networks_edm2.py and tests/helpers/oracle.py.

Shape legend: N images, I input and O output channels, C channels, H x W pixels, k the side of a kernel, S positions,
h heads, d channels per head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.networks_edm2 import EPS

# The attention kernels that PyTorch may choose from on CUDA devices: the first, in this order, that supports the input.
# Newer versions prefer cuDNN's on some cards if they may, which plan every new shape on the host. Not measured yet:
# check B6 of benchmarks/gpu_check says which is the fastest.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def effective_weight(
    weight: torch.Tensor, gain: float | torch.Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> torch.Tensor:
    """Normalize the rows of `weight` [O, ...] and multiply by `gain`, a number or a scalar tensor (Eq. 47 and 66).

    This is the weight that acts on the input, the differentiable half of the two normalizations, as `dtype` in the
    given memory format. For the backward pass it keeps one number per row and the weight, which is in memory anyway.
    """
    result: torch.Tensor = _EffectiveWeight.apply(gain, dtype, weight)
    return result.contiguous(memory_format=layout) if result.ndim == 4 else result


def stacked_weight(weights: Sequence[torch.Tensor], gains: Sequence[torch.Tensor]) -> torch.Tensor:
    """Effective weights of fully connected layers with one input, one above the other: [sum of O, I] in float32.

    `gains` are scalars, one of each layer. Nothing of the stack's size is kept for the backward pass.
    """
    rows = [gain.expand(len(weight), 1) for weight, gain in zip(weights, gains, strict=True)]
    result: torch.Tensor = _EffectiveWeight.apply(torch.cat(rows), torch.float32, *weights)
    return result


def balance(t: float) -> tuple[float, float]:
    """Factors of a and b in the magnitude-preserving sum with a share `t` of b (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve `x` [N, I, H, W] with `weight` [O, I, k, k], k odd, or its `packed` form, to [N, O, H, W]."""
    padding = [weight.shape[-1] // 2] * 2
    if weight.is_mkldnn:
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, padding, [1, 1], [1, 1], 1, "none", [], ""
        )
        return result
    return F.conv2d(x, weight, padding=padding)


def silu_convolve(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, dropout: float = 0
) -> torch.Tensor:
    """Convolve dropout(SiLU(x * scale)) with `weight` [O, I, k, k], k odd: [N, I, H, W] to [N, O, H, W].

    `scale` [N or 1, I] and `dropout`, a probability, are optional. If gradients are off, the weight may be packed.
    Only the inputs stay in memory for the backward pass, which computes SiLU again. The plain form would keep the input
    and output of SiLU, and a third tensor between modulation or dropout: most of what such a U-Net keeps.
    """
    scale = None if scale is None else scale[:, :, None, None]
    if not torch.is_grad_enabled():
        y = F.silu(x if scale is None else x * scale, inplace=scale is not None)
        return convolve(F.dropout(y, dropout) if dropout else y, weight)
    # Here and not in the backward pass, where Dynamo of PyTorch 2.6 does not support the query.
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    result: torch.Tensor = _SiluConv.apply(x, weight, scale, dropout, nhwc)
    return result


def packed(weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reorder a constant `weight` [O, I, k, k] for the CPU's convolutions (oneDNN) on images of height x width.

    torch.compile does the same with frozen weights. There are two reasons: F.conv2d reorders the weight in every call,
    and it uses another algorithm for one small image than for several, so that results would depend on the batch.
    Returns `weight` itself if PyTorch lacks such a convolution for this device or type.
    """
    able = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    able = able and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    if not able or weight.dtype not in (torch.float32, torch.bfloat16):
        return weight
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    shape = [8, weight.shape[1], height, width]  # the layout does not depend on the number of images
    padding = [weight.shape[-1] // 2] * 2
    result: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), padding, [1, 1], [1, 1], 1, shape
    )
    return result


def double(x: torch.Tensor) -> torch.Tensor:
    """Repeat every pixel of `x` [N, C, H, W] in a square of four: `resample` upward with its default filter.

    The compiler turns the gradient of nearest interpolation into atomic additions to a float32 tensor in NCHW order,
    which are slow and have other last bits in each run. The gradient of a broadcast is a sum of four values that is
    fused with what comes before it. Eager mode has the right kernel for interpolation, and a slow one for the sum.
    """
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="nearest")
    n, width, height, breadth = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    squares = pixels.expand(n, height, 2, breadth, 2, width)
    return squares.reshape(n, 2 * height, 2 * breadth, width).permute(0, 3, 1, 2)


def add(a: torch.Tensor, b: torch.Tensor, factor: float = 1) -> torch.Tensor:
    """a + factor * b; overwrites `a` if gradients are off."""
    return torch.add(a, b, alpha=factor) if torch.is_grad_enabled() else a.add_(b, alpha=factor)


def clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Clip `x` to [-limit, limit]; in place if gradients are off."""
    return F.hardtanh(x, -limit, limit, inplace=not torch.is_grad_enabled())


def scaled_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Magnitude-preserving concatenation along channels, with a share `t` of `b` (Eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    parts = ((a, scale * (1 - t) / math.sqrt(a.shape[1])), (b, scale * t / math.sqrt(b.shape[1])))
    # Equal widths in equal shares, the usual case, have factors of 1 and need no multiplication.
    return torch.cat([x if math.isclose(factor, 1, rel_tol=1e-9) else x * factor for x, factor in parts], dim=1)


def pixel_norm(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Scale `x` to unit magnitude along `dim`, in x's dtype with float32 sums (Eq. 30)."""
    if not torch.is_grad_enabled():
        return x * (1 / (_magnitude(x, dim) + EPS)).to(x.dtype)
    result: torch.Tensor = _PixelNorm.apply(x, dim)
    return result


def cosine_attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Self-attention over all pixels with unit-magnitude vectors; `qkv` [N, 3C, H, W] in (q/k/v, head, channel) order.

    In channels-last memory this order makes the d channels of a vector contiguous, as the attention kernels need them.
    The stored order (head, channel, q/k/v) would cost a copy of all activations.
    """
    n, width, height, breadth = qkv.shape
    depth = width // (3 * num_heads)
    vectors = qkv.permute(0, 2, 3, 1).reshape(n, height * breadth, 3, num_heads, depth)
    vectors = pixel_norm(vectors, dim=4)
    q, k, v = vectors.permute(2, 0, 3, 1, 4).unbind(0)  # [N, h, S, d] each
    y = _attend(q, k, v)
    y = y.transpose(1, 2).reshape(n, height, breadth, num_heads * depth)
    return y.permute(0, 3, 1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of q, k and v [N, h, S, d] by the fastest of PyTorch's kernels."""
    n, heads, positions, depth = q.shape
    if q.device.type == "cuda":
        return pinned_attention(q, k, v)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or positions > 512 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    # On CPUs the fused kernel in bfloat16 is slower as long as the S x S attention weights fit the caches.
    q, k, v = (t.reshape(n * heads, positions, depth) for t in (q, k, v))
    weights = torch.bmm(q * depth**-0.5, k.transpose(1, 2)).softmax(dim=2)
    return torch.bmm(weights, v).reshape(n, heads, positions, depth)


def pinned_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of q, k and v [N, h, S, d] by the first of ATTENTION_KERNELS that supports them."""
    with sdpa_kernel(ATTENTION_KERNELS):
        return F.scaled_dot_product_attention(q, k, v)


def _magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square of `x` along `dim`, which is kept, in float32."""
    if x.ndim == 4 and dim == 1:  # a view with channels innermost, so that channels-last images are read in one pass
        return _magnitude(x.permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) * x.shape[dim] ** -0.5


def head_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows of an attention weight [3C, ...]: stored (head, channel, q/k/v), result (q/k/v, head, channel)."""
    rows = weight.unflatten(0, (num_heads, -1, 3)).movedim(2, 0)
    return rows.reshape(weight.shape)


class _EffectiveWeight(torch.autograd.Function):
    """w * gain / ((rms(w) + EPS) * sqrt(n)) for the rows w of n elements of all `weights`; `gain` may be one per row.

    Autograd would keep several tensors of this size. With more than one weight, the rows are stacked again for the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, gain: float | torch.Tensor, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:
        rows = _stacked_rows(weights)
        root = math.sqrt(rows.shape[1])
        sum_dtype = torch.promote_types(rows.dtype, torch.float32)
        magnitude = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=sum_dtype) / root  # [O, 1]
        inverse = 1 / ((magnitude + EPS) * root)
        is_learned = isinstance(gain, torch.Tensor)
        ctx.save_for_backward(magnitude, gain if is_learned else None, *weights)
        ctx.gain = None if is_learned else gain
        return (rows * (inverse * gain)).to(dtype).reshape(-1, *weights[0].shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        magnitude, learned, *weights = ctx.saved_tensors
        gain = ctx.gain if learned is None else learned
        rows = _stacked_rows(weights)
        count = rows.shape[1]
        upstream = grad.reshape(rows.shape).to(rows.dtype)
        dot = (upstream * rows).sum(dim=1, keepdim=True)  # [O, 1]
        inverse = 1 / ((magnitude + EPS) * math.sqrt(count))
        # The second term removes the gradient's part along the row. A row of zeros has no direction: 0, not 0 / 0.
        steepness = torch.where(magnitude > 0, dot * inverse / ((magnitude + EPS) * magnitude * count), 0)
        grad_rows = torch.addcmul(upstream * (inverse * gain), rows, steepness * gain, value=-1)
        grad_gain = None
        if learned is not None:
            grad_gain = dot * inverse if learned.ndim else (dot * inverse).sum()
        parts = grad_rows.split([len(weight) for weight in weights])
        return grad_gain, None, *(part.reshape(w.shape) for part, w in zip(parts, weights, strict=True))


def _stacked_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all `weights` [O, ...] in one matrix; a view if there is one weight."""
    return weights[0].flatten(1) if len(weights) == 1 else torch.cat([weight.flatten(1) for weight in weights])


class _PixelNorm(torch.autograd.Function):
    """x / (rms(x) + EPS) along `dim`, where autograd would keep several tensors of this size."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        magnitude = _magnitude(x, dim)
        ctx.save_for_backward(x, magnitude)
        ctx.dim = dim
        return x * (1 / (magnitude + EPS)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, magnitude = ctx.saved_tensors
        inverse = 1 / (magnitude + EPS)
        dot = (grad * x).mean(dim=ctx.dim, keepdim=True, dtype=torch.float32)
        steepness = torch.where(magnitude > 0, dot * inverse.square() / magnitude, 0)
        return torch.addcmul(grad * inverse.to(x.dtype), x, steepness.to(x.dtype), value=-1), None


class _SiluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, dropout: float, nhwc: bool
    ) -> torch.Tensor:
        y = F.silu(x if scale is None else x * scale)
        kept = None
        if dropout:
            y, kept = torch.native_dropout(y, dropout, True)
        ctx.save_for_backward(x, weight, scale, kept)
        ctx.dropout, ctx.nhwc = dropout, nhwc
        return convolve(y, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale, kept = ctx.saved_tensors
        modulated = x if scale is None else x * scale
        y = F.silu(modulated)
        if kept is not None:
            y = y * kept * (1 / (1 - ctx.dropout))
        pad = weight.shape[-1] // 2
        # The layout of the activations; the convolutions would copy a gradient in another one.
        grad = grad.contiguous(memory_format=torch.channels_last if ctx.nhwc else torch.contiguous_format)
        needs_grad = [True, True, False]  # input, weight, bias
        grad_y, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, y, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, needs_grad
        )
        if kept is not None:
            grad_y = grad_y * kept * (1 / (1 - ctx.dropout))
        slope = torch.ops.aten.silu_backward(grad_y, modulated)
        if scale is None:
            return slope, grad_weight, None, None, None
        grad_scale = (slope * x).sum(dim=(2, 3), keepdim=True)
        if scale.shape[0] == 1:
            grad_scale = grad_scale.sum(dim=0, keepdim=True)
        return slope * scale, grad_weight, grad_scale, None, None
