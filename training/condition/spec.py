"""Conditions of a network besides the class: the image at a lower resolution, or with a region hidden.

A condition makes the network's second input from a clean image, in the network's units: pixels 0..255 as -1..1. See
docs/condition.md.

Shape legend: N images, C channels, H x W pixels.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean
from training.condition.masks import random_masks

MAX_FACTOR = 256  # so that the sum over an area of pixels is exact in float32


@dataclass(frozen=True, kw_only=True)
class LowRes:
    """Super-resolution: the image reduced by `factor` and enlarged again to the network's size."""

    factor: int

    def __post_init__(self) -> None:
        if not 2 <= self.factor <= MAX_FACTOR:
            raise ConfigError(f"condition lowres:{self.factor} must have a factor from 2 to {MAX_FACTOR}")

    def __str__(self) -> str:
        return f"lowres:{self.factor}"

    def channels(self, img_channels: int) -> int:
        """Return the channels of the conditioning image for images with `img_channels`."""
        return img_channels

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError unless the factor divides height and width."""
        if height % self.factor or width % self.factor:
            fit = [n for n in range(2, MAX_FACTOR + 1) if height % n == 0 and width % n == 0]
            known = ", ".join(f"lowres:{n}" for n in fit) or "another size"
            raise ConfigError(f"condition {self} does not divide images of {width}x{height} pixels; use {known}")

    def draw_masks(self, uniform: torch.Tensor, size: tuple[int, int]) -> None:
        """Return None: nothing is hidden."""

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Reduce [N, C, H, W] to [N, C, H/factor, W/factor]: means over areas, rounded to the levels of 8 bits.

        An 8-bit file then holds the small image exactly, so that the network sees the same in training and in use. Sums
        are of whole numbers, which are exact on every device; halves are rounded up.
        """
        levels = ((images + 1) * 127.5).round()
        return (F.avg_pool2d(levels, self.factor) + 0.5).floor() / 127.5 - 1

    def enlarge(self, small: torch.Tensor) -> torch.Tensor:
        """Enlarge [N, C, h, w] to [N, C, h*factor, w*factor] by repeating pixels, so that averaging inverts it."""
        return F.interpolate(small, scale_factor=self.factor, mode="nearest")

    def images(self, clean: torch.Tensor, hidden: torch.Tensor | None, sigma_data: float) -> torch.Tensor:
        """Return the conditioning images of `clean` [N, C, H, W], in the same shape."""
        return self.enlarge(self.reduce(clean))


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Inpainting: the image with a region hidden, and a channel that marks the region."""

    least: float = 0.1  # smallest share of the image that is hidden in training
    most: float = 0.5  # largest share

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise ConfigError(
                f"condition inpaint:{self.least:g}-{self.most:g} must have shares of the area with"
                " 0 < MIN <= MAX <= 1, e.g. inpaint:0.1-0.5"
            )

    def __str__(self) -> str:
        return f"inpaint:{self.least:g}-{self.most:g}"

    def channels(self, img_channels: int) -> int:
        """Return the channels of the conditioning image for images with `img_channels`."""
        return img_channels + 1

    def check_size(self, height: int, width: int) -> None:
        """Accept every size."""

    def draw_masks(self, uniform: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the pixels to hide in training, bool [N, 1, H, W]; see training/condition/masks.py."""
        return random_masks(uniform, size, least=self.least, most=self.most)

    def images(self, clean: torch.Tensor, hidden: torch.Tensor | None, sigma_data: float) -> torch.Tensor:
        """Return the conditioning images [N, C+1, H, W] of `clean` [N, C, H, W].

        Hidden pixels are 0, middle gray. The last channel is sigma_data where `hidden` [N, 1, H, W] and -sigma_data
        elsewhere, so that it has the magnitude of an image whatever is hidden.
        """
        assert hidden is not None
        return torch.cat([clean.masked_fill(hidden, 0), (hidden.to(clean.dtype) * 2 - 1) * sigma_data], dim=1)


Condition = LowRes | Inpaint


def parse_condition(text: str) -> Condition:
    """Parse lowres:FACTOR, inpaint or inpaint:MIN-MAX; `str` of the result is its full text. Raises ConfigError."""
    if match := re.fullmatch(r"lowres:(\d{1,9})", text):
        return LowRes(factor=int(match[1]))
    if text == "inpaint":
        return Inpaint()
    number = r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})"
    if match := re.fullmatch(f"inpaint:{number}-{number}", text):
        return Inpaint(least=float(match[1]), most=float(match[2]))
    shown = text if text.isprintable() and len(text) <= 40 else repr(text[:40])
    raise ConfigError(
        f"condition '{shown}' is unknown; choose lowres:FACTOR, e.g. lowres:4, inpaint, or inpaint:MIN-MAX, e.g."
        f" inpaint:0.1-0.5{did_you_mean(text.partition(':')[0], ('lowres', 'inpaint'))}"
    )
