"""The conditioning images of a sampling request: which picture goes with which image, and known pixels put back.

Shape legend: N images, C channels, K channels of conditioning images, H x W pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training.condition.cond_source import Pictures, SourcePicture
from training.condition.spec import Condition, Inpaint, LowRes, parse_condition
from training.sampling.checks import image_size

_CHECKED = 1000  # pictures that are read before anything is computed, at most

Source = str | os.PathLike[str] | Pictures


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """Pictures for a network. The i-th image of a request is made from the i-th picture, beginning anew at the end."""

    condition: Condition
    pictures: Pictures
    img_channels: int
    size: tuple[int, int]  # height and width of the network's images
    sigma_data: float

    def index_of(self, position: int) -> int:
        """The picture for the image at a position in the list of seeds."""
        return position % len(self.pictures)

    def images(self, positions: Sequence[int] | np.ndarray, device: torch.device | str) -> torch.Tensor:
        """What the network sees: float32 [N, K, H, W] for the images at these positions."""
        chosen, rows = np.unique([self.index_of(int(p)) for p in positions], return_inverse=True)
        seen = torch.stack([self._seen(self._read(int(index)), device) for index in chosen])
        return seen[torch.from_numpy(rows.reshape(-1)).to(seen.device)]

    def finish(self, images: torch.Tensor, positions: Sequence[int] | np.ndarray) -> torch.Tensor:
        """`images` (uint8 [N, C, H, W]) with the pixels put back that were known, for an inpainting network."""
        if not isinstance(self.condition, Inpaint):
            return images
        pictures = [self._read(self.index_of(int(p))) for p in positions]
        known = torch.from_numpy(np.stack([p.pixels for p in pictures])).to(images.device)
        hidden = torch.from_numpy(np.stack([_hidden_in(p) for p in pictures])).to(images.device)
        return torch.where(hidden[:, None], images, known)

    def shown(self, index: int) -> np.ndarray:
        """Picture `index` as the network sees it, to look at: uint8 [C, H, W], grey where something is hidden."""
        seen = self._seen(self._read(index), "cpu")[: self.img_channels]
        return ((seen + 1) * 127.5 + 0.5).clip(0, 255).to(torch.uint8).numpy()

    def notes(self, num_images: int) -> list[dict[str, Any]]:
        """What the records of a request's images say of their pictures (training.sampling.image_records)."""
        digests = [self.pictures.digest(index) for index in range(min(num_images, len(self.pictures)))]
        return [{"source": digests[self.index_of(position)]} for position in range(num_images)]

    def check(self, num_images: int) -> None:
        """Raise ConfigError for a picture that cannot be used, as far as a thousand of them, evenly spread, tell."""
        used = min(num_images, len(self.pictures))
        for index in np.linspace(0, used - 1, min(used, _CHECKED)).astype(int):
            self._read(int(index))

    def _read(self, index: int) -> SourcePicture:
        """Picture `index`, if it fits the network. Raises ConfigError."""
        picture = self.pictures.read(index)
        found = (picture.pixels.shape[1], picture.pixels.shape[2])
        if isinstance(self.condition, LowRes):
            small = (self.size[0] // self.condition.factor, self.size[1] // self.condition.factor)
            if found not in (self.size, small):
                raise ConfigError(
                    f"{picture.name} is {_text(found)} pixels; for a network of {_text(self.size)} with"
                    f" {self.condition} give small pictures of {_text(small)}, or full ones of {_text(self.size)} to be"
                    " reduced"
                )
        elif found != self.size:
            raise ConfigError(
                f"{picture.name} is {_text(found)} pixels; the network fills pictures of {_text(self.size)}"
                " (dataset_tool.py convert --resolution crops and scales)"
            )
        elif not _hidden_in(picture).any():
            raise ConfigError(
                f"nothing is hidden in {picture.name}; make pixels transparent, or say by --masks=PATH, white, what to"
                " fill"
            )
        return picture

    def _seen(self, picture: SourcePicture, device: torch.device | str) -> torch.Tensor:
        """[K, H, W]."""
        pixels = torch.from_numpy(picture.pixels).to(device)[None].to(torch.float32) / 127.5 - 1
        if isinstance(self.condition, LowRes):
            is_small = tuple(pixels.shape[2:]) != self.size
            return self.condition.enlarge(pixels if is_small else self.condition.reduce(pixels))[0]
        hidden = torch.from_numpy(_hidden_in(picture)).to(device)[None, None]
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
    """What `net`, whose file names this `condition`, is to be given: None where it takes no pictures.

    Raises ConfigError where the pictures are missing, do not go with the network, or cannot be read. `names`: how the
    user gives `source` and `masks`.
    """
    channels = getattr(net, "cond_channels", 0)
    if not channels:
        for option, value in zip(names, (source, masks), strict=True):
            if value is not None:
                raise ConfigError(
                    f"the network is not conditioned on pictures (train_edm2.py --condition); no {option}"
                )
        return None
    if condition is None:
        raise ConfigError(
            f"the network sees pictures of {channels} channels, and its file does not say what they are ('condition' in"
            " its info)"
        )
    wanted = parse_condition(condition)
    if wanted.channels(net.img_channels) != channels:
        raise ConfigError(f"the network sees pictures of {channels} channels, which {wanted} does not make")
    wanted.check_size(*image_size(net))
    if source is None:
        raise ConfigError(
            f"the network was trained with --condition={wanted}; give it pictures by {names[0]}=PATH: a file, folder or"
            " ZIP file"
        )
    if masks is not None and not isinstance(wanted, Inpaint):
        raise ConfigError(f"--masks={masks} is for networks that inpaint; this one was trained with {wanted}")
    if isinstance(source, str | os.PathLike):
        if net.img_channels not in (1, 3):
            raise ConfigError(f"pictures are grey or RGB; the network is for images of {net.img_channels} channels")
        from training.condition.cond_files import PictureFiles  # whose libraries most requests can do without

        source = PictureFiles(source, net.img_channels, masks=masks)
    found = Conditioning(
        condition=wanted,
        pictures=source,
        img_channels=net.img_channels,
        size=image_size(net),
        sigma_data=net.sigma_data,
    )
    found.check(num_images)
    return found


def require_same_condition(net: Any, condition: str | None, gnet: Any, guide_condition: str | None) -> None:
    """Raise ConfigError unless a guide is conditioned as the main network, or not at all."""
    if not getattr(gnet, "cond_channels", 0):
        return
    if not getattr(net, "cond_channels", 0):
        raise ConfigError("the guide is conditioned on pictures, and the main network is not; use another guide")
    if condition is not None and guide_condition is not None and condition != guide_condition:
        ours, theirs = (parse_condition(text) for text in (condition, guide_condition))
        if type(ours) is not type(theirs) or isinstance(ours, LowRes):
            raise ConfigError(f"the guide was trained with --condition={theirs}, the main network with {ours}")


def require_one_picture_per_seed(seeds: Sequence[int], conditioning: Conditioning | None) -> None:
    """Raise ConfigError where a seed, and so a file, would get two pictures."""
    if conditioning is None:
        return
    picture_of: dict[int, int] = {}
    for position, seed in enumerate(seeds):
        index = conditioning.index_of(position)
        if picture_of.setdefault(seed, index) != index:
            raise ConfigError(f"seed {seed} is asked for with two pictures, but has one file; list each seed once")


def beside_pictures(images: Sequence[np.ndarray], conditioning: Conditioning) -> tuple[list[np.ndarray], int]:
    """The images [C, H, W] of a request for a contact sheet, and its columns: behind each picture, as the network sees
    it, what was made from it. Where there are many pictures, several stand in a row.
    """
    num_pictures = min(len(conditioning.pictures), len(images))
    width = 1 + -(-len(images) // num_pictures)
    tiles: list[np.ndarray] = []
    for index in range(num_pictures):
        made = list(images[index::num_pictures])
        blank = [np.full_like(images[0], 255)] * (width - 1 - len(made))
        tiles += [conditioning.shown(index), *made, *blank]
    per_row = max(round((num_pictures / width) ** 0.5), 1)
    return tiles, min(per_row, num_pictures) * width


def _hidden_in(picture: SourcePicture) -> np.ndarray:
    """bool [H, W]."""
    return np.zeros(picture.pixels.shape[1:], dtype=bool) if picture.hidden is None else picture.hidden


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
