"""A convolution of activations by SiLU that keeps only what went in: in the backward pass, SiLU is computed again.

Plainly written, both the input and the output of SiLU stay in memory for the backward pass, and with a modulation or
dropout in between a third tensor. These are most of what a U-Net of this kind keeps.

Shape legend: N images, I and O channels, H x W pixels, k the side of a kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F

from training.fast.ops import convolve


def silu_convolve(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, dropout: float = 0
) -> torch.Tensor:
    """SiLU of `x` [N, I, H, W], first multiplied by `scale` [N or 1, I] where there is one, then with elements dropped
    at the probability `dropout`, through `weight` [O, I, k, k], k odd: [N, O, H, W]. Without gradients, the weight may
    be a packed one.
    """
    scale = None if scale is None else scale[:, :, None, None]
    if not torch.is_grad_enabled():
        y = F.silu(x if scale is None else x * scale, inplace=scale is not None)
        return convolve(F.dropout(y, dropout) if dropout else y, weight)
    # Asked here, since Dynamo of PyTorch 2.6 doesn't let a backward pass ask.
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    result: torch.Tensor = _SiluConv.apply(x, weight, scale, dropout, nhwc)
    return result


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
        # In the layout of the activations: with a gradient in another one, the convolutions would copy.
        grad = grad.contiguous(memory_format=torch.channels_last if ctx.nhwc else torch.contiguous_format)
        wanted = [True, True, False]
        grad_y, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, y, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, wanted
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
