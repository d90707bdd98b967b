"""The base of all detectors (images in, features out, independent of the batch), their layers and weights files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from dnnlib.errors import ConfigError, reason_of
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from torch_utils.precision import numerics

Net = TypeVar("Net", bound=nn.Module)

# N images, C channels, H x W pixels, F features, K classes, S values of a spatial map.


@dataclass(frozen=True)
class DetectorOutput:
    """Outputs of a detector for N images, float32 on the detector's device."""

    features: torch.Tensor  # [N, F]
    logits: torch.Tensor | None = None  # [N, K]; Inception's are without the bias, as Inception Score uses them
    spatial: torch.Tensor | None = None  # [N, S]; Inception's are those that sFID compares


class Detector(ABC):
    """Turns uint8 images [N, C, H, W] of any size into float32 features [N, num_features]; see `to_rgb`.

    name:         its name in `make_detector`.
    num_features: F.
    weights_path: the file of the weights.
    published:    True if published numbers were computed with that very file.

    Images pass through the network in groups of fixed size, the last one filled up with black images, so that an
    image's features do not depend on its batch.
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
        """Return True if the weights are on this machine, so that no argument and no connection is needed."""

    def to(self, device: torch.device | str) -> Self:
        """Compute on `device` from now on. Without this call, images are processed on their own device."""
        self._device = torch.device(device)
        return self

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Features of uint8 images: float32 [N, F]."""
        return self.outputs(images).features

    def outputs(self, images: torch.Tensor | Sequence[torch.Tensor]) -> DetectorOutput:
        """Return all outputs for uint8 images, on the detector's device. Raises ConfigError for other tensors.

        Images of several sizes come as a sequence of [C, H, W]; each is brought to the network's size by itself.
        """
        alone = [images] if isinstance(images, torch.Tensor) else [image[None] for image in images]
        pieces = [to_rgb(piece, self.name).to(self._device or piece.device) for piece in alone]
        device, num = pieces[0].device, sum(map(len, pieces))
        self._net.to(device)
        group = self.group_cpu if device.type == "cpu" else self.group_gpu
        missing = max(-num % group, 0) if num else group
        with torch.no_grad(), numerics(cudnn_benchmark=False):
            if len(pieces) == 1:
                padded = F.pad(pieces[0], [0, 0, 0, 0, 0, 0, 0, missing])
                parts = [self._compute(self._prepare(part)) for part in padded.split(group)]
            else:
                padded = F.pad(torch.cat([self._prepare(piece) for piece in pieces]), [0, 0, 0, 0, 0, 0, 0, missing])
                parts = [self._compute(part) for part in padded.split(group)]

        def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
            return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])[:num]

        features = torch.cat([part.features for part in parts])[:num]
        return DetectorOutput(features, joined([p.logits for p in parts]), joined([p.spatial for p in parts]))

    @abstractmethod
    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 images [N, 3, H, W] as the network takes them: float32 of its size, scaled."""

    @abstractmethod
    def _compute(self, x: torch.Tensor) -> DetectorOutput:
        """Return the outputs for a full group of prepared images."""


def to_rgb(images: torch.Tensor, name: str) -> torch.Tensor:
    """Return uint8 images [N, 3, H, W] unchanged, gray ones [N, 1, H, W] repeated, others with alpha put on white.

    Raises ConfigError for other tensors.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[2:]:
        shape = list(images.shape)
        raise ConfigError(f"the {name} detector takes uint8 images [N, 3, H, W]; given are {images.dtype} {shape}")
    if images.shape[1] not in (1, 2, 3, 4):
        raise ConfigError(
            f"the {name} detector takes images of 3 channels (color) or 1 (gray), or one more for alpha; these have"
            f" {images.shape[1]}: latents must be decoded to pixels first"
        )
    if images.shape[1] in (2, 4):
        colors, alpha = images[:, :-1].to(torch.int32), images[:, -1:].to(torch.int32)
        images = ((colors * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


class ConvNorm(nn.Module):
    """Convolution, batch norm and activation; `fold` merges the batch norm into the convolution.

    padding: zeros at (top and bottom, left and right). activation: an in-place function like F.relu, or None.
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
        """Merge the batch norm, as in evaluation mode, into the convolution: less work, the same result."""
        norm = self.bn
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = self.conv.weight.double() * scale.reshape(-1, 1, 1, 1)
            bias = norm.bias.double() - norm.running_mean.double() * scale
            # Channels last is the faster layout, if images have it as well.
            weight = weight.float().contiguous(memory_format=torch.channels_last)
            self.conv.weight = nn.Parameter(weight, requires_grad=False)
            self.conv.bias = nn.Parameter(bias.float(), requires_grad=False)
            self.bn = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        x = self.bn(self.conv(x))
        return x if self.activation is None else self.activation(x, inplace=True)


def fold_batch_norms(net: nn.Module) -> None:
    """Call `ConvNorm.fold` everywhere in `net`, after its weights are loaded."""
    for module in net.modules():
        if isinstance(module, ConvNorm):
            module.fold()


def resize_antialiased(images: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Resize uint8 images to float32 [N, C, size, size] in 0..255, plus bicubic overshoot; mode bilinear or bicubic."""
    images = images.to(torch.float32)
    # Apple's GPUs have no antialiased resize.
    source = images.cpu() if images.device.type == "mps" else images
    return F.interpolate(source, size=(size, size), mode=mode, antialias=True).to(images.device)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex. Raises ConfigError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None


def is_published(path: Path, digest: str) -> bool:
    """Return True if the file's SHA-256 digest begins with `digest`.

    Raises ConfigError if it does not although the name says so, as in `net-0123abcd.pth`: that file is damaged.
    """
    actual = file_sha256(path)
    if digest[:8] in path.name and not actual.startswith(digest):
        raise ConfigError(
            f"{path} is damaged or not what its name says: its SHA-256 digest begins with {actual[:8]} in place of"
            f" {digest[:8]}; delete it and fetch it again"
        )
    return actual.startswith(digest)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file or a state dict from torch.save, without executing anything in it."""
    if is_lfs_pointer(path):
        raise ConfigError(f"{path} cannot be read: {POINTER_HINT}")
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged or not a .safetensors file: {error}") from None
    except Exception:
        # Many kinds of exceptions, some of which advise to execute the file.
        raise ConfigError(
            f"{path} is damaged, or holds more than tensors; a state dict from torch.save is needed"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConfigError(f"{path} does not hold tensors by name; a state dict from torch.save is needed")
    return dict(tensors)


def filled(network: Callable[[], Net], tensors: Mapping[str, torch.Tensor], source: Path, what: str) -> Net:
    """Build a network by `network()` with exactly these `tensors`, drawing no random numbers. Raises ConfigError."""
    with torch.device("meta"):
        net = network()
    own = net.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    for name, value in own.items():
        if name in tensors and tensors[name].shape != value.shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(value.shape)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(f"{source} does not hold weights of {what}: {problems[0]}{more}")
    net.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()}, assign=True)
    return net
