"""Between data sets of pixels and of VAE latents: which VAE, which statistics, and the encoding of one in the other.

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

from dnnlib.errors import ConfigError
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.items import CONVERT_HINT
from training.dataset.zip_index import one_line
from training.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.snapshot.parts import build_encoder, described, plain

PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"  # the VAE of the published networks, whose latents' statistics are known
ENCODER_KEY = "encoder"  # in dataset.json, beside the labels

# Images from which a data set's latent statistics are measured where all would take too long.
MEASURED_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class LatentGeometry:
    """What a VAE makes of pixels."""

    channels: int
    downscale: int  # pixels to a latent pixel, in each direction

    def resolution(self, pixels: int) -> int:
        """Latent resolution of square images of so many pixels. Raises ConfigError where they don't divide."""
        if pixels % self.downscale or pixels < self.downscale:
            raise ConfigError(f"images of {pixels}x{pixels} do not divide into latent pixels of {self.downscale}")
        return pixels // self.downscale


def vae_geometry(name: str) -> LatentGeometry:
    """The geometry of the VAE `name`, a hub name or a local folder; reads its config.json and no weights."""
    if name == PUBLISHED_VAE:
        return LatentGeometry(channels=4, downscale=8)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            f'VAE {name!r} needs the diffusers library, which is not installed; try: pip install "edm2[vae]"'
        ) from None
    try:
        config = AutoencoderKL.load_config(name)
        return LatentGeometry(
            channels=int(config["latent_channels"]), downscale=1 << (len(config["block_out_channels"]) - 1)
        )
    except KeyError as error:
        raise ConfigError(f"VAE {name!r} is no AutoencoderKL: its config.json says nothing of {error}") from None
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"VAE {name!r} cannot be loaded as a hub name or a local folder: {reason}") from None


@dataclass(kw_only=True)
class LatentStatistics:
    """Mean and standard deviation, channel by channel, of samples from raw latents, over many images."""

    count: int = 0  # latent pixels
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the means, float64 [C]
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the squared means and deviations, float64 [C]

    def add(self, raw: np.ndarray) -> None:
        """Take in raw latents [N, 2C, H, W], mean and standard deviation for each latent pixel."""
        mean, std = np.split(raw.astype(np.float64), 2, axis=1)
        self.merge(
            LatentStatistics(
                count=mean.shape[0] * mean.shape[2] * mean.shape[3],
                sums=mean.sum((0, 2, 3)),
                squares=(mean**2 + std**2).sum((0, 2, 3)),
            )
        )

    def merge(self, other: "LatentStatistics") -> None:
        """Take in what `other` has seen."""
        self.count += other.count
        self.sums = other.sums if self.sums.size == 0 else self.sums + other.sums
        self.squares = other.squares if self.squares.size == 0 else self.squares + other.squares

    @property
    def mean(self) -> list[float]:
        """Means, [C]."""
        return [float(value) for value in self.sums / self.count]

    @property
    def std(self) -> list[float]:
        """Standard deviations, [C]: that of the means and that around them."""
        variance = self.squares / self.count - (self.sums / self.count) ** 2
        return [float(value) for value in np.sqrt(np.maximum(variance, 0))]


def statistics_of(dataset: ImageFolderDataset, max_items: int | None = None) -> LatentStatistics:
    """The statistics of a data set of raw latents, over `max_items` spread evenly, or all."""
    statistics = LatentStatistics()
    count = min(len(dataset), max_items or len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    for part in np.array_split(chosen, -(-count // 64)):
        statistics.add(dataset.read_batch(part.tolist())[0])
    return statistics


@torch.no_grad()
def measured_encoder(
    encoder: StabilityVAEEncoder, dataset: ImageFolderDataset, device: torch.device
) -> StabilityVAEEncoder:
    """The encoder of the same VAE with the statistics of this data set of pixels, from up to MEASURED_IMAGES of it."""
    statistics = LatentStatistics()
    count = min(len(dataset), MEASURED_IMAGES)
    for part in np.array_split(np.linspace(0, len(dataset) - 1, count).astype(int), -(-count // encoder.batch_size)):
        pixels = torch.from_numpy(rgb(dataset.read_batch(part.tolist())[0])).to(device)
        statistics.add(encoder.encode_pixels(pixels).cpu().numpy())
    return encoder.with_statistics(statistics.mean, statistics.std)


def vae_encoder(
    dataset: ImageFolderDataset, vae: str, *, batch_size: int = 8, pixel_min: float = 0
) -> StabilityVAEEncoder:
    """An encoder for the pixels of `dataset` by the VAE called `vae`.

    The statistics of a VAE other than the published one are placeholders: only its number of channels is known before
    it has seen the data. Raises ConfigError where the VAE cannot take these images.
    """
    if dataset.holds_latents:
        raise ConfigError(f"{dataset.name} holds latents already, and a VAE takes pixels")
    if dataset.num_channels not in (1, 3):
        raise ConfigError(f"{dataset.name} has {dataset.num_channels} channels; a VAE takes grey (1) or RGB (3) images")
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
    """The name of a VAE as a data set or snapshot remembers it: a local folder is found from elsewhere too."""
    return os.path.abspath(vae) if os.path.isdir(vae) else vae


def _require_power_of_two(dataset: ImageFolderDataset) -> None:
    side = dataset.resolution
    if side & (side - 1):
        raise ConfigError(
            f"{dataset.name} holds images of {side}x{side}, which is no power of two, as networks need: {CONVERT_HINT}"
        )


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels [N, 1 or 3, H, W] as [N, 3, H, W], grey ones three times."""
    return pixels if pixels.shape[1] == 3 else np.repeat(pixels, 3, axis=1)


def encoder_of(dataset: ImageFolderDataset) -> Encoder:
    """The encoder that belongs to a data set: as its dataset.json says, or the published ones.

    Raises ConfigError where a data set of latents is none that this encoder knows.
    """
    _require_power_of_two(dataset)
    if not dataset.holds_latents:
        return StandardRGBEncoder()
    entry = dataset.encoder_entry
    encoder = StabilityVAEEncoder() if entry is None else read_encoder(entry, f"{dataset.name}: dataset.json")
    expected = 2 * len(encoder.scale)
    if dataset.num_channels != expected:
        hint = "" if entry else "; dataset.json says of no other VAE (dataset_tool.py encode --measure notes it)"
        raise ConfigError(
            f"{dataset.name} holds latents of {dataset.num_channels} channels, not {expected}: mean and standard"
            f" deviation of {expected // 2} each are needed{hint}"
        )
    return encoder


def encoder_entry(encoder: StabilityVAEEncoder) -> dict[str, Any]:
    """What dataset.json says of the encoder: its class and all its arguments that matter."""
    return described(encoder)


def read_encoder_file(path: Path) -> StabilityVAEEncoder:
    """The encoder that the JSON file `path` describes, as `encoder_entry` does. Raises ConfigError."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read, remove it to have it made anew: {one_line(error)}") from None
    return read_encoder(entry, str(path))


def read_encoder(entry: Mapping[str, Any], where: str) -> StabilityVAEEncoder:
    """The encoder that `entry` describes. Raises ConfigError, naming the file `where`, for anything else."""
    try:
        encoder = build_encoder(str(entry.get("class")), (), plain(dict(entry["arguments"]), "its encoder"))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where} describes no known encoder: {one_line(error)[:300]}") from None
    if not isinstance(encoder, StabilityVAEEncoder):
        raise ConfigError(f"{where} describes {type(encoder).__name__}, which makes no latents")
    return encoder
