"""Pictures that a pipeline is given in memory, for networks that are conditioned on such.

Shape legend: C channels, H x W pixels.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.errors import ConfigError
from training.condition.cond_files import PictureFiles, transparent, white
from training.condition.cond_source import Pictures, SourcePicture


class GivenPictures:
    """Pictures of PIL as `channels` (1 or 3) with their masks, one for all or one for each; see PictureFiles."""

    def __init__(self, images: Sequence[PIL.Image.Image], masks: Sequence[PIL.Image.Image], channels: int) -> None:
        if not images:
            raise ConfigError("image is an empty list; give at least one picture")
        if len(masks) not in (0, 1, len(images)):
            raise ConfigError(
                f"{len(masks)} masks do not go with {len(images)} pictures; give one for each, or for all"
            )
        self.classes: list[int] | None = None
        self._images, self._masks, self._mode = images, masks, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> SourcePicture:
        """See training.condition.cond_source.Pictures."""
        image = self._images[index]
        pixels = np.atleast_3d(np.array(image.convert("RGB").convert(self._mode))).transpose(2, 0, 1)
        hidden = transparent(image)
        if self._masks:
            mask = self._masks[index % len(self._masks)]
            if mask.size != image.size:
                sizes = ["x".join(map(str, picture.size)) for picture in (mask, image)]
                raise ConfigError(f"mask {index} is {sizes[0]} pixels and its picture {sizes[1]}; they must be alike")
            hidden = white(mask) if hidden is None else white(mask) | hidden
        return SourcePicture(pixels=np.ascontiguousarray(pixels), hidden=hidden, name=f"image {index}")

    def digest(self, index: int) -> str:
        """See training.condition.cond_source.Pictures."""
        return hashlib.sha256(self.read(index).pixels.tobytes()).hexdigest()


def given_pictures(image: Any, mask_image: Any, channels: int) -> Pictures | None:
    """The pictures in the arguments of a pipeline; None where there are none. Raises ConfigError for what is neither a
    picture, a list of pictures nor a path."""
    if image is None:
        if mask_image is not None:
            raise ConfigError("mask_image says what to fill of pictures, and there are none; give image, too")
        return None
    if isinstance(image, str | os.PathLike):
        if not isinstance(mask_image, str | os.PathLike | None):
            raise ConfigError("image is a path, so mask_image must be one, too")
        return PictureFiles(image, channels, masks=mask_image)
    lists: list[list[PIL.Image.Image]] = []
    for name, value in (("image", image), ("mask_image", [] if mask_image is None else mask_image)):
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(picture, PIL.Image.Image) for picture in found):
            raise ConfigError(f"{name} must be a PIL picture, a list of them, or a path")
        lists.append(found)
    return GivenPictures(lists[0], lists[1], channels)
