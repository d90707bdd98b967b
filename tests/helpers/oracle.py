"""The papers' equations computed the plain way: the reference for numbers and for speed.

Written from arXiv 2312.02696 ("EDM2") and 2206.00364 (the sampler) without a glance at `training/`, of which it imports
nothing: float32, eager, one tensor at a time, no fast path, attention by einsum, weights normalised in every forward.
The state dictionary has the published names, so that weights move between this and `training.networks_edm2`.
`tests/training/test_oracle.py` holds it against numbers of the published implementation.

N images, C channels, H x W pixels, E embedding width, h heads, d channels per head, S = H * W positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize(x: Tensor, dim: Sequence[int] | int | None = None, eps: float = 1e-4) -> Tensor:
    """x divided by (eps + its root mean square over `dim`); `dim` defaults to all but the first (Eq. 47)."""
    dims = list(range(1, x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (eps + norm / math.sqrt(count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Magnitude-preserving SiLU (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Magnitude-preserving sum, `t` of it from b (Eq. 88)."""
    return (a + t * (b - a)) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Magnitude-preserving concatenation along channels (Eq. 103)."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(num_a)), b * (scale * t / math.sqrt(num_b))], dim=1)


def resample(x: Tensor, mode: str, taps: Sequence[float] = (1, 1)) -> Tensor:
    """Halve ('down') or double ('up') the sides with a separable filter, by a depthwise convolution; or 'keep' them."""
    if mode == "keep":
        return x
    line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    kernel = torch.outer(line, line).to(x).expand(x.shape[1], 1, len(taps), len(taps))
    padding = (len(taps) - 1) // 2
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    assert mode == "up", mode
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


class PlainFourier(nn.Module):
    """Random Fourier features of a scalar per image: [N] -> [N, C] (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int, bandwidth: float = 1) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(x.to(torch.float32), self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return math.sqrt(2) * torch.cos(angle).to(x.dtype)


class PlainConv(nn.Module):
    """Convolution (kernel (3, 3) or (1, 1)) or fully connected layer (kernel ()) with forced weight normalisation.

    A forward in training mode first replaces the stored weight by its normalised self (Eq. 47, 66).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
        fan_in = self.weight[0].numel()
        w = (normalize(self.weight.to(torch.float32)) * (gain / math.sqrt(fan_in))).to(x.dtype)
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


@dataclass(frozen=True, kw_only=True)
class PlainBlockConfig:
    """What all blocks of a network share (Figure 21)."""

    resample_filter: Sequence[float] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256


class PlainBlock(nn.Module):
    """One block of the encoder or the decoder (Figure 21): [N, C, H, W] and [N, E] -> [N, C', H', W']."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str,
        resample_mode: str,
        attention: bool,
        config: PlainBlockConfig,
    ) -> None:
        super().__init__()
        self.flavor, self.resample_mode, self.config = flavor, resample_mode, config
        self.num_heads = out_channels // config.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = PlainConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = PlainConv(emb_channels, out_channels)
        self.conv_res1 = PlainConv(out_channels, out_channels, (3, 3))
        self.conv_skip = PlainConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = PlainConv(out_channels, out_channels * 3, (1, 1)) if attention else None
        self.attn_proj = PlainConv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_mode, self.config.resample_filter)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.config.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.config.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_proj(attention(self.attn_qkv(x), self.num_heads))
            x = mp_sum(x, y, self.config.attn_balance)
        return x if self.config.clip_act is None else x.clamp(-self.config.clip_act, self.config.clip_act)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Cosine attention over positions, from channels ordered (head, channel, q/k/v): [N, 3C, H, W] -> [N, C, H, W]."""
    num, channels, height, width = qkv.shape
    split = normalize(qkv.reshape(num, num_heads, channels // (3 * num_heads), 3, height * width), dim=2)
    q, k, v = split.unbind(dim=3)  # [N, h, d, S] each
    weights = torch.einsum("nhdq,nhdk->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("nhqk,nhdk->nhdq", weights, v).reshape(num, channels // 3, height, width)


class PlainUNet(nn.Module):
    """The U-Net of configuration G: [N, C, H, W], c_noise [N] and labels [N, label_dim] -> [N, C, H, W]."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_noise: float | None = None,
        channel_mult_emb: float | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        cond_channels: int = 0,
        **block_options: Any,
    ) -> None:
        super().__init__()
        widths = [int(model_channels * mult) for mult in channel_mult]
        noise_width = widths[0] if channel_mult_noise is None else int(model_channels * channel_mult_noise)
        emb_width = max(widths) if channel_mult_emb is None else int(model_channels * channel_mult_emb)
        config = PlainBlockConfig(**block_options)
        self.label_balance, self.concat_balance = label_balance, concat_balance

        def block(flavor: str, before: int, after: int, mode: str = "keep", attend: bool = False) -> PlainBlock:
            return PlainBlock(before, after, emb_width, flavor, mode, attend, config)

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = PlainFourier(noise_width)
        self.emb_noise = PlainConv(noise_width, emb_width)
        self.emb_label = PlainConv(label_dim, emb_width) if label_dim else None

        self.enc = nn.ModuleDict()
        skips = []
        width = img_channels + 1 + cond_channels
        for level, after in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = PlainConv(width, after, (3, 3))
                width = after
            else:
                self.enc[f"{res}x{res}_down"] = block("enc", width, width, "down")
            skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block("enc", width, after, attend=res in attn_resolutions)
                width = after
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, after in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block("dec", width, width, attend=True)
                self.dec[f"{res}x{res}_in1"] = block("dec", width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block("dec", width, width, "up")
            for index in range(num_blocks + 1):
                attend = res in attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = block("dec", width + skips.pop(), after, attend=attend)
                width = after
        self.out_conv = PlainConv(width, img_channels, (3, 3))

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, cond: Tensor | None = None
    ) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            assert class_labels is not None
            labels = self.emb_label(class_labels * math.sqrt(class_labels.shape[1]))
            emb = mp_sum(emb, labels, self.label_balance)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x if cond is None else torch.cat([x, cond.to(x.dtype)], dim=1)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = layer(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class PlainPrecond(nn.Module):
    """The denoiser D(x; sigma) around the U-Net, and its log variance u(sigma) (Eq. 21), in float32.

    `dtype` is the U-Net's: float16 is how the published networks were trained.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        dtype: torch.dtype = torch.float32,
        **unet_options: Any,
    ) -> None:
        super().__init__()
        self.label_dim, self.sigma_data, self.dtype = label_dim, sigma_data, dtype
        self.unet = PlainUNet(img_resolution, img_channels, label_dim, **unet_options)
        self.logvar_fourier = PlainFourier(logvar_channels)
        self.logvar_linear = PlainConv(logvar_channels, 1)

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        """The denoised images for x [N, C, H, W], sigma [N] or one number, labels [N, label_dim] or None."""
        return self.with_logvar(x, sigma, class_labels, cond)[0]

    def with_logvar(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The denoised images and u(sigma), [N, 1, 1, 1]; `cond`: a second image to see, of std sigma_data."""
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            labels = torch.zeros(1, self.label_dim, device=x.device) if class_labels is None else class_labels
            labels = labels.to(torch.float32).reshape(-1, self.label_dim)
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.flatten().log() / 4
        raw = self.unet((c_in * x).to(self.dtype), c_noise, labels, None if cond is None else cond / self.sigma_data)
        denoised = c_skip * x + c_out * raw.to(torch.float32)
        return denoised, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)


def plain_loss(
    net: PlainPrecond,
    images: Tensor,
    labels: Tensor | None,
    sigma_draw: Tensor,
    noise_draw: Tensor,
    P_mean: float = -0.4,
    P_std: float = 1.0,
) -> Tensor:
    """Loss per element, like `images`, of standard normal draws [N, 1, 1, 1] and [N, C, H, W] (Eq. 14, 15, 21)."""
    sigma = torch.exp(P_mean + P_std * sigma_draw)
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    denoised, logvar = net.with_logvar(images + sigma * noise_draw, sigma, labels)
    return weight / logvar.exp() * (denoised - images) ** 2 + logvar


def plain_learning_rate(
    nimg: int, batch_size: int, ref_lr: float = 0.01, ref_batches: float = 70e3, rampup_Mimg: float = 10
) -> float:
    """Learning rate of the iteration that starts after `nimg` images: inverse square root decay, linear ramp-up."""
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(nimg / (ref_batches * batch_size), 1))
    if rampup_Mimg > 0:
        lr *= min(nimg / (rampup_Mimg * 1e6), 1)
    return lr


class PlainAdam:
    """Adam, one tensor at a time; gradient elements that are not finite count as zero."""

    def __init__(self, net: nn.Module, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8) -> None:
        self.params = list(net.parameters())
        self.betas, self.eps, self.num_steps = betas, eps, 0
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients that the parameters hold, and drop them."""
        self.num_steps += 1
        beta1, beta2 = self.betas
        for param, mean, square in zip(self.params, self.mean, self.square, strict=True):
            assert param.grad is not None
            grad = torch.where(param.grad.isfinite(), param.grad, 0)
            mean.mul_(beta1).add_(grad * (1 - beta1))
            square.mul_(beta2).add_(grad**2 * (1 - beta2))
            mean_hat = mean / (1 - beta1**self.num_steps)
            square_hat = square / (1 - beta2**self.num_steps)
            param.sub_(lr * mean_hat / (square_hat.sqrt() + self.eps))
            param.grad = None


def plain_exponent(std: float) -> float:
    """The exponent whose power-function profile has the relative width `std` (Eq. 126)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(roots[np.abs(roots.imag) < 1e-9].real))


class PlainEMA:
    """Power-function averages of the parameters, one tensor at a time (Section 3.1, Eq. 127)."""

    def __init__(self, net: nn.Module, stds: Sequence[float] = (0.050, 0.100)) -> None:
        self.net, self.stds = net, tuple(stds)
        self.averages = {std: {name: p.detach().clone() for name, p in net.named_parameters()} for std in stds}

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Take in the network as it is after `nimg` images, the last `batch_size` of them new."""
        for std, average in self.averages.items():
            beta = (1 - batch_size / nimg) ** (plain_exponent(std) + 1)
            for name, param in self.net.named_parameters():
                average[name] = beta * average[name] + (1 - beta) * param


@dataclass
class PlainTrainer:
    """A training run without anything around it: loss, gradients, Adam, averages."""

    net: PlainPrecond
    batch_size: int
    lr_options: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)
    nimg: int = 0

    def __post_init__(self) -> None:
        self.net.train()
        self.adam = PlainAdam(self.net, self.betas)
        self.ema = PlainEMA(self.net)

    def step(self, images: Tensor, labels: Tensor | None, sigma_draw: Tensor, noise_draw: Tensor) -> float:
        """One iteration; the mean over elements of its loss."""
        loss = plain_loss(self.net, images, labels, sigma_draw, noise_draw)
        (loss.sum() / self.batch_size).backward()
        self.adam.step(plain_learning_rate(self.nimg, self.batch_size, **self.lr_options))
        self.nimg += self.batch_size
        self.ema.update(self.nimg, self.batch_size)
        return float(loss.detach().mean())


Denoiser = Callable[[Tensor, Tensor], Tensor]


def plain_guided(
    net: Callable[..., Tensor], guide: Callable[..., Tensor] | None, labels: Tensor | None, guidance: float
) -> Denoiser:
    """The denoiser lerp(guide, net, guidance) for given labels (arXiv 2406.02507, Eq. 3)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        main = net(x, sigma, labels)
        if guide is None:
            return main
        other = guide(x, sigma, labels)
        return other + guidance * (main - other)

    return denoise


@torch.no_grad()
def plain_heun_sampler(
    denoise: Denoiser,
    noise: Tensor,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Images [N, C, H, W] from standard normal `noise`, by Algorithm 2 of arXiv 2206.00364; num_steps >= 2."""
    index = torch.arange(num_steps, dtype=torch.float32, device=noise.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    times = torch.cat([(high + index / (num_steps - 1) * (low - high)) ** rho, torch.zeros_like(index[:1])])
    x = noise.to(torch.float32) * times[0]
    for step in range(num_steps):
        t, t_next = times[step], times[step + 1]
        if S_churn > 0 and S_min <= t <= S_max:
            t_hat = t * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + (t_hat**2 - t**2).sqrt() * S_noise * randn_like(x)
            t = t_hat
        slope = (x - denoise(x, t)) / t
        euler = x + (t_next - t) * slope
        if step < num_steps - 1:
            slope = (slope + (euler - denoise(euler, t_next)) / t_next) / 2
        x = x + (t_next - t) * slope
    return x
