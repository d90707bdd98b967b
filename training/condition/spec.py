"""What a network is conditioned on beside the class: the image at a lower resolution, or with a region hidden.

A condition makes the image that the network sees out of a clean one, in the network's units: pixels 0..255 as -1..1.
docs/condition.md has it in words.

Shape legend: N images, C channels, H x W pixels.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dnnlib.errors import ConfigError
from training.condition.masks import random_masks

MAX_FACTOR = 256  # so that the sum over an area of pixels is exact in float32


@dataclass(frozen=True, kw_only=True)
class LowRes:
    """Super-resolution: the image reduced by `factor`, and enlarged again to the network's size."""

    factor: int

    def __post_init__(self) -> None:
        if not 2 <= self.factor <= MAX_FACTOR:
            raise ConfigError(f"condition lowres:{self.factor} has a factor out of range; it is from 2 to {MAX_FACTOR}")

    def __str__(self) -> str:
        return f"lowres:{self.factor}"

    def channels(self, img_channels: int) -> int:
        """Channels of what the network sees, for images of so many."""
        return img_channels

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError for a network of images that cannot be reduced so."""
        if height % self.factor or width % self.factor:
            fit = [n for n in range(2, MAX_FACTOR + 1) if height % n == 0 and width % n == 0]
            known = ", ".join(f"lowres:{n}" for n in fit) or "none is possible"
            raise ConfigError(f"condition {self} does not divide images of {width}x{height} pixels; use {known}")

    def draw_masks(self, uniform: torch.Tensor, size: tuple[int, int]) -> None:
        """Nothing is hidden."""

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, H/factor, W/factor]: means over areas, rounded to the levels of 8 bits.

        So the small image is what a file of 8 bits holds, and the network sees the same in training and in use. Sums
        are of whole numbers, which are exact on every device; halves are rounded up.
        """
        levels = ((images + 1) * 127.5).round()
        return (F.avg_pool2d(levels, self.factor) + 0.5).floor() / 127.5 - 1

    def enlarge(self, small: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] to [N, C, h*factor, w*factor], by repeating pixels: averaging gives the small image again."""
        return F.interpolate(small, scale_factor=self.factor, mode="nearest")

    def images(self, clean: torch.Tensor, hidden: torch.Tensor | None, sigma_data: float) -> torch.Tensor:
        """What the network sees of `clean` [N, C, H, W]: the same shape."""
        return self.enlarge(self.reduce(clean))


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Inpainting: the image with a region hidden, and a channel that says where."""

    least: float = 0.1  # the smallest share of the image that is hidden in training ...
    most: float = 0.5  # ... and the largest

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise ConfigError(
                f"condition inpaint:{self.least:g}-{self.most:g} has no shares of hidden area; they need"
                " 0 < MIN <= MAX <= 1, e.g. inpaint:0.1-0.5"
            )

    def __str__(self) -> str:
        return f"inpaint:{self.least:g}-{self.most:g}"

    def channels(self, img_channels: int) -> int:
        """Channels of what the network sees, for images of so many."""
        return img_channels + 1

    def check_size(self, height: int, width: int) -> None:
        """Every size will do."""

    def draw_masks(self, uniform: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Which pixels are hidden in training, bool [N, 1, H, W]; see training/condition/masks.py."""
        return random_masks(uniform, size, least=self.least, most=self.most)

    def images(self, clean: torch.Tensor, hidden: torch.Tensor | None, sigma_data: float) -> torch.Tensor:
        """What the network sees of `clean` [N, C, H, W]: [N, C+1, H, W].

        Hidden pixels are 0, which is the middle grey. The last channel is sigma_data where `hidden` [N, 1, H, W] and
        -sigma_data elsewhere, so that it has the magnitude of an image whatever is hidden.
        """
        assert hidden is not None
        return torch.cat([clean.masked_fill(hidden, 0), (hidden.to(clean.dtype) * 2 - 1) * sigma_data], dim=1)


Condition = LowRes | Inpaint


def parse_condition(text: str) -> Condition:
    """The condition that `text` names: lowres:FACTOR, inpaint or inpaint:MIN-MAX. Raises ConfigError.

    `str` of a condition gives the text back, with all that was left out.
    """
    if match := re.fullmatch(r"lowres:(\d{1,9})", text):
        return LowRes(factor=int(match[1]))
    if text == "inpaint":
        return Inpaint()
    number = r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})"
    if match := re.fullmatch(f"inpaint:{number}-{number}", text):
        return Inpaint(least=float(match[1]), most=float(match[2]))
    shown = text if text.isprintable() and len(text) <= 40 else repr(text[:40])
    raise ConfigError(
        f"condition '{shown}' is unknown; there are lowres:FACTOR, e.g. lowres:4, and inpaint or inpaint:MIN-MAX, e.g."
        " inpaint:0.1-0.5"
    )
