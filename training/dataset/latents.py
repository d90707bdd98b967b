"""VAE latents of a data set: the VAE, the statistics of its latents, and the encoder made from both.

N images, C latent channels, H x W latent pixels.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError, one_line
from training.config import PUBLISHED_VAE
from training.dataset.contract import ImageDataset
from training.dataset.items import CONVERT_HINT
from training.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder, require_on_hub
from training.snapshot.parts import build_encoder, described, plain

ENCODER_KEY = "encoder"  # in dataset.json, next to the labels

# Number of images from which `measured_encoder` measures latent statistics: all would take too long.
MEASURED_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class LatentGeometry:
    """The shape of the latents that a VAE makes from pixels."""

    channels: int
    downscale: int  # pixels to a latent pixel, in each direction

    def resolution(self, pixels: int) -> int:
        """Return the latent resolution of square images. Raises ConfigError if their size does not divide."""
        if pixels % self.downscale or pixels < self.downscale:
            raise ConfigError(f"images of {pixels}x{pixels} do not divide into latent pixels of {self.downscale}")
        return pixels // self.downscale


def vae_geometry(name: str) -> LatentGeometry:
    """Return the geometry of the VAE `name`, a hub name or a local folder; reads config.json only, no weights."""
    if name == PUBLISHED_VAE:
        return LatentGeometry(channels=4, downscale=8)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            f'VAE {name!r} needs the diffusers library, which is not installed; try: pip install "edm2[vae]"'
        ) from None
    try:
        require_on_hub(name)
        config = AutoencoderKL.load_config(name)
        return LatentGeometry(
            channels=int(config["latent_channels"]), downscale=1 << (len(config["block_out_channels"]) - 1)
        )
    except KeyError as error:
        raise ConfigError(f"VAE {name!r} is not an AutoencoderKL: its config.json has no entry {error}") from None
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"VAE {name!r} cannot be loaded as a hub name or a local folder: {reason}") from None


@dataclass(kw_only=True)
class LatentStatistics:
    """Mean and standard deviation per channel of samples drawn from raw latents, over many images."""

    count: int = 0  # latent pixels
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the means, float64 [C]
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the squared means and deviations, float64 [C]

    def add(self, raw: np.ndarray) -> None:
        """Add raw latents [N, 2C, H, W]: mean and standard deviation for each latent pixel."""
        mean, std = np.split(raw.astype(np.float64), 2, axis=1)
        self.merge(
            LatentStatistics(
                count=mean.shape[0] * mean.shape[2] * mean.shape[3],
                sums=mean.sum((0, 2, 3)),
                squares=(mean**2 + std**2).sum((0, 2, 3)),
            )
        )

    def merge(self, other: "LatentStatistics") -> None:
        """Add the images of `other`."""
        self.count += other.count
        self.sums = other.sums if self.sums.size == 0 else self.sums + other.sums
        self.squares = other.squares if self.squares.size == 0 else self.squares + other.squares

    @property
    def mean(self) -> list[float]:
        """Means, [C]."""
        return [float(value) for value in self.sums / self.count]

    @property
    def std(self) -> list[float]:
        """Standard deviations, [C], of the means and around the means together."""
        variance = self.squares / self.count - (self.sums / self.count) ** 2
        return [float(value) for value in np.sqrt(np.maximum(variance, 0))]


@torch.no_grad()
def measured_encoder(encoder: StabilityVAEEncoder, dataset: ImageDataset, device: torch.device) -> StabilityVAEEncoder:
    """Return the encoder with latent statistics measured on up to MEASURED_IMAGES of a data set of pixels."""
    statistics = LatentStatistics()
    count = min(len(dataset), MEASURED_IMAGES)
    for part in np.array_split(np.linspace(0, len(dataset) - 1, count).astype(int), -(-count // encoder.batch_size)):
        pixels = torch.from_numpy(rgb(dataset.read_batch(part.tolist())[0])).to(device)
        statistics.add(encoder.encode_pixels(pixels).cpu().numpy())
    return encoder.with_statistics(statistics.mean, statistics.std)


def vae_encoder(dataset: ImageDataset, vae: str, *, batch_size: int = 8, pixel_min: float = 0) -> StabilityVAEEncoder:
    """Return an encoder for the pixels of `dataset` with the VAE named `vae`.

    The statistics of a VAE other than the published one are placeholders until they are measured. Raises ConfigError if
    the VAE cannot encode these images.
    """
    if dataset.holds_latents:
        raise ConfigError(f"{dataset.name} holds latents already, and a VAE takes pixels")
    if dataset.num_channels not in (1, 3):
        raise ConfigError(
            f"{dataset.name} has {dataset.num_channels} channels; a VAE takes gray (1) or RGB (3) images;"
            " dataset_tool.py convert --background=white makes such ones of images with alpha"
        )
    geometry = vae_geometry(vae)
    geometry.resolution(dataset.resolution)
    _require_power_of_two(dataset)
    if not -1 <= pixel_min < 1:
        raise ConfigError(f"--pixel-min={pixel_min:g} must be from -1 to below 1: white is 1")
    if vae == PUBLISHED_VAE:
        return StabilityVAEEncoder(batch_size=batch_size, pixel_min=pixel_min)
    mean, std = [0.0] * geometry.channels, [1.0] * geometry.channels
    return StabilityVAEEncoder(full_name(vae), mean, std, batch_size=batch_size, pixel_min=pixel_min)


def full_name(vae: str) -> str:
    """Return the name of a VAE for a data set or snapshot: local folders as absolute paths, valid from anywhere."""
    return os.path.abspath(vae) if os.path.isdir(vae) else vae


def _require_power_of_two(dataset: ImageDataset) -> None:
    side = dataset.resolution
    if side & (side - 1):
        raise ConfigError(
            f"{dataset.name} holds images of {side}x{side}, not a power of two, as networks need: {CONVERT_HINT}"
        )


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Return pixels [N, 1 or 3, H, W] as [N, 3, H, W], with gray ones repeated."""
    return pixels if pixels.shape[1] == 3 else np.repeat(pixels, 3, axis=1)


def encoder_of(dataset: ImageDataset) -> Encoder:
    """Return the encoder of a data set: the one in its dataset.json, or the published ones.

    Raises ConfigError if the encoder does not fit the latents of the data set.
    """
    _require_power_of_two(dataset)
    if not dataset.holds_latents:
        return StandardRGBEncoder()
    entry = dataset.encoder_entry
    encoder = StabilityVAEEncoder() if entry is None else read_encoder(entry, f"{dataset.name}: dataset.json")
    expected = 2 * len(encoder.scale)
    if dataset.num_channels != expected:
        hint = "" if entry else "; dataset.json names no other VAE (dataset_tool.py encode --measure adds it)"
        raise ConfigError(
            f"{dataset.name} holds latents of {dataset.num_channels} channels, not {expected}: mean and standard"
            f" deviation of {expected // 2} each are needed{hint}"
        )
    return encoder


def encoder_entry(encoder: StabilityVAEEncoder) -> dict[str, Any]:
    """Return the description of the encoder for dataset.json: its class and its arguments."""
    return described(encoder)


def read_encoder_file(path: Path) -> StabilityVAEEncoder:
    """Load the encoder from a JSON file that holds its `encoder_entry`. Raises ConfigError."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read; remove it to make it again: {one_line(error)}") from None
    return read_encoder(entry, str(path))


def read_encoder(entry: Mapping[str, Any], where: str) -> StabilityVAEEncoder:
    """Return the encoder that `entry` describes. Raises ConfigError, with the file `where`, for anything else."""
    try:
        encoder = build_encoder(str(entry.get("class")), (), plain(dict(entry["arguments"]), "its encoder"))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where} describes no known encoder: {one_line(error)[:300]}") from None
    if not isinstance(encoder, StabilityVAEEncoder):
        raise ConfigError(f"{where} describes {type(encoder).__name__}, which makes no latents")
    return encoder
