"""What lies between stored images and what the network sees.

Raw pixels [N, C, H, W] --encode_pixels--> raw latents --encode_latents--> final latents --decode--> raw pixels

A data set stores raw pixels or raw latents. Final latents have zero mean and a standard deviation of about sigma_data.

Snapshots carry the text of this file, and the published code base executes it to read them. Therefore it imports
nothing but the standard library, NumPy, torch and torch_utils.persistence at its top.
"""

from __future__ import annotations  # the published code base supports Python 3.9

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_utils import persistence


class Encoder:
    """Between pixels and latents. This class is the interface, with raw pixels being the raw latents."""

    def init(self, device: torch.device | str) -> None:
        """Load now what `encode_pixels` and `decode` would load when first called."""

    def encode(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Raw pixels to final latents."""
        return self.encode_latents(self.encode_pixels(x), eps)

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Raw pixels to raw latents."""
        return x

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Raw latents to final latents, float32.

        Where that is random, `eps` is the standard normal draw, of the result's shape; None draws it here.
        """
        raise NotImplementedError

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents to raw pixels, uint8."""
        raise NotImplementedError


@persistence.persistent_class
class StandardRGBEncoder(Encoder):
    """Pixels 0..255 of any number of channels to and from -1..1."""

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 0..255 to float32 -1..1; `eps` plays no part."""
        return x.to(torch.float32) / 127.5 - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """-1..1 to uint8 0..255."""
        # 128 and a cut, where 127.5 and rounding would differ only for ties.
        return (x.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)


@persistence.persistent_class
class StabilityVAEEncoder(Encoder):
    """Latents of a pre-trained VAE of the diffusers library.

    Raw latents [N, 2C, H/8, W/8] are the VAE's mean and standard deviation for each pixel, one after the other. Final
    latents [N, C, H/8, W/8] are a sample from that distribution, scaled channel by channel. The VAE is loaded when
    pixels are first involved, and never stored: only its name is.

    vae_name:              name on the Hugging Face hub, or a local folder in the diffusers layout.
    raw_mean, raw_std:     statistics of the raw latents' samples, per channel.
    final_mean, final_std: what the final latents shall have, for all channels or per channel.
    batch_size:            images that go through the VAE at once.
    pixel_min:             what a black pixel is to the VAE, white being 1. The published networks were trained on what
                           the VAE makes of 0..1, so 0 it is for them; most VAEs were themselves trained on -1..1.
    """

    def __init__(
        self,
        vae_name: str = "stabilityai/sd-vae-ft-mse",
        raw_mean: Sequence[float] = (5.81, 3.25, 0.12, -2.15),
        raw_std: Sequence[float] = (4.17, 4.62, 3.71, 3.28),
        final_mean: float | Sequence[float] = 0,
        final_std: float | Sequence[float] = 0.5,
        batch_size: int = 8,
        pixel_min: float = 0,
    ) -> None:
        if not -1 <= pixel_min < 1:
            raise ValueError(f"pixel_min={pixel_min} must be from -1 to below 1")
        if len(raw_mean) != len(raw_std):
            raise ValueError(f"raw_mean has {len(raw_mean)} channels and raw_std {len(raw_std)}; give one of each")
        scale = np.asarray(final_std, dtype=np.float32) / np.asarray(raw_std, dtype=np.float32)
        bias = np.asarray(final_mean, dtype=np.float32) - np.asarray(raw_mean, dtype=np.float32) * scale
        self.vae_name = vae_name
        # Plain numbers, since pickled arrays name modules that differ between NumPy 1 and 2.
        self.scale: list[float] = scale.tolist()
        self.bias: list[float] = bias.tolist()
        self.batch_size = int(batch_size)
        self.pixel_min = float(pixel_min)
        self._vae: Any = None

    # How to decode, see `with_decoder`. Here and not in the state: how one program decodes is no part of the encoder.
    _decoder_dtype: torch.dtype = torch.float32
    _decoder_tile: int | None = None
    _decoder_batch: int | None = None
    _decoder_vae: Any = None  # what decodes, where that is not `_vae` as it is
    _decoder_tried: bool = False  # whether half precision has been seen to give numbers

    def __getstate__(self) -> dict[str, Any]:
        """The state without the VAE's weights."""
        return {**{key: value for key, value in self.__dict__.items() if not key.startswith("_decoder_")}, "_vae": None}

    def init(self, device: torch.device | str) -> None:
        """Load the VAE, from the hub's cache if it is there. Raises ConfigError where that is impossible."""
        if self._vae is None:
            self._vae = _load_vae(self.vae_name).eval().requires_grad_(False)
        self._vae.to(device)
        if self._decoder_vae is not None:
            self._decoder_vae.to(device)
        elif self._decoder_dtype != torch.float32 or self._decoder_tile is not None:
            self._decoder_vae = _decoding_copy(self._vae, self._decoder_dtype, self._decoder_tile)

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] to raw latents, float32."""

        def run(part: torch.Tensor) -> torch.Tensor:
            pixels = part.to(torch.float32) / 255
            if self.pixel_min:
                pixels = torch.lerp(torch.full_like(pixels, self.pixel_min), torch.ones_like(pixels), pixels)
            distribution = self._vae.encode(pixels)["latent_dist"]
            return torch.cat([distribution.mean, distribution.std], dim=1)

        return self._in_batches(run, x)

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """A scaled sample from the distributions that the raw latents describe."""
        if x.shape[1] != 2 * len(self.scale):
            raise _user_error(
                f"raw latents have {x.shape[1]} channels, but the encoder expects {2 * len(self.scale)}: mean and "
                f"standard deviation of {len(self.scale)} channels"
            )
        mean, std = x.to(torch.float32).chunk(2, dim=1)
        if eps is None:
            eps = torch.randn_like(mean)
        if eps.shape != mean.shape:
            raise ValueError(f"eps has shape {list(eps.shape)}; it must be {list(mean.shape)}")
        return (mean + eps * std) * self._per_channel(self.scale, x) + self._per_channel(self.bias, x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents to uint8 [N, 3, H, W]."""
        x = (x.to(torch.float32) - self._per_channel(self.bias, x)) / self._per_channel(self.scale, x)
        pixels = self._in_batches(self._decoded, x, self._decoder_batch or self.batch_size)
        if self.pixel_min:
            pixels = (pixels - self.pixel_min) / (1 - self.pixel_min)
        return (pixels.clamp(0, 1) * 255).to(torch.uint8)

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents to its pixels, float32."""
        vae = self._vae if self._decoder_vae is None else self._decoder_vae
        pixels = vae.decode(x.to(self._decoder_dtype))["sample"].to(torch.float32)
        if self._decoder_dtype == torch.float16 and not self._decoder_tried:
            # Activations of some VAEs are too large for float16. It shows in whatever they decode: one look is enough.
            self._decoder_tried = True
            if not bool(pixels.isfinite().all()):
                self._decoder_dtype, self._decoder_vae = torch.float32, None
                self.init(x.device)
                return self._decoded(x)
        return pixels

    def _in_batches(
        self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch_size: int | None = None
    ) -> torch.Tensor:
        self.init(x.device)
        return torch.cat([run(part) for part in x.split(batch_size or self.batch_size)])

    def with_decoder(
        self, dtype: torch.dtype = torch.float32, *, tile: int | None = None, batch_size: int | None = None
    ) -> StabilityVAEEncoder:
        """The same encoder with another way of decoding; what is loaded is shared, as far as that goes.

        dtype:      what the decoder computes in. Where the first images overflow in float16, it is float32.
        tile:       images larger than this many pixels are decoded in overlapping square tiles, blended into each
                    other: bounded memory, slightly different images, since the VAE sees a tile at a time.
        batch_size: images that go through the decoder at once (default: that of the encoder).
        """
        if (dtype, tile, batch_size) == (self._decoder_dtype, self._decoder_tile, self._decoder_batch):
            return self
        other: StabilityVAEEncoder = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._decoder_dtype, other._decoder_tile, other._decoder_batch = dtype, tile, batch_size
        other._decoder_vae, other._decoder_tried = None, False
        return other

    def with_statistics(self, raw_mean: Sequence[float], raw_std: Sequence[float]) -> StabilityVAEEncoder:
        """An encoder of the same VAE for latents of these statistics, to a mean of 0 and a deviation of one half."""
        return StabilityVAEEncoder(
            self.vae_name, raw_mean, raw_std, batch_size=self.batch_size, pixel_min=self.pixel_min
        )

    @staticmethod
    def _per_channel(values: list[float], x: torch.Tensor) -> torch.Tensor:
        # Filled on the device: no copy from the host, which would wait for all work in flight.
        filled = [torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=x.device) for value in values]
        return torch.cat(filled, dim=1)


def _decoding_copy(vae: Any, dtype: torch.dtype, tile: int | None) -> Any:
    """`vae` with a decoder in `dtype` that decodes in tiles of so many pixels; the rest of it is shared."""
    result = copy.copy(vae)
    result.__dict__["_modules"] = dict(vae._modules)
    for name, module in vae._modules.items():
        if name in ("post_quant_conv", "decoder") and module is not None:
            module = copy.deepcopy(module).to(dtype)
            on_gpu = any(parameter.is_cuda for parameter in module.parameters())
            result._modules[name] = module.to(memory_format=torch.channels_last) if on_gpu else module
    if tile is not None:
        downscale = 1 << (len(vae.config["block_out_channels"]) - 1)
        # Tiles overlap by a quarter, which must be whole pixels of the latents.
        if tile < 1 or tile % (4 * downscale):
            raise _user_error(f"tiles of {tile} pixels cannot be decoded; the VAE needs a multiple of {4 * downscale}")
        result.use_tiling = True
        result.tile_sample_min_size, result.tile_latent_min_size = tile, tile // downscale
    return result


def _load_vae(name: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise _user_error(
            f'VAE {name!r} needs the diffusers library, which is not installed; try: pip install "edm2[vae]"'
        ) from None
    try:
        return AutoencoderKL.from_pretrained(
            name,
            use_safetensors=True,  # weights are data, never a pickle
            low_cpu_mem_usage=False,  # needs a further library, and says so at length where that is missing
        )
    except Exception as error:  # not found, no network, foreign or damaged files, weights of another shape
        reason = " ".join(str(error).split())[:300]
        raise _user_error(f"VAE {name!r} cannot be loaded as a hub name or a local folder: {reason}") from None


def _user_error(message: str) -> ValueError:
    try:
        from dnnlib.errors import ConfigError
    except ImportError:  # in the published code base, where this text runs out of a snapshot
        return ValueError(message)
    return ConfigError(message)
