"""The magnitude-preserving U-Net of EDM2 (config G) and its preconditioning.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696; equation
and figure numbers are that paper's. Magnitude means root mean square over elements. Every layer is built so that
inputs of unit magnitude give outputs of unit magnitude.

This file defines the network; it is not what usually runs. Training computes the same function on these parameters by
training/fast/training_network.py, sampling by training/fast/inference_network.py. tests/training/fast holds both equal
to this network, and tests/training/test_networks_edm2.py holds it to the published numbers.

Shape legend: N images, C channels, H x W pixels, E embedding width, L classes, h attention heads.

Snapshots of the published layout carry this text, and the published reader executes it. It therefore imports only the
standard library, torch and torch_utils.persistence. The names of parameters and submodules are the file format. Their
order of construction is the order in which the initialization draws its random numbers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils import persistence

EPS = 1e-4  # added to every norm before division (Eq. 47)
SILU_MAGNITUDE = 0.596  # of SiLU's output for normally distributed input (Eq. 81)


def normalize(x: torch.Tensor, dim: int | Sequence[int] | None = None, eps: float = EPS) -> torch.Tensor:
    """Scale `x` to unit magnitude along `dim` (default: all but the first), in x's dtype (Eq. 47)."""
    dims = list(range(1, x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    # The square root of a float32 sum, because torch.linalg.vector_norm is many times slower on a CPU unless the
    # dimension is innermost. The root's gradient at zero would be 0 * inf, so zeros are replaced by 1 and masked.
    square_sum = x.to(torch.float32).square().sum(dim=dims, keepdim=True)
    norm = torch.where(square_sum > 0, square_sum, 1).sqrt() * (square_sum > 0)
    magnitude = norm * math.sqrt(norm.numel() / max(x.numel(), 1))
    return x / (magnitude + eps).to(x.dtype)


def resample(x: torch.Tensor, f: Sequence[float] = (1, 1), mode: str = "keep") -> torch.Tensor:
    """Double ('up') or halve ('down') the sides of `x` [N, C, H, W] with the separable filter `f` of even length.

    'keep' returns `x` unchanged.
    """
    if mode == "keep":
        return x
    if mode not in ("up", "down"):
        raise ValueError(f"mode={mode!r} is unknown; use 'keep', 'up' or 'down'")
    if len(f) % 2:
        raise ValueError(f"the filter has {len(f)} taps; an even number is needed")
    if len(f) == 2 and f[0] == f[1]:  # the default filter is a plain average
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
    taps = torch.tensor(f, dtype=torch.float32, device=x.device)
    taps = torch.outer(taps, taps) / taps.sum().square()
    channels, pad = x.shape[1], (len(f) - 1) // 2
    kernel = taps.to(x.dtype).expand(channels, 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=channels)
    return F.conv_transpose2d(x, kernel * 4, stride=2, padding=pad, groups=channels)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU scaled to keep the magnitude of normally distributed input (Eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Blend `a` and `b` with weights 1-t and t, keeping the magnitude if they are independent (Eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int = 1, t: float = 0.5) -> torch.Tensor:
    """Concatenate `a` and `b` so that they contribute in proportion 1-t to t at any widths (Eq. 103)."""
    width_a, width_b = a.shape[dim], b.shape[dim]
    scale = math.sqrt((width_a + width_b) / ((1 - t) ** 2 + t**2))
    weight_a = scale / math.sqrt(width_a) * (1 - t)
    weight_b = scale / math.sqrt(width_b) * t
    return torch.cat([a * weight_a, b * weight_b], dim=dim)


def scaled_condition(cond_images: torch.Tensor | None, cond_channels: int, sigma_data: float) -> torch.Tensor:
    """Scale conditioning images [N, cond_channels, H, W] from magnitude sigma_data to unit magnitude, in float32.

    The factor is that of noisy images without noise, c_in(0) = 1 / sigma_data. All input channels of the first
    convolution then have unit magnitude, and so has its output (Eq. 47). Raises ValueError if the images are missing
    or have another number of channels.
    """
    if cond_images is None or cond_images.ndim != 4 or cond_images.shape[1] != cond_channels:
        given = "got None" if cond_images is None else f"got the shape {list(cond_images.shape)}"
        raise ValueError(f"the network needs cond_images [N, {cond_channels}, H, W]; {given}")
    return cond_images.to(torch.float32) / sigma_data


def preconditioning(
    sigma: torch.Tensor, sigma_data: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_skip, c_out and c_in [N, 1, 1, 1] and c_noise [N] for N noise levels (Eq. 7 and Table 1, arXiv 2206.00364).

    The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), with the raw network F.
    """
    sigma = sigma.reshape(-1, 1, 1, 1)
    total = (sigma.square() + sigma_data**2).sqrt()
    # In this order, since another rounding of c_out would change the bits of runs that are continued.
    return (sigma_data / total).square(), sigma * (sigma_data / total), 1 / total, sigma.flatten().log() / 4


def image_size(net: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that `net` denoises; its img_resolution is a side or such a pair."""
    size = net.img_resolution
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@persistence.persistent_class
class MPFourier(nn.Module):
    """Random Fourier features of scalars: [N] to [N, num_channels] (Eq. 75)."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int, bandwidth: float = 1) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [N] to features [N, num_channels] in x's dtype; computed in float32."""
        angles = x.to(torch.float32).outer(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


@persistence.persistent_class
class MPConv(nn.Module):
    """Convolution, or with `kernel=[]` a fully connected layer, with forced weight normalization (Eq. 47, 66).

    Every training-mode forward pass normalizes the stored weight, so that the learning rate alone sets the size of the
    optimizer's steps relative to the weights. The weight that acts on the input is normalized again, inside autograd.
    In a training run `normalize_weights` (training/run/update.py) does the first, and `effective_weight`
    (training/fast/ops.py) the second. In sampling `effective_weight` prepares each weight once.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: float | torch.Tensor = 1) -> torch.Tensor:
        """Map `x` [N, C, H, W] ([N, C] if fully connected) to the same shape with `out_channels`, times `gain`."""
        if self.training:
            # Through `.data`: torch.compile's default backend silently drops the same copy under no_grad, and the
            # gradients come out wrong (tests/torch_utils/test_compile.py).
            self.weight.data.copy_(normalize(self.weight.detach().to(torch.float32)))
        weight = normalize(self.weight.to(torch.float32))
        weight = weight * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return x @ weight.t()
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@persistence.persistent_class
class Block(nn.Module):
    """One residual block of the encoder or the decoder, with optional resampling and self-attention (Figure 21).

    `attention` has `out_channels // channels_per_head` heads; with 0 heads there is no attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        if flavor not in ("enc", "dec"):
            raise ValueError(f"flavor={flavor!r} is unknown; use 'enc' or 'dec'")
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample_filter = list(resample_filter)
        self.resample_mode = resample_mode
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f"{out_channels} channels do not divide over {self.num_heads} attention heads")
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

    @property
    def in_channels(self) -> int:
        """Channels of the input. Only blocks that change the number of channels have a `conv_skip`."""
        return self.out_channels if self.conv_skip is None else self.conv_skip.weight.shape[1]

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map `x` [N, C, H, W] and `emb` [N, E] to [N, out_channels, H', W']."""
        x = resample(x, f=self.resample_filter, mode=self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = F.dropout(y, p=self.dropout)
        y = self.conv_res1(y)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), t=self.attn_balance)
        if self.clip_act is not None:
            x = x.clip(-self.clip_act, self.clip_act)
        return x

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Self-attention over all pixels, with unit-magnitude vectors: [N, 3C, H, W] to [N, C, H, W]."""
        n, _, height, width = qkv.shape
        qkv = qkv.reshape(n, self.num_heads, -1, 3, height * width)  # [N, h, C/h, 3, HW]
        q, k, v = (t.transpose(2, 3) for t in normalize(qkv, dim=2).unbind(3))  # [N, h, HW, C/h]
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(2, 3).reshape(n, -1, height, width)


@persistence.persistent_class
class UNet(nn.Module):
    """The raw network F: noisy images, noise labels and class labels to an update of the images' shape (Figure 21).

    `img_resolution` is the side of square images in pixels, or a pair (height, width). Attention acts on the levels
    whose longer side is in `attn_resolutions`. With `cond_channels` the input includes a conditioning image of that
    many channels, after the noisy image and the constant channel. Further arguments go to every Block.
    """

    cond_channels = 0  # a class attribute, for stored networks that predate conditioning images

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        cond_channels: int = 0,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        height, width = (img_resolution, img_resolution) if isinstance(img_resolution, int) else img_resolution
        self.side_divisor = 2 ** (len(channel_mult) - 1)
        self._check_sides(height, width)
        if cond_channels < 0:
            raise ValueError(f"cond_channels={cond_channels} must be 0 or more")
        if cond_channels:
            self.cond_channels = cond_channels
        cblock = [model_channels * mult for mult in channel_mult]
        cnoise = model_channels * channel_mult_noise if channel_mult_noise is not None else cblock[0]
        cemb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(cblock)
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, kernel=[])
        self.emb_label = MPConv(label_dim, cemb, kernel=[]) if label_dim else None

        levels = [(f"{height >> i}x{width >> i}", max(height, width) >> i, c) for i, c in enumerate(cblock)]
        skips: list[int] = []
        self.enc = nn.ModuleDict()
        cout = img_channels + 1 + cond_channels
        for level, (name, side, channels) in enumerate(levels):
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(cout, channels, kernel=[3, 3])
                cout = channels
            else:
                self.enc[f"{name}_down"] = Block(cout, cout, cemb, flavor="enc", resample_mode="down", **block_kwargs)
            skips.append(cout)
            for index in range(num_blocks):
                attention = side in attn_resolutions
                block = Block(cout, channels, cemb, flavor="enc", attention=attention, **block_kwargs)
                self.enc[f"{name}_block{index}"] = block
                cout = channels
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, (name, side, channels) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = Block(cout, cout, cemb, flavor="dec", attention=True, **block_kwargs)
                self.dec[f"{name}_in1"] = Block(cout, cout, cemb, flavor="dec", **block_kwargs)
            else:
                self.dec[f"{name}_up"] = Block(cout, cout, cemb, flavor="dec", resample_mode="up", **block_kwargs)
            for index in range(num_blocks + 1):
                attention = side in attn_resolutions
                cin = cout + skips.pop()
                block = Block(cin, channels, cemb, flavor="dec", attention=attention, **block_kwargs)
                self.dec[f"{name}_block{index}"] = block
                cout = channels
        self.out_conv = MPConv(cout, img_channels, kernel=[3, 3])

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        cond_images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map `x` [N, C, H, W], `noise_labels` [N or 1] and `class_labels` [N, L] (if conditional) to [N, C, H, W].

        `x` and `cond_images` [N, cond_channels, H, W] have unit magnitude. Raises ValueError unless H and W are
        divisible by 2^(levels-1).
        """
        self._check_sides(x.shape[-2], x.shape[-1])
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            assert class_labels is not None
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), t=self.label_balance)
        emb = mp_silu(emb)

        inputs = [x, torch.ones_like(x[:, :1])]
        if self.cond_channels:
            assert cond_images is not None
            inputs.append(cond_images.to(x.dtype))
        x = torch.cat(inputs, dim=1)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        for block, takes_skip in zip(self.dec.values(), self.takes_skip(), strict=True):
            if takes_skip:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)

    def takes_skip(self) -> list[bool]:
        """For each decoder block, True if its input includes an encoder output: it is wider than the output before."""
        blocks: list[Any] = [*self.enc.values(), *self.dec.values()]
        return [blocks[i].in_channels > blocks[i - 1].out_channels for i in range(len(self.enc), len(blocks))]

    def _check_sides(self, height: int, width: int) -> None:
        if height % self.side_divisor or width % self.side_divisor:
            raise ValueError(
                f"images of {height}x{width} pixels do not fit a network with {self.side_divisor.bit_length()} levels:"
                f" each side must be divisible by {self.side_divisor}"
            )


@persistence.persistent_class
class Precond(nn.Module):
    """The denoiser D(x; sigma), which is the preconditioned raw network, and the uncertainty u(sigma).

    With `use_fp16` the raw network computes in float16 on CUDA devices, and in float32 elsewhere. With `cond_channels`
    it takes a conditioning image of that many channels, without noise and in the units of the noisy image.
    """

    cond_channels = 0  # a class attribute, for stored networks that predate conditioning images

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        cond_channels: int = 0,
        **unet_kwargs: Any,
    ) -> None:
        super().__init__()
        if cond_channels:
            self.cond_channels = cond_channels
            unet_kwargs["cond_channels"] = cond_channels
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        cond_images: torch.Tensor | None = None,
    ) -> Any:
        """Denoise images `x` [N, C, H, W] of noise level `sigma`, one number or N of them; the result is float32.

        `class_labels` [N, L] default to zeros in a conditional network and are ignored by an unconditional one.
        `cond_images` [N, cond_channels, H, W] are in the units of `x`, of magnitude sigma_data. A network without
        conditioning ignores them; one with it raises ValueError if they are missing. `return_logvar` returns a pair
        with u(sigma) [N or 1, 1, 1, 1] (Eq. 21).
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        dtype = torch.float16 if self.use_fp16 and not force_fp32 and x.device.type == "cuda" else torch.float32

        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        if self.cond_channels:
            scaled = scaled_condition(cond_images, self.cond_channels, self.sigma_data)
            raw = self.unet((c_in * x).to(dtype), c_noise, class_labels, scaled)
        else:
            raw = self.unet((c_in * x).to(dtype), c_noise, class_labels)
        denoised = c_skip * x + c_out * raw.to(torch.float32)
        if return_logvar:
            logvar = self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
            return denoised, logvar
        return denoised
