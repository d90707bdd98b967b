"""Encoders between stored images and the latents that the network is trained on.

Raw pixels [N, C, H, W] --encode_pixels--> raw latents --encode_latents--> final latents --decode--> raw pixels

A data set stores raw pixels or raw latents. Final latents have zero mean and a standard deviation of about sigma_data.

Snapshots carry this text, and the published reader executes it. It therefore imports only the standard library, NumPy,
torch and torch_utils.persistence at the top.
"""

from __future__ import annotations  # the published code base supports Python 3.9

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_utils import persistence


class Encoder:
    """Interface of encoders. Raw pixels are the raw latents, unless a subclass encodes them."""

    def init(self, device: torch.device | str) -> None:
        """Load everything that `encode_pixels` and `decode` would load on first use."""

    def encode(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Raw pixels to final latents."""
        return self.encode_latents(self.encode_pixels(x), eps)

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Raw pixels to raw latents."""
        return x

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Raw latents to final latents, float32.

        If the encoding is random, `eps` is the standard normal draw in the result's shape; None draws it here.
        """
        raise NotImplementedError

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents to raw pixels, uint8."""
        raise NotImplementedError


@persistence.persistent_class
class StandardRGBEncoder(Encoder):
    """Pixels 0..255 of any number of channels to and from -1..1."""

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 0..255 to float32 -1..1; `eps` is not used."""
        return x.to(torch.float32) / 127.5 - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """-1..1 to uint8 0..255."""
        # Truncating after + 128 is rounding after + 127.5, except for ties.
        return (x.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)


@persistence.persistent_class
class StabilityVAEEncoder(Encoder):
    """Latents of a pre-trained VAE of the diffusers library.

    Raw latents [N, 2C, H/8, W/8] are the VAE's means and then its standard deviations. Final latents [N, C, H/8, W/8]
    are a sample from that distribution, scaled per channel. The VAE is loaded when pixels are first processed. A file
    stores its name, never its weights.

    vae_name:              name on the Hugging Face hub, or a local folder in the diffusers layout.
    raw_mean, raw_std:     statistics of the raw latents' samples, per channel.
    final_mean, final_std: target statistics of the final latents, for all channels or per channel.
    batch_size:            images that go through the VAE at once.
    pixel_min:             value of a black pixel at the VAE's input; white is 1. The published networks were trained on
                           latents of 0..1, so theirs is 0. Most VAEs were themselves trained on -1..1.
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
            raise ValueError(f"pixel_min={pixel_min} must be in [-1, 1)")
        if len(raw_mean) != len(raw_std):
            raise ValueError(
                f"raw_mean has {len(raw_mean)} channels and raw_std has {len(raw_std)}; they must be equal"
            )
        scale = np.asarray(final_std, dtype=np.float32) / np.asarray(raw_std, dtype=np.float32)
        bias = np.asarray(final_mean, dtype=np.float32) - np.asarray(raw_mean, dtype=np.float32) * scale
        self.vae_name = vae_name
        # Plain numbers, since the module names in pickled arrays differ between NumPy 1 and 2.
        self.scale: list[float] = scale.tolist()
        self.bias: list[float] = bias.tolist()
        self.batch_size = int(batch_size)
        self.pixel_min = float(pixel_min)
        self._vae: Any = None

    # How to encode, see `with_encoder`. Class attributes, which are not stored: this is the program's choice.
    _encoder_tf32: bool = True
    _encoder_compile: bool = False
    _encoder_vae: Any = None  # encodes in place of `_vae`, on a GPU

    # How to decode, see `with_decoder`.
    _decoder_dtype: torch.dtype = torch.float32
    _decoder_tf32: bool = False
    _decoder_compile: bool = False
    _decoder_tile: int | None = None
    _decoder_batch: int | None = None
    _decoder_vae: Any = None  # decodes in place of `_vae`, if that is changed
    _decoder_tried: bool = False  # True once half precision has been checked for overflow

    def __getstate__(self) -> dict[str, Any]:
        """The state to store, without the VAE's weights."""
        ours = ("_encoder_", "_decoder_")
        return {**{key: value for key, value in self.__dict__.items() if not key.startswith(ours)}, "_vae": None}

    def init(self, device: torch.device | str) -> None:
        """Load the VAE, from the hub's cache if possible. Raises ConfigError if that fails."""
        if self._vae is None:
            self._vae = _load_vae(self.vae_name).eval().requires_grad_(False)
        self._vae.to(device)
        if self._encoder_vae is not None:
            self._encoder_vae.to(device)
        changed = self._decoder_dtype != torch.float32 or self._decoder_tf32 or self._decoder_compile
        if self._decoder_vae is not None:
            self._decoder_vae.to(device)
        elif changed or self._decoder_tile is not None:
            names, compiles = ("post_quant_conv", "decoder"), self._decoder_compile
            self._decoder_vae = _working_copy(self._vae, names, self._decoder_dtype, compiles=compiles)
            if self._decoder_tile is not None:
                _set_tile(self._decoder_vae, self._decoder_tile)

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] to raw latents, float32."""

        def run(part: torch.Tensor) -> torch.Tensor:
            pixels = part.to(torch.float32) / 255
            if self.pixel_min:
                pixels = torch.lerp(torch.full_like(pixels, self.pixel_min), torch.ones_like(pixels), pixels)
            if self._encoder_vae is None and x.is_cuda:
                names, compiles = ("encoder", "quant_conv"), self._encoder_compile
                self._encoder_vae = _working_copy(self._vae, names, torch.float32, compiles=compiles)
            vae = self._vae if self._encoder_vae is None else self._encoder_vae
            distribution = vae.encode(pixels)["latent_dist"]
            return torch.cat([distribution.mean, distribution.std], dim=1)

        with _CudnnTF32(self._encoder_tf32):
            return self._in_batches(run, x, one_size=x.is_cuda and self._encoder_compile)

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Draw a sample from the distributions that the raw latents describe, and scale it."""
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
        with _CudnnTF32(True if self._decoder_tf32 else None):
            pixels = self._in_batches(self._decoded, x, self._decoder_batch, one_size=self._decoder_compile)
        if self.pixel_min:
            pixels = (pixels - self.pixel_min) / (1 - self.pixel_min)
        return (pixels.clamp(0, 1) * 255).to(torch.uint8)

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents to its pixels, float32."""
        vae = self._vae if self._decoder_vae is None else self._decoder_vae
        pixels = vae.decode(x.to(self._decoder_dtype))["sample"].to(torch.float32)
        if self._decoder_dtype == torch.float16 and not self._decoder_tried:
            # Activations of some VAEs overflow float16. They do so for any image, so one check is enough.
            self._decoder_tried = True
            if not bool(pixels.isfinite().all()):
                self._decoder_dtype, self._decoder_vae = torch.float32, None
                self.init(x.device)
                return self._decoded(x)
        return pixels

    def _in_batches(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        batch_size: int | None = None,
        *,
        one_size: bool = False,
    ) -> torch.Tensor:
        """Return run(x), computed in batches; with `one_size`, the last one is filled up by its last image."""
        self.init(x.device)
        size = batch_size or self.batch_size
        padding = -len(x) % size if one_size else 0
        padded = torch.cat([x, x[-1:].expand(padding, *x.shape[1:])]) if padding else x
        return torch.cat([run(part) for part in padded.split(size)])[: len(x)]

    def with_encoder(self, *, tf32: bool = True, compile: bool = False) -> StabilityVAEEncoder:
        """Return the same encoder with another way of encoding on GPUs. On a CPU neither changes anything.

        tf32:    convolutions round their factors to TF32, as by PyTorch's default, with which published latents were
                 made; else they compute in float32.
        compile: compile the encoder network when it is first used, which takes minutes.
        """
        if (tf32, compile) == (self._encoder_tf32, self._encoder_compile):
            return self
        other = self._copy()
        other._encoder_tf32, other._encoder_compile, other._encoder_vae = tf32, compile, None
        return other

    def with_decoder(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        tile: int | None = None,
        batch_size: int | None = None,
        tf32: bool = False,
        compile: bool = False,
    ) -> StabilityVAEEncoder:
        """Return the same encoder with another way of decoding. Loaded weights are shared as far as possible.

        dtype:      type of the decoder's computations. If the first images overflow in float16, it becomes float32.
        tile:       images with sides above this many pixels are decoded in overlapping square tiles, which are blended.
                    This limits memory and changes images slightly, since the VAE decodes one tile at a time.
        batch_size: images that go through the decoder at once (default: that of the encoder).
        tf32:       with float32 on GPUs: convolutions round their factors to TF32; else as PyTorch is set.
        compile:    compile the decoder network when it is first used, which takes minutes.
        """
        ours = (self._decoder_dtype, self._decoder_tile, self._decoder_batch, self._decoder_tf32, self._decoder_compile)
        if (dtype, tile, batch_size, tf32, compile) == ours:
            return self
        other = self._copy()
        other._decoder_dtype, other._decoder_tile, other._decoder_batch = dtype, tile, batch_size
        other._decoder_tf32, other._decoder_compile = tf32, compile
        other._decoder_vae, other._decoder_tried = None, False
        return other

    def _copy(self) -> StabilityVAEEncoder:
        other: StabilityVAEEncoder = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def with_statistics(self, raw_mean: Sequence[float], raw_std: Sequence[float]) -> StabilityVAEEncoder:
        """Return an encoder of the same VAE for latents of these statistics, to mean 0 and standard deviation 0.5."""
        other = StabilityVAEEncoder(
            self.vae_name, raw_mean, raw_std, batch_size=self.batch_size, pixel_min=self.pixel_min
        )
        return other.with_encoder(tf32=self._encoder_tf32, compile=self._encoder_compile)

    @staticmethod
    def _per_channel(values: list[float], x: torch.Tensor) -> torch.Tensor:
        # Filled on the device, since a copy from the host would wait for all work in flight.
        filled = [torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=x.device) for value in values]
        return torch.cat(filled, dim=1)


class _CudnnTF32:
    """Sets cuDNN's TF32 switch while the block runs; None leaves it. Without a GPU it has no effect."""

    def __init__(self, allowed: bool | None) -> None:
        self._allowed = allowed

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32
        if self._allowed is not None:
            torch.backends.cudnn.allow_tf32 = self._allowed

    def __exit__(self, *error: object) -> None:
        if self._allowed is not None:
            torch.backends.cudnn.allow_tf32 = self._before


def _working_copy(vae: Any, names: Sequence[str], dtype: torch.dtype, *, compiles: bool) -> Any:
    """Copy the modules `names` of `vae` in `dtype`, on a GPU in cuDNN's own layout; the rest is shared."""
    result = copy.copy(vae)
    result.__dict__["_modules"] = dict(vae._modules)
    for name in names:
        module = vae._modules.get(name)
        if module is not None:
            module = copy.deepcopy(module).to(dtype)
            if any(parameter.is_cuda for parameter in module.parameters()):
                module = module.to(memory_format=torch.channels_last)
            if compiles and name in ("encoder", "decoder"):
                module.compile(dynamic=False)
            result._modules[name] = module
    return result


def _set_tile(vae: Any, tile: int) -> None:
    """Let `vae` decode in tiles of `tile` pixels."""
    downscale = 1 << (len(vae.config["block_out_channels"]) - 1)
    # Tiles overlap by a quarter, which must be whole pixels of latents.
    if tile < 1 or tile % (4 * downscale):
        raise _user_error(f"decoder tiles of {tile} pixels must be a multiple of {4 * downscale} for this VAE")
    vae.use_tiling = True
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // downscale


def _load_vae(name: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise _user_error(
            f'VAE {name!r} needs the diffusers library, which is not installed; try: pip install "edm2[vae]"'
        ) from None
    try:
        require_on_hub(name)
        return AutoencoderKL.from_pretrained(
            name,
            use_safetensors=True,  # weights are data, never a pickle
            low_cpu_mem_usage=False,  # True needs another library, and prints a long notice if that is missing
        )
    except Exception as error:  # not found, no network, damaged files, weights of another shape
        reason = " ".join(str(error).split())[:300]
        raise _user_error(f"VAE {name!r} cannot be loaded as a hub name or a local folder: {reason}") from None


def require_on_hub(name: str) -> None:
    """Raise ConfigError if the hub cannot be reached: diffusers says half a minute later that a file is missing."""
    try:
        from dnnlib.hub import HubName, fetch_file, parse_repository
    except ImportError:  # in the published code base
        return
    if not os.path.isdir(name) and parse_repository(name) == HubName(repo=name):
        fetch_file(HubName(repo=name, file="config.json"))


def _user_error(message: str) -> ValueError:
    try:
        from dnnlib.errors import ConfigError
    except ImportError:  # in the published code base, which executes this text out of a snapshot
        return ValueError(message)
    return ConfigError(message)
