"""The rules of `--preset=small`: options by the number of images and classes, each with its reason.

Nothing here depends on the device or its speed, and nothing that changes the result depends on --duration. So the same
command continues a run on any machine, and a larger --duration makes the run longer.

Between the sizes of data set that the papers trained on, options follow simple laws of the number of images:

- EDM2 (arXiv 2312.02696, Table 6): ImageNet, 1,281,167 images, batches of 2,048, 1,676 passes (2,147 million images);
- EDM (arXiv 2206.00364, Table 7): CIFAR-10, 50,000 images, a network of 56 million parameters, dropout 0.13;
- DDPM (arXiv 2006.11239, Appendix B): CIFAR-10, batches of 128.
"""

import math
from dataclasses import dataclass, replace

import torch

from dnnlib.text import format_passes
from training.config import NetworkConfig, TrainingConfig
from training.networks_edm2 import Precond

IMAGENET = 1_281_167  # images
PARAMS_PER_IMAGE = 1100  # upper bound: 56 million for 50,000 images
PASSES = 1600
LEAST_INTERVAL = 1024  # images between snapshots
WIDTHS = (16, 24, 32, 48, 64, 96, 128)  # whose levels divide into heads of 32 channels or a few more
FEW_IMAGES = 1000  # below this even the narrowest network can memorize all images
MANY_IMAGES = 200_000  # above this the presets of the papers fit better
FOREIGN_FROM = 0.6  # share from which mirrored images count as foreign: four standard errors above one half


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that the choices depend on. `resolution` and `num_channels` are those that the network sees."""

    num_images: int
    num_classes: int  # 0 = no labels
    resolution: int
    num_channels: int
    latents: bool
    foreign: float | None = None  # share of images whose mirror image is foreign; None = not examined


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Options that the kind of the images decides: the rows of SHAPES."""

    channel_mult: tuple[int, ...]
    attn_resolutions: tuple[int, ...]
    least_width: int
    P_mean: float
    P_std: float
    decay: float  # batches, for as many images as ImageNet has
    source: str


_PIXELS = Shape(
    channel_mult=(1, 2, 4),
    attn_resolutions=(8,),
    least_width=16,
    P_mean=-0.8,
    P_std=1.6,
    decay=35e3,
    source="EDM2's for ImageNet-64, pixels",
)
_LATENTS = Shape(
    channel_mult=(1, 2, 4),
    attn_resolutions=(16, 8),
    least_width=32,
    P_mean=-0.4,
    P_std=1.0,
    decay=70e3,
    source="EDM2's for ImageNet-512, latents",
)

# By whether the images are latents, and resolution.
SHAPES = {
    (False, 32): _PIXELS,
    (False, 64): replace(_PIXELS, channel_mult=(1, 2, 3, 4), attn_resolutions=(16, 8), least_width=24),
    (True, 32): _LATENTS,
}


# Every choice with its reason, in the order of the help page. Names in braces are filled in by `choose`.
_REASONS = {
    "cond": "{classes}",
    "duration": "{passes}; EDM2 on ImageNet: 1,676; at least 16Ki images a class and 128Ki in all",
    "batch": "half the square root of the number of images: 128 for CIFAR-10 (DDPM); 16 to 256",
    "channels": "{num_params:.1f} million parameters, {per_image:,.0f} an image; {bound}",
    "channel-mult": "for {resolution}x{resolution}: {levels} levels, down to 8x8",
    "num-blocks": "EDM2 has 3; 2 for small data",
    "attn-resolutions": "{attention}",
    "dropout": "EDM2's for networks that overfit (M and larger); EDM has 0.13 on CIFAR-10",
    "P_mean": "{source}",
    "P_std": "{source}",
    "lr": "EDM2's for its smallest networks (XS)",
    "decay": "EDM2's {decay:,.0f} batches on ImageNet, by the square root of the number of images",
    "rampup": "EDM2's 4,883 batches, likewise; at least 100",
    "ema-stds": "EDM2's; every other length can be reconstructed afterwards",
    "xflip": "{mirroring}",
    "status": "{status}",
    "snapshot": "{snapshots}",
    "checkpoint": "{checkpoint}",
}


def choose(
    facts: Facts, shape: Shape, *, duration: int | None = None, snapshot: int | None = None, batch: int | None = None
) -> tuple[TrainingConfig, dict[str, str]]:
    """Return the configuration, its `data` empty, and all reasons.

    `duration`, `snapshot` and `batch` were given by the user, and decide only on intervals.
    """
    n = facts.num_images
    channels, num_params = _width(facts, shape)
    scale = math.sqrt(n / IMAGENET)
    chosen_batch = 1 << min(max(round(math.log2(math.sqrt(n) / 2)), 4), 8)
    planned = _duration(facts)
    length, step = duration or planned, batch or chosen_batch
    interval = max(1 << (max(length // 16, 1).bit_length() - 1), LEAST_INTERVAL, step)
    interval = snapshot or interval
    config = TrainingConfig(
        data="",
        cond=facts.num_classes > 1,
        xflip=facts.foreign is not None and facts.foreign < FOREIGN_FROM,
        network=_network(shape, channels, dropout=0.10),
        P_mean=shape.P_mean,
        P_std=shape.P_std,
        lr=0.012,
        decay=float(_two_digits(shape.decay * scale)),
        rampup=_two_digits(max(10e6 / 2048 * scale, 100) * chosen_batch) / 1e6,
        batch=chosen_batch,
        duration=planned,
        snapshot=interval if snapshot is None else snapshot,
        checkpoint=interval,
        status=max(interval // 4, step),
    )
    bound = f"at most {PARAMS_PER_IMAGE:,}, as EDM on CIFAR-10"
    if num_params > PARAMS_PER_IMAGE * n:
        bound = f"the narrowest used; {PARAMS_PER_IMAGE:,} would be EDM's on CIFAR-10"
    values = {
        "passes": format_passes(planned / n),
        "snapshots": "as given" if snapshot is not None else _why_snapshot(-(-length // interval)),
        "checkpoint": "as --snapshot" if snapshot != 0 else "16 to 32 in the run",
        "status": "a quarter of --checkpoint" if interval // 4 >= step else "each batch",
        "classes": _why_cond(facts),
        "num_params": num_params / 1e6,
        "per_image": num_params / n,
        "bound": bound,
        "resolution": facts.resolution,
        "levels": len(shape.channel_mult),
        "attention": "EDM2's 16 and 8" if len(shape.attn_resolutions) > 1 else "the lowest level, for speed",
        "source": shape.source,
        "decay": shape.decay,
        "mirroring": _why_xflip(facts),
    }
    return config, {option: why.format(**values) for option, why in _REASONS.items()}


def remarks(facts: Facts) -> list[str]:
    """Return advice for very small and very large data sets."""
    n = facts.num_images
    if n < FEW_IMAGES:
        return [
            f"{n:,} images are few: a network can memorize them. Compare samples with the images nearest to them, and"
            " stop early."
        ]
    if n > MANY_IMAGES:
        best = "edm2-img512-xs" if facts.latents else "edm2-img64-xs"
        return [f"{n:,} images are more than this preset is made for; --preset={best} suits them better."]
    return []


def _network(shape: Shape, channels: int, *, dropout: float = 0.0) -> NetworkConfig:
    return NetworkConfig(
        channels=channels,
        channel_mult=shape.channel_mult,
        num_blocks=2,
        attn_resolutions=shape.attn_resolutions,
        channels_per_head=32,  # half of EDM2's, so that levels of 64 to 128 channels have two heads or more
        dropout=dropout,
    )


def _width(facts: Facts, shape: Shape) -> tuple[int, int]:
    best = (0, 0)
    for channels in WIDTHS:
        if channels < shape.least_width:
            continue
        num_params = count_params(_network(shape, channels), facts)
        if best[0] and num_params > PARAMS_PER_IMAGE * facts.num_images:
            break
        best = (channels, num_params)
    return best


def count_params(network: NetworkConfig, facts: Facts) -> int:
    """Return the number of parameters of the network for such images."""
    label_dim = facts.num_classes if facts.num_classes > 1 else 0
    arguments = network.fitted_to(facts.resolution).arguments()
    with torch.device("meta"):
        net = Precond(facts.resolution, facts.num_channels, label_dim, **arguments)
    return sum(parameter.numel() for parameter in net.parameters())


def _duration(facts: Facts) -> int:
    """Return the duration in images, one of eight steps in each octave."""
    least = max(128 << 10, (16 << 10) * facts.num_classes)
    nimg = min(max(PASSES * facts.num_images, least), 200 << 20)  # EDM trained CIFAR-10 and FFHQ for 200 million
    step = 1 << (nimg.bit_length() - 4)
    return round(nimg / step) * step


def _why_cond(facts: Facts) -> str:
    if facts.num_classes > 1:
        return f"{facts.num_classes} classes"
    return "one class: nothing to tell apart" if facts.num_classes else "no labels"


def _why_xflip(facts: Facts) -> str:
    if facts.foreign is None:
        return "not examined: latents cannot be mirrored, and a URL is not searched"
    nearer = f"{facts.foreign:.0%} of the images have a nearer neighbor than their mirror image has"
    return f"{nearer}; " + (
        f"off from {FOREIGN_FROM:.0%}" if facts.foreign >= FOREIGN_FROM else "50% if mirroring is natural"
    )


def _why_snapshot(num: int) -> str:
    enough = ", enough to reconstruct any EMA length" if num >= 16 else ", of a short run"
    return f"{num} in the run{enough}"


def _two_digits(value: float) -> int:
    unit = 10 ** max(math.floor(math.log10(value)) - 1, 0)
    return round(value / unit) * unit
