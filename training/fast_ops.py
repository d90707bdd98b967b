"""The pieces of the fast network that save passes over memory: each has the gradient of its plain form, in fewer steps.

Source of the functions themselves: Karras et al., arXiv 2312.02696; equation numbers are that paper's. The plain forms
are in training/networks_edm2.py and tests/oracle.py.

Shape legend: N images, C channels, H x W pixels, O rows of a weight, S positions, h heads, d channels per head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

EPS = 1e-4  # of all normalizations (Eq. 47)
SILU_MAGNITUDE = 0.596  # of SiLU's output for normal input (Eq. 81)


def effective_weight(
    weight: torch.Tensor, gain: float | torch.Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> torch.Tensor:
    """The weight that acts on the input: `weight` [O, ...] normalized row by row, times `gain` (a number or a scalar
    tensor), as `dtype` in the given memory format (Eq. 47 and 66, the differentiable half).

    The backward pass needs the weight itself, which lives anyway, and one number a row.
    """
    result: torch.Tensor = _EffectiveWeight.apply(weight, gain, dtype)
    return result.contiguous(memory_format=layout) if result.ndim == 4 else result


def pixel_norm(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """`x` with unit magnitude along `dim`, in x's dtype, sums in float32 (Eq. 30)."""
    result: torch.Tensor = _PixelNorm.apply(x, dim)
    return result


def scaled_silu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """SiLU of `x` [N, C, H, W] times `scale` [N, C], of its plain magnitude; the product is not kept for backward."""
    result: torch.Tensor = _ScaledSilu.apply(x, scale[:, :, None, None])
    return result


def cosine_attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Self-attention over all pixels with unit-magnitude vectors, `qkv` [N, 3C, H, W] ordered (q/k/v, head, channel).

    The order puts the d channels of a vector side by side in channels-last memory, as the attention kernels want them.
    """
    n, width, height, breadth = qkv.shape
    depth = width // (3 * num_heads)
    vectors = qkv.permute(0, 2, 3, 1).reshape(n, height * breadth, 3, num_heads, depth)
    vectors = pixel_norm(vectors, dim=4)
    q, k, v = vectors.permute(2, 0, 3, 1, 4).unbind(0)  # [N, h, S, d] each
    y = F.scaled_dot_product_attention(q, k, v)
    y = y.transpose(1, 2).reshape(n, height, breadth, num_heads * depth)
    return y.permute(0, 3, 1, 2)


def head_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of an attention weight [3C, ...] from the stored order (head, channel, q/k/v) to (q/k/v, head, channel)."""
    rows = weight.unflatten(0, (num_heads, -1, 3)).movedim(2, 0)
    return rows.reshape(weight.shape)


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gain: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = weight.flatten(1)
        root = math.sqrt(rows.shape[1])
        sum_dtype = torch.promote_types(rows.dtype, torch.float32)
        magnitude = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=sum_dtype) / root  # [O, 1]
        inverse = 1 / ((magnitude + EPS) * root)
        is_learned = isinstance(gain, torch.Tensor)
        ctx.save_for_backward(weight, magnitude, *([gain] if is_learned else []))
        ctx.gain = None if is_learned else gain
        return (rows * (inverse * gain)).to(dtype).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        weight, magnitude, *learned = ctx.saved_tensors
        gain = learned[0] if learned else ctx.gain
        rows = weight.flatten(1)
        count = rows.shape[1]
        upstream = grad.reshape(rows.shape).to(rows.dtype)
        dot = (upstream * rows).sum(dim=1, keepdim=True)  # [O, 1]
        inverse = 1 / ((magnitude + EPS) * math.sqrt(count))
        # A row of zeros has no direction to be kept out of: there the second term is 0, not 0 / 0.
        steepness = torch.where(magnitude > 0, dot * inverse / ((magnitude + EPS) * magnitude * count), 0)
        grad_weight = torch.addcmul(upstream * (inverse * gain), rows, steepness * gain, value=-1)
        grad_gain = (dot * inverse).sum().reshape(gain.shape) if learned else None
        return grad_weight.reshape(weight.shape), grad_gain, None


class _PixelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        square_mean = x.to(torch.float32).square().mean(dim=dim, keepdim=True)
        magnitude = square_mean.sqrt()
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


class _ScaledSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return F.silu(x * scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, scale = ctx.saved_tensors
        slope = torch.ops.aten.silu_backward(grad, x * scale)
        return slope * scale, (slope * x).sum(dim=(2, 3), keepdim=True)
