"""What all detectors share: images in, features out, the same ones however the images are batched."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import ConfigError
from torch_utils.precision import numerics

# N images, C channels, H x W pixels, F features, K classes, S values of a spatial map.


@dataclass(frozen=True)
class DetectorOutput:
    """What a detector says about N images, float32 on the detector's device."""

    features: torch.Tensor  # [N, F]
    logits: torch.Tensor | None = None  # [N, K], of Inception those without the bias, as Inception Score uses them
    spatial: torch.Tensor | None = None  # [N, S], of Inception what sFID compares


class Detector(ABC):
    """Turns uint8 images [N, 3, H, W] or grey [N, 1, H, W] of any size into float32 features [N, num_features].

    name:         how `make_detector` calls it.
    num_features: F.
    weights_path: the file that the weights come from.
    published:    whether that is the very file that published numbers were computed with.

    Images pass through the network in groups of one size, the last one filled up with black ones, so that an image's
    features do not depend on the batch that it comes in.
    """

    name: ClassVar[str]
    group_cpu: ClassVar[int] = 4  # images at once; more are not faster
    group_gpu: ClassVar[int] = 32

    def __init__(self, net: nn.Module, num_features: int, weights_path: Path, published: bool) -> None:
        self._net: Any = net.eval().requires_grad_(False)
        self._device: torch.device | None = None
        self.num_features = num_features
        self.weights_path = weights_path
        self.published = published

    @classmethod
    @abstractmethod
    def has_weights(cls) -> bool:
        """Whether the weights are on this machine, so that neither an argument nor a connection is needed."""

    def to(self, device: torch.device | str) -> Self:
        """Compute on `device` from now on. Before the first call, images are processed where they are."""
        self._device = torch.device(device)
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images: float32 [N, F]."""
        return self.outputs(images).features

    def outputs(self, images: torch.Tensor) -> DetectorOutput:
        """All that the detector says about uint8 images, on its device. Raises ConfigError for what is no image."""
        images = to_rgb(images, self.name).to(self._device or images.device)
        self._net.to(images.device)
        group = self.group_cpu if images.device.type == "cpu" else self.group_gpu
        num = len(images)
        missing = max(-num % group, 0) if num else group
        images = F.pad(images, [0, 0, 0, 0, 0, 0, 0, missing])
        with torch.no_grad(), numerics(cudnn_benchmark=False):
            parts = [self._compute(part) for part in images.split(group)]

        def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
            return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])[:num]

        features = torch.cat([part.features for part in parts])[:num]
        return DetectorOutput(features, joined([p.logits for p in parts]), joined([p.spatial for p in parts]))

    @abstractmethod
    def _compute(self, images: torch.Tensor) -> DetectorOutput:
        """The output for a full group of uint8 images [N, 3, H, W] on the network's device."""


def to_rgb(images: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 images [N, 3, H, W] as they are, grey ones [N, 1, H, W] repeated. Raises ConfigError for anything else."""
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[2:]:
        shape = list(images.shape)
        raise ConfigError(f"the {name} detector takes uint8 images [N, 3, H, W]; given are {images.dtype} {shape}")
    if images.shape[1] not in (1, 3):
        raise ConfigError(
            f"the {name} detector takes images of 3 channels (colour) or 1 (grey); these have {images.shape[1]}:"
            " latents must be decoded to pixels first"
        )
    return images.expand(-1, 3, -1, -1)


class ConvNorm(nn.Module):
    """Convolution, batch norm and an activation, with the batch norm becoming part of the convolution by `fold`.

    padding: (top and bottom, left and right), zeros. activation: F.relu or the like, working in place; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        activation: Callable[..., torch.Tensor] | None = F.relu,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.activation = activation

    def fold(self) -> None:
        """Make the batch norm, as it is in evaluation, part of the convolution: less work, the same result."""
        norm = self.bn
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = self.conv.weight.double() * scale.reshape(-1, 1, 1, 1)
            bias = norm.bias.double() - norm.running_mean.double() * scale
            # Channels last is the faster layout; images must have it, too.
            weight = weight.float().contiguous(memory_format=torch.channels_last)
            self.conv.weight = nn.Parameter(weight, requires_grad=False)
            self.conv.bias = nn.Parameter(bias.float(), requires_grad=False)
            self.bn = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        x = self.bn(self.conv(x))
        return x if self.activation is None else self.activation(x, inplace=True)


def fold_batch_norms(net: nn.Module) -> None:
    """`ConvNorm.fold` everywhere in `net`, after its weights are loaded."""
    for module in net.modules():
        if isinstance(module, ConvNorm):
            module.fold()


def resize_antialiased(images: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """uint8 images to float32 [N, C, size, size], range 0..255 but for bicubic overshoot; mode bilinear or bicubic."""
    images = images.to(torch.float32)
    # Apple's GPUs have no antialiased resize.
    source = images.cpu() if images.device.type == "mps" else images
    return F.interpolate(source, size=(size, size), mode=mode, antialias=True).to(images.device)
