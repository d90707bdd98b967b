"""Inception-v3 of 2015-12-05, the network behind FID, sFID and Inception Score.

The layers follow Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567). This
network differs from later ones of that name: batch norm with eps 1e-3, average pools that exclude the padding, a
maximum in place of the last block's average, 1008 classes, and the resize of TensorFlow 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.download import cached_path, is_url
from dnnlib.errors import ConfigError
from dnnlib.util import open_url
from training.metrics.detectors import common
from training.metrics.detectors.common import ConvNorm, Detector, DetectorOutput

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
DIGEST = "6726825d"  # the first digits of the file's SHA-256, which are part of its name
SIZE = 299
NUM_CLASSES = 1008
# sFID (Nash et al., arXiv 2103.03841) takes 7 channels of 17x17 values of TensorFlow's tensor mixed_6/conv, here the
# first branch of Mixed_6d.
SPATIAL_BLOCK = "Mixed_6d"
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Conv:
    """A convolution with batch norm and ReLU: its name in the block, output channels, kernel rows and columns."""

    name: str
    channels: int
    rows: int = 1
    columns: int = 1
    stride: int = 1
    padded: bool = True  # keeps the size


# A branch is a chain of convolutions, of forks (convolutions of the same input, concatenated) and of pools.
Step = Conv | tuple[Conv, ...] | str
Branch = Sequence[Step]


def _chain(prefix: str, *shapes: tuple[int, int, int], halve: bool = False) -> Branch:
    """Convolutions {prefix}_1, {prefix}_2, ... of (channels, rows, columns); `halve` gives the last one stride 2."""
    convolutions = [Conv(f"{prefix}_{index}", *shape) for index, shape in enumerate(shapes, start=1)]
    return [*convolutions[:-1], replace(convolutions[-1], stride=2, padded=False)] if halve else convolutions


def _block_a(pool: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 64)],
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ["average", Conv("branch_pool", pool)],
    ]


def _block_b() -> list[Branch]:
    return [
        [Conv("branch3x3", 384, 3, 3, stride=2, padded=False)],
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), halve=True),
        ["halve"],
    ]


def _block_c(inner: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 192)],
        _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
        ["average", Conv("branch_pool", 192)],
    ]


def _block_d() -> list[Branch]:
    return [
        _chain("branch3x3", (192, 1, 1), (320, 3, 3), halve=True),
        _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), halve=True),
        ["halve"],
    ]


def _block_e(pool: str) -> list[Branch]:
    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1))],
        [
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, 3, 3),
            (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1)),
        ],
        [pool, Conv("branch_pool", 192)],
    ]


STEM: Branch = [
    Conv("Conv2d_1a_3x3", 32, 3, 3, stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, 3, 3, padded=False),
    Conv("Conv2d_2b_3x3", 64, 3, 3),
    "halve",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, 3, padded=False),
    "halve",
]
BLOCKS: dict[str, list[Branch]] = {
    "Mixed_5b": _block_a(pool=32),
    "Mixed_5c": _block_a(pool=64),
    "Mixed_5d": _block_a(pool=64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(inner=128),
    "Mixed_6c": _block_c(inner=160),
    "Mixed_6d": _block_c(inner=160),
    "Mixed_6e": _block_c(inner=192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(pool="average"),
    "Mixed_7c": _block_e(pool="maximum"),
}


def _pool(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "maximum":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2)


class Branches(nn.Module):
    """Parallel branches with concatenated outputs. Their convolutions are submodules by their names."""

    def __init__(self, in_channels: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self._branches = branches
        self.out_channels = 0
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, str):
                    continue
                convolutions = step if isinstance(step, tuple) else (step,)
                for spec in convolutions:
                    kernel = (spec.rows, spec.columns)
                    padding = (spec.rows // 2, spec.columns // 2) if spec.padded else (0, 0)
                    conv = ConvNorm(channels, spec.channels, kernel, stride=spec.stride, padding=padding)
                    self.add_module(spec.name, conv)
                channels = sum(spec.channels for spec in convolutions)
            self.out_channels += channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        return torch.cat([self._chain(branch, x) for branch in self._branches], dim=1)

    def _chain(self, branch: Branch, x: torch.Tensor) -> torch.Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pool(step, x)
            elif isinstance(step, tuple):
                x = torch.cat([self.get_submodule(spec.name)(x) for spec in step], dim=1)
            else:
                x = self.get_submodule(step.name)(x)
        return x


class InceptionV3(Branches):
    """The network, for scaled images [N, 3, 299, 299]; its tensors have the names of the weights file."""

    def __init__(self) -> None:
        super().__init__(3, [STEM])
        channels = self.out_channels
        for name, branches in BLOCKS.items():
            block = Branches(channels, branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def outputs(self, x: torch.Tensor) -> DetectorOutput:
        """Return features [N, 2048], logits without the bias [N, 1008], spatial features [N, 7 * 17 * 17]."""
        x = self(x)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].flatten(1)
        features = x.mean(dim=[2, 3])
        return DetectorOutput(features, F.linear(features, self.fc.weight), spatial)


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [N, C, H, W] to float32 [N, C, size, size], bilinear as in TensorFlow 1 without aligned corners.

    Output pixel i is read at i * (input size / output size): no shift by half a pixel, no antialiasing.
    """
    images = images.to(torch.float32)
    # On the device, since a copy from the host would wait for all work in flight. Apple's GPUs have no float64.
    device = torch.device("cpu") if images.device.type == "mps" else images.device
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, dtype=torch.float64, device=device) * (length / size)
        low = position.floor()
        shape = [1, 1, 1, 1]
        shape[dim] = size
        weight = (position - low).reshape(shape).to(images)
        first = low.long().to(images.device)
        second = (first + 1).clamp(max=length - 1)
        images = images.index_select(dim, first).lerp(images.index_select(dim, second), weight)
    return images


class InceptionV3Detector(Detector):
    """Inception-v3 of 2015-12-05: 2048 features (FID), logits (Inception Score), spatial features (sFID).

    weights: file or URL of the weights, as torch.save or .safetensors; None downloads and caches the published ones.
    """

    name: ClassVar[str] = "inception"

    def __init__(self, weights: str | Path | None = None) -> None:
        path = _locate(weights)
        published = common.is_published(path, DIGEST)
        net = common.filled(InceptionV3, common.read_tensors(path), path, "Inception-v3 of 2015-12-05")
        common.fold_batch_norms(net)
        super().__init__(net, net.fc.in_features, path, published)

    @classmethod
    def has_weights(cls) -> bool:
        """Return True if the published file is in the download cache."""
        return cached_path(URL).is_file()

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return (resize_tf1(images, SIZE) - 128) / 128

    def _compute(self, x: torch.Tensor) -> DetectorOutput:
        return self._net.outputs(x.contiguous(memory_format=torch.channels_last))


def _locate(weights: str | Path | None) -> Path:
    source = URL if weights is None else str(weights)
    try:
        return Path(open_url(source, num_attempts=3, return_filename=True))
    except ConfigError as error:
        if not is_url(source):
            raise ConfigError(f"--inception-weights: {error}; it is the file at {URL}") from None
        raise ConfigError(
            f"the weights of Inception-v3 are missing: {error}, or give it by --inception-weights=FILE"
        ) from None
