"""The conditioning images of a sampling request: which one goes with which image, and known pixels put back.

Shape legend: N images, C channels, K channels of conditioning images, H x W pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training.condition.spec import Condition, Inpaint, LowRes, parse_condition
from training.networks_edm2 import image_size

if TYPE_CHECKING:  # most requests can do without the libraries that read image files
    from training.condition.source_images import SourceImage, SourceImages

Source = Union[str, os.PathLike[str], "SourceImages"]

_CHECKED = 1000  # images that are read before anything is computed, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """Images for a network. Image i of a request is made from source image i; after the last the first comes again."""

    condition: Condition
    sources: "SourceImages"
    img_channels: int
    size: tuple[int, int]  # height and width of the network's images
    sigma_data: float

    def index_of(self, position: int) -> int:
        """Return the source image for the image at a position in the list of seeds."""
        return position % len(self.sources)

    def images(self, positions: Sequence[int] | np.ndarray, device: torch.device | str) -> torch.Tensor:
        """Return what the network is given for the images at these positions: float32 [N, K, H, W]."""
        chosen, rows = np.unique([self.index_of(int(p)) for p in positions], return_inverse=True)
        images = torch.stack([self._network_input(self._read(int(index)), device) for index in chosen])
        return images[torch.from_numpy(rows.reshape(-1)).to(images.device)]

    def finish(self, images: torch.Tensor, positions: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Put back the known pixels of `images` (uint8 [N, C, H, W]), for a network that inpaints."""
        if not isinstance(self.condition, Inpaint):
            return images
        sources = [self._read(self.index_of(int(p))) for p in positions]
        known = torch.from_numpy(np.stack([source.pixels for source in sources])).to(images.device)
        hidden = torch.from_numpy(np.stack([source.mask for source in sources])).to(images.device)
        return torch.where(hidden[:, None], images, known)

    def shown(self, index: int) -> np.ndarray:
        """Return source image `index` as the network sees it: uint8 [C, H, W], gray where pixels are hidden."""
        image = self._network_input(self._read(index), "cpu")[: self.img_channels]
        return ((image + 1) * 127.5 + 0.5).clip(0, 255).to(torch.uint8).numpy()

    def classes(self, num_images: int) -> list[int] | None:
        """Return the class of each image of a request, if the source images have classes."""
        known = self.sources.classes
        return None if known is None else [known[self.index_of(position)] for position in range(num_images)]

    def notes(self, num_images: int) -> list[dict[str, Any]]:
        """Return what the records of a request's images say of their sources (training/sampling/output_files.py)."""
        digests = [self.sources.digest(index) for index in range(min(num_images, len(self.sources)))]
        return [{"source": digests[self.index_of(position)]} for position in range(num_images)]

    def check(self, num_images: int) -> None:
        """Raise ConfigError if a source image does not fit. Of many, a thousand are read, evenly spread."""
        used = min(num_images, len(self.sources))
        for index in np.linspace(0, used - 1, min(used, _CHECKED)).astype(int):
            self._read(int(index))

    def _read(self, index: int) -> "SourceImage":
        image = self.sources.read(index)
        found, full = (f"{width}x{height}" for height, width in (image.size, self.size))
        if isinstance(self.condition, LowRes):
            small = (self.size[0] // self.condition.factor, self.size[1] // self.condition.factor)
            if image.size not in (self.size, small):
                raise ConfigError(
                    f"{image.name} is {found} pixels; for a network of {full} with {self.condition} give small images"
                    f" of {small[1]}x{small[0]}, or full ones of {full} to be reduced"
                )
        elif image.size != self.size:
            raise ConfigError(
                f"{image.name} is {found} pixels; the network fills images of {full}"
                " (dataset_tool.py convert --resolution crops and scales)"
            )
        elif not image.mask.any():
            raise ConfigError(
                f"nothing is hidden in {image.name}; make pixels transparent, or mark what to fill in white by"
                " --masks=PATH"
            )
        return image

    def _network_input(self, image: "SourceImage", device: torch.device | str) -> torch.Tensor:
        pixels = torch.from_numpy(image.pixels).to(device)[None].to(torch.float32) / 127.5 - 1
        if isinstance(self.condition, LowRes):
            return self.condition.enlarge(pixels if image.size != self.size else self.condition.reduce(pixels))[0]
        hidden = torch.from_numpy(image.mask).to(device)[None, None]
        return self.condition.images(pixels, hidden, self.sigma_data)[0]


def conditioning_of(
    net: Any,
    condition: str | None,
    source: Source | None,
    masks: str | os.PathLike[str] | None,
    *,
    num_images: int,
    names: tuple[str, str] = ("--source", "--masks"),
) -> Conditioning | None:
    """Return the images for `net`, whose file names this `condition`; None if it is not conditioned on images.

    Raises ConfigError if images are missing, do not fit the network, or cannot be read. `names`: the options that
    `source` and `masks` come from.
    """
    if not getattr(net, "cond_channels", 0):
        for option, value in zip(names, (source, masks), strict=True):
            if value is not None:
                raise ConfigError(
                    f"the network is not conditioned on images (train_edm2.py --condition); leave out {option}"
                )
        return None
    parsed = _condition_of(net, condition)
    if source is None:
        raise ConfigError(
            f"the network was trained with --condition={parsed}; give it images by {names[0]}=PATH: a file, folder or"
            " ZIP file"
        )
    if masks is not None and not isinstance(parsed, Inpaint):
        raise ConfigError(f"--masks={masks} is for networks that inpaint; this one was trained with {parsed}")
    if isinstance(source, str | os.PathLike):
        if net.img_channels not in (1, 3):
            raise ConfigError(f"the network makes {net.img_channels} channels; --source is for grayscale and RGB")
        from training.condition.source_images import FileImages

        source = FileImages(source, net.img_channels, masks=masks)
    result = Conditioning(
        condition=parsed,
        sources=source,
        img_channels=net.img_channels,
        size=image_size(net),
        sigma_data=net.sigma_data,
    )
    result.check(num_images)
    return result


def _condition_of(net: Any, condition: str | None) -> Condition:
    if condition is None:
        raise ConfigError(
            f"the network is conditioned on images of {net.cond_channels} channels, and its file does not say of which"
            " kind ('condition' in its info)"
        )
    parsed = parse_condition(condition)
    if parsed.channels(net.img_channels) != net.cond_channels:
        raise ConfigError(f"the network is conditioned on {net.cond_channels} channels, which {parsed} does not make")
    parsed.check_size(*image_size(net))
    return parsed


def require_same_condition(net: Any, condition: str | None, gnet: Any, guide_condition: str | None) -> None:
    """Raise ConfigError unless a guide is conditioned as the main network, or not at all."""
    if not getattr(gnet, "cond_channels", 0):
        return
    if not getattr(net, "cond_channels", 0):
        raise ConfigError("the guide is conditioned on images, and the main network is not; use another guide")
    if condition is not None and guide_condition is not None and condition != guide_condition:
        main, guide = (parse_condition(text) for text in (condition, guide_condition))
        if type(main) is not type(guide) or isinstance(main, LowRes):
            raise ConfigError(f"the guide was trained with --condition={guide}, the main network with {main}")


def with_sources(images: Sequence[np.ndarray], conditioning: Conditioning) -> tuple[list[np.ndarray], int]:
    """Return the tiles [C, H, W] of a contact sheet and its columns: each source image, then what was made from it."""
    num_sources = min(len(conditioning.sources), len(images))
    width = 1 + -(-len(images) // num_sources)
    tiles: list[np.ndarray] = []
    for index in range(num_sources):
        made = list(images[index::num_sources])
        blank = [np.full_like(images[0], 255)] * (width - 1 - len(made))
        tiles += [conditioning.shown(index), *made, *blank]
    per_row = max(round((num_sources / width) ** 0.5), 1)
    return tiles, min(per_row, num_sources) * width
