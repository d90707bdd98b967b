"""The network once more, arranged for speed: the same parameters, the same function, other passes over memory.

`Precond` (training/networks_edm2.py) says what is computed, in the paper's terms, and is what files hold. This is what
training runs: constant factors are folded into weights, activations lie in channels-last order, the norms keep little
for the backward pass, and attention vectors lie as the attention kernels want them. Differences are rounding alone
(tests/test_fast_network.py).

Source: Karras et al., arXiv 2312.02696, Figure 21 and Appendix B.

Shape legend: N images, C channels, H x W pixels, E embedding width, L classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from training.fast_ops import SILU_MAGNITUDE, cosine_attention, effective_weight, head_order, pixel_norm
from training.networks_edm2 import Block, MPConv, Precond, mp_silu, mp_sum, resample
from training.silu_conv import silu_convolve


def activation_layout(device: torch.device) -> torch.memory_format:
    """How activations lie in memory: channels last, but for Apple's GPUs, whose convolutions would copy them."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class FastBlock(nn.Module):
    """One block of the U-Net (Figure 21) on the parameters of `block`.

    A weight is normalized by its own layer's call, so that a block is all that must be in memory at once.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.block = block

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """`x` [N, C, H, W] and `emb` [N, E] to [N, C', H', W']."""
        block = self.block
        x = resample(x, f=block.resample_filter, mode=block.resample_mode)
        if block.flavor == "enc":
            if block.conv_skip is not None:
                x = convolve(x, block.conv_skip)
            x = pixel_norm(x)

        keep, add = balance(block.res_balance)
        y = silu_convolve(x, effective(block.conv_res0, x, 1 / SILU_MAGNITUDE))
        scale = fully_connect(emb, block.emb_linear, block.emb_gain) + 1
        weight = effective(block.conv_res1, x, add / SILU_MAGNITUDE)
        y = silu_convolve(y, weight, scale.to(y.dtype), block.dropout if self.training else 0)
        if block.flavor == "dec" and block.conv_skip is not None:
            x = convolve(x, block.conv_skip, keep) + y
        else:
            x = torch.add(y, x, alpha=keep)

        if block.attn_qkv is not None and block.attn_proj is not None:
            keep, add = balance(block.attn_balance)
            qkv = convolve(x, block.attn_qkv, num_heads=block.num_heads)
            y = convolve(cosine_attention(qkv, block.num_heads), block.attn_proj, add)
            x = torch.add(y, x, alpha=keep)
        return x if block.clip_act is None else F.hardtanh(x, -block.clip_act, block.clip_act)


class FastPrecond(nn.Module):
    """Stands for `net`, sharing its parameters; called like it.

    `dtype` is that of the U-Net's activations and of the weights that act on them; everything around it is float32.
    Training mode leaves the stored weights alone: the caller normalizes them once a step (`normalize_weights`), where
    a forward pass of `net` does so itself. With `recompute`, a block's inner activations are not kept for the backward
    pass but computed again there.
    """

    def __init__(self, net: Precond, *, dtype: torch.dtype = torch.float32, recompute: bool = False) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype
        self.recompute = recompute
        unet = net.unet
        stem, *enc = unet.enc.values()
        assert isinstance(stem, MPConv)
        self.stem = stem
        self.enc = nn.ModuleList(FastBlock(block) for block in enc)
        self.dec = nn.ModuleList(FastBlock(block) for block in unet.dec.values())
        self.takes_skip = ["block" in name for name in unet.dec]

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
    ) -> Any:
        """As `Precond.forward`: denoised images [N, C, H, W] in float32, with `return_logvar` a pair with u(sigma)."""
        net = self.net
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        total = (sigma.square() + net.sigma_data**2).sqrt()
        c_noise = sigma.flatten().log() / 4
        raw = self._unet((x / total).to(self.dtype), self._embedding(c_noise, self._labels(class_labels, x.device)))
        denoised = (net.sigma_data / total).square() * x + sigma * (net.sigma_data / total) * raw.to(torch.float32)
        if not return_logvar:
            return denoised
        logvar = fully_connect(net.logvar_fourier(c_noise), net.logvar_linear)
        return denoised, logvar.reshape(-1, 1, 1, 1)

    def _labels(self, class_labels: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        if self.net.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros([1, self.net.label_dim], device=device)
        return class_labels.to(torch.float32).reshape(-1, self.net.label_dim)

    def _embedding(self, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The embedding [N or 1, E] of noise level and class, in float32."""
        unet = self.net.unet
        emb = fully_connect(unet.emb_fourier(c_noise), unet.emb_noise)
        if unet.emb_label is not None:
            assert labels is not None
            emb = mp_sum(emb, fully_connect(labels, unet.emb_label, math.sqrt(labels.shape[1])), t=unet.label_balance)
        return mp_silu(emb)

    def _unet(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        unet = self.net.unet
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = convolve(x.contiguous(memory_format=activation_layout(x.device)), self.stem)
        skips = [x]
        for block in self.enc:
            x = self._run(block, x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.dec, self.takes_skip, strict=True):
            if takes_skip:
                x = scaled_cat(x, skips.pop(), unet.concat_balance)
            x = self._run(block, x, emb)
        return convolve(x, unet.out_conv, unet.out_gain)

    def _run(self, block: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.recompute and self.training:
            result: torch.Tensor = torch.utils.checkpoint.checkpoint(block, x, emb, use_reentrant=False)
            return result
        return block(x, emb)


def balance(t: float) -> tuple[float, float]:
    """The factors of a and b in the magnitude-preserving sum with a share `t` of b (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def scaled_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The magnitude-preserving concatenation along channels (Eq. 103)."""
    total = a.shape[1] + b.shape[1]
    keep, add = balance(t)
    return torch.cat([a * (keep * math.sqrt(total / a.shape[1])), b * (add * math.sqrt(total / b.shape[1]))], dim=1)


def convolve(
    x: torch.Tensor, layer: MPConv, gain: float | torch.Tensor = 1, *, num_heads: int | None = None
) -> torch.Tensor:
    """`x` [N, C, H, W] through the normalized weight of `layer` times `gain`; `num_heads` reorders for attention."""
    weight = layer.weight if num_heads is None else head_order(layer.weight, num_heads)
    weight = effective_weight(weight, gain, x.dtype, activation_layout(x.device))
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def effective(layer: MPConv, x: torch.Tensor, gain: float | torch.Tensor = 1) -> torch.Tensor:
    """The weight of `layer` that acts on `x`."""
    return effective_weight(layer.weight, gain, x.dtype, activation_layout(x.device))


def fully_connect(x: torch.Tensor, layer: MPConv, gain: float | torch.Tensor = 1) -> torch.Tensor:
    """`x` [N, C] through the normalized weight of a fully connected `layer` times `gain`, in x's dtype."""
    return F.linear(x, effective_weight(layer.weight, gain, x.dtype, torch.contiguous_format))
