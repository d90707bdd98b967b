"""The network that training runs: the parameters and the function of `Precond`, with fewer passes over memory.

`Precond` (training/networks_edm2.py) defines the network in the paper's terms, and files store it. Here constant
factors are folded into weights, activations are in channels-last order, norms keep little for the backward pass, and
attention vectors are laid out for the attention kernels. Results differ by rounding only
(tests/training/fast/test_fast_network.py).

Source: Karras et al., arXiv 2312.02696, Figure 21 and Appendix B.

Shape legend: N images, C channels, H x W pixels, E embedding width, L classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from training.fast.ops import (
    add,
    balance,
    clip,
    convolve,
    cosine_attention,
    double,
    effective_weight,
    head_order,
    pixel_norm,
    scaled_cat,
    silu_convolve,
    stacked_weight,
)
from training.networks_edm2 import (
    SILU_MAGNITUDE,
    Block,
    MPConv,
    Precond,
    mp_silu,
    mp_sum,
    preconditioning,
    resample,
    scaled_condition,
)

Layer = Callable[[torch.Tensor], torch.Tensor]


def activation_layout(device: torch.device) -> torch.memory_format:
    """Memory format of activations: channels last, except on Apple's GPUs, whose convolutions would copy them."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """The configuration of a block: everything but its weights (Figure 21)."""

    is_decoder: bool
    resample_mode: str
    resample_filter: tuple[float, ...]
    num_heads: int  # 0 = no attention
    res_keep: float  # factor of the input in the residual sum; the branch's factor is folded into its weight
    attn_keep: float  # likewise for attention
    clip_act: float | None
    dropout: float

    @classmethod
    def of(cls, block: Block) -> "BlockForm":
        """The form of `block`."""
        return cls(
            is_decoder=block.flavor == "dec",
            resample_mode=block.resample_mode,
            resample_filter=tuple(block.resample_filter),
            num_heads=block.num_heads,
            res_keep=balance(block.res_balance)[0],
            attn_keep=balance(block.attn_balance)[0],
            clip_act=block.clip_act,
            dropout=block.dropout,
        )


class BlockWeights(NamedTuple):
    """Kernels [O, I, k, k] of a block as they act on its activations: normalized, with all constant factors."""

    res0: torch.Tensor
    res1: torch.Tensor
    skip: torch.Tensor | None
    qkv: torch.Tensor | None  # rows in the order of `cosine_attention`
    proj: torch.Tensor | None


def block_weights(block: Block, dtype: torch.dtype, layout: torch.memory_format) -> BlockWeights:
    """Compute the weights of `block` as they act on activations of type `dtype`; differentiable.

    Three constant factors cost no pass over activations this way: 1 / 0.596 of SiLU in the convolution after it, the
    residual branch's share in its last convolution, and the share of attention in its projection.
    """
    skip_gain, res_gain = balance(block.res_balance)
    # The decoder's 1x1 convolution leads directly to the residual sum. In the encoder a norm follows it, which would
    # cancel a factor.
    skip_gain = skip_gain if block.flavor == "dec" else 1.0
    skip, qkv, proj = block.conv_skip, block.attn_qkv, block.attn_proj
    return BlockWeights(
        res0=effective_weight(block.conv_res0.weight, 1 / SILU_MAGNITUDE, dtype, layout),
        res1=effective_weight(block.conv_res1.weight, res_gain / SILU_MAGNITUDE, dtype, layout),
        skip=None if skip is None else effective_weight(skip.weight, skip_gain, dtype, layout),
        qkv=None if qkv is None else effective_weight(head_order(qkv.weight, block.num_heads), 1, dtype, layout),
        proj=None if proj is None else effective_weight(proj.weight, balance(block.attn_balance)[1], dtype, layout),
    )


def run_block(
    form: BlockForm, weights: BlockWeights, x: torch.Tensor, scale: torch.Tensor, dropout: float = 0
) -> torch.Tensor:
    """Run the block on `x` [N, C, H, W], with channels modulated by `scale` [N or 1, C'], to [N, C', H', W'].

    `x` is never overwritten; if gradients are off, intermediate results are, to save memory.
    """
    first, *others = form.resample_filter
    if form.resample_mode == "up" and others == [first]:
        x = double(x)
    else:
        x = resample(x, f=form.resample_filter, mode=form.resample_mode)
    if not form.is_decoder:
        if weights.skip is not None:
            x = convolve(x, weights.skip)
        x = pixel_norm(x)

    y = silu_convolve(x, weights.res0)
    y = silu_convolve(y, weights.res1, scale, dropout)
    if form.is_decoder and weights.skip is not None:
        x = add(y, convolve(x, weights.skip))
    else:
        x = add(y, x, form.res_keep)

    if weights.qkv is not None and weights.proj is not None:
        y = convolve(cosine_attention(convolve(x, weights.qkv), form.num_heads), weights.proj)
        x = add(y, x, form.attn_keep)
    return x if form.clip_act is None else clip(x, form.clip_act)


def run_unet(
    x: torch.Tensor,
    stem: torch.Tensor,
    enc: Sequence[Layer],
    dec: Sequence[Layer],
    out: torch.Tensor,
    *,
    takes_skip: Sequence[bool],
    concat_balance: float,
    cond_images: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the raw network (Figure 21) on `x` [N, C, H, W], in x's dtype.

    `stem` and `out` are the weights of the first and last convolution, `enc` and `dec` the blocks as functions of x.
    `takes_skip` marks the decoder's blocks that take an encoder output. `cond_images` are further input channels at
    unit magnitude.
    """
    x = torch.cat([x, torch.ones_like(x[:, :1]), *([] if cond_images is None else [cond_images])], dim=1)
    x = convolve(x.contiguous(memory_format=activation_layout(x.device)), stem)
    skips = [x]
    for layer in enc:
        x = layer(x)
        skips.append(x)
    for layer, takes in zip(dec, takes_skip, strict=True):
        x = layer(scaled_cat(x, skips.pop(), concat_balance) if takes else x)
    return convolve(x, out)


class FastBlock(nn.Module):
    """One block of the U-Net (Figure 21) on the parameters of `block`.

    Each call normalizes the block's convolutions, so that only one block's normalized weights are in memory at a time.
    The caller applies its embedding layer.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.block = block
        self.form = BlockForm.of(block)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Map `x` [N, C, H, W] and the channels' `scale` [N, C'], of x's dtype, to [N, C', H', W']."""
        weights = block_weights(self.block, x.dtype, activation_layout(x.device))
        return run_block(self.form, weights, x, scale, self.form.dropout if self.training else 0)


class FastPrecond(nn.Module):
    """A replacement for `net` that shares its parameters and is called like it.

    `dtype` is the type of the U-Net's activations and of the weights that act on them; everything else is float32.
    Unlike a forward pass of `net`, one in training mode does not change the stored weights: the caller normalizes them
    once per step (`normalize_weights`). With `recompute`, the backward pass computes a block's inner activations again
    instead of keeping them.
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
        self.takes_skip = unet.takes_skip()

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
        cond_images: torch.Tensor | None = None,
    ) -> Any:
        """Denoise like `Precond.forward`: [N, C, H, W] in float32, with `return_logvar` a pair with u(sigma)."""
        net = self.net
        x = x.to(torch.float32)
        c_skip, c_out, c_in, c_noise = preconditioning(sigma.to(torch.float32), net.sigma_data)
        if net.cond_channels:
            cond_images = scaled_condition(cond_images, net.cond_channels, net.sigma_data).to(self.dtype)
        else:
            cond_images = None
        emb = self._embedding(c_noise, self._labels(class_labels, x.device))
        raw = self._unet((c_in * x).to(self.dtype), emb, cond_images)
        denoised = c_skip * x + c_out * raw.to(torch.float32)
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
        """Embedding [N or 1, E] of noise level and class, in float32."""
        unet = self.net.unet
        emb = fully_connect(unet.emb_fourier(c_noise), unet.emb_noise)
        if unet.emb_label is not None:
            assert labels is not None
            emb = mp_sum(emb, fully_connect(labels, unet.emb_label, math.sqrt(labels.shape[1])), t=unet.label_balance)
        return mp_silu(emb)

    def _unet(self, x: torch.Tensor, emb: torch.Tensor, cond_images: torch.Tensor | None) -> torch.Tensor:
        unet = self.net.unet
        layout = activation_layout(x.device)
        fast = [*self.enc, *self.dec]
        layers = [
            partial(self._run, block, scale=scale)
            for block, scale in zip(fast, self._scales(emb, x.dtype), strict=True)
        ]
        return run_unet(
            x,
            effective_weight(self.stem.weight, 1, x.dtype, layout),
            layers[: len(self.enc)],
            layers[len(self.enc) :],
            effective_weight(unet.out_conv.weight, unet.out_gain, x.dtype, layout),
            takes_skip=self.takes_skip,
            concat_balance=unet.concat_balance,
            cond_images=cond_images,
        )

    def _scales(self, emb: torch.Tensor, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Map `emb` [N, E] to the modulations [N, C'] of every block, with one product for all blocks."""
        blocks = [fast.get_submodule("block") for fast in (*self.enc, *self.dec)]
        weights = [block.get_submodule("emb_linear").get_parameter("weight") for block in blocks]
        scales = F.linear(emb, stacked_weight(weights, [block.get_parameter("emb_gain") for block in blocks])) + 1
        return scales.to(dtype).split([len(weight) for weight in weights], dim=1)

    def _run(self, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.recompute and self.training:
            result: torch.Tensor = torch.utils.checkpoint.checkpoint(block, x, scale, use_reentrant=False)
            return result
        return block(x, scale)


def fully_connect(x: torch.Tensor, layer: MPConv, gain: float | torch.Tensor = 1) -> torch.Tensor:
    """Apply the normalized weight of a fully connected `layer` times `gain` to `x` [N, C], in x's dtype."""
    return F.linear(x, effective_weight(layer.weight, gain, x.dtype, torch.contiguous_format))
