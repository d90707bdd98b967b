"""The pieces of the fast network that save passes over memory: each has the gradient of its plain form, in fewer steps.

Source of the functions themselves: Karras et al., arXiv 2312.02696; equation numbers are that paper's. The plain forms
are in training/networks_edm2.py and tests/helpers/oracle.py.

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


def balance(t: float) -> tuple[float, float]:
    """The factors of a and b in the magnitude-preserving sum with a share `t` of b (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [N, I, H, W] through `weight` [O, I, k, k], k odd, or what `packed` made of it, to [N, O, H, W]."""
    padding = [weight.shape[-1] // 2] * 2
    if weight.is_mkldnn:
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, padding, [1, 1], [1, 1], 1, "none", [], ""
        )
        return result
    return F.conv2d(x, weight, padding=padding)


def packed(weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A constant `weight` [O, I, k, k] in the layout of the CPU's convolutions (oneDNN) for images of height x width.

    As torch.compile does with weights that it freezes. F.conv2d would bring it into that layout at every call; and it
    has another algorithm for one small image than for several, so that results would depend on the batch. Where
    PyTorch has no such convolution, `weight` itself.
    """
    able = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    able = able and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    if not able or weight.dtype not in (torch.float32, torch.bfloat16):
        return weight
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    shape = [8, weight.shape[1], height, width]  # the number of images has no influence on the layout
    padding = [weight.shape[-1] // 2] * 2
    result: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), padding, [1, 1], [1, 1], 1, shape
    )
    return result


def add(a: torch.Tensor, b: torch.Tensor, factor: float = 1) -> torch.Tensor:
    """a + factor * b; without gradients, in the memory of `a`."""
    return torch.add(a, b, alpha=factor) if torch.is_grad_enabled() else a.add_(b, alpha=factor)


def clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    """`x` limited to [-limit, limit]; without gradients, in its memory."""
    return F.hardtanh(x, -limit, limit, inplace=not torch.is_grad_enabled())


def scaled_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The magnitude-preserving concatenation along channels, with a share `t` of `b` (Eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    parts = ((a, scale * (1 - t) / math.sqrt(a.shape[1])), (b, scale * t / math.sqrt(b.shape[1])))
    # Equal widths in equal shares, the usual case, need no pass over memory.
    return torch.cat([x if math.isclose(factor, 1, rel_tol=1e-9) else x * factor for x, factor in parts], dim=1)


def pixel_norm(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """`x` with unit magnitude along `dim`, in x's dtype, sums in float32 (Eq. 30)."""
    if not torch.is_grad_enabled():
        return x * (1 / (_magnitude(x, dim) + EPS)).to(x.dtype)
    result: torch.Tensor = _PixelNorm.apply(x, dim)
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
    y = _attend(q, k, v)
    y = y.transpose(1, 2).reshape(n, height, breadth, num_heads * depth)
    return y.permute(0, 3, 1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of [N, h, S, d] each, by the faster of PyTorch's ways."""
    n, heads, positions, depth = q.shape
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or positions > 512 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    # The CPU's fused kernel is the slower one while the table of weights fits its caches.
    q, k, v = (t.reshape(n * heads, positions, depth) for t in (q, k, v))
    weights = torch.bmm(q * depth**-0.5, k.transpose(1, 2)).softmax(dim=2)
    return torch.bmm(weights, v).reshape(n, heads, positions, depth)


def _magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square of `x` along `dim`, which is kept, in float32; channels-last images are read in one pass."""
    if x.ndim == 4 and dim == 1:
        return _magnitude(x.permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) * x.shape[dim] ** -0.5


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
