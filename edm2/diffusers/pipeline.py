"""From classes to images, as a pipeline of the diffusers library.

Shape legend: N images, C channels, H x W pixels, L labels; latents and images may differ in C, H and W.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput, is_accelerate_available

from dnnlib import hub
from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean, shortened
from edm2.diffusers.pipeline_inputs import Randomness, count_images, source_images
from edm2.diffusers.scheduler import EDM2HeunScheduler
from edm2.diffusers.unet import EDM2UNet
from training.condition.conditioning import Conditioning, conditioning_of, require_same_condition
from training.encoders import Encoder, StabilityVAEEncoder
from training.fast.prepare import PrepareNetwork
from training.networks_edm2 import Precond
from training.sampling.denoisers import SELF, WithoutLabels, as_list, conditioned, map_networks
from training.sampling.generation import class_index
from training.sampling.guidance import Guidance
from training.sampling.networks import require_label_dropout, require_matching_guide
from training.snapshot import load_snapshot
from training.snapshot.locate import locate_network

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class EDM2PipelineOutput(BaseOutput):
    """`images`: as `output_type` asks. `class_labels`: the classes [N], or weights [N, L] as they were given."""

    images: Any
    class_labels: torch.Tensor | None = None


class _Denoiser:
    """An EDM2UNet called as D = net(x, sigma, labels), like a Precond but through its hooks."""

    def __init__(self, network: EDM2UNet) -> None:
        self.network = network
        self.cond_channels = network.cond_channels

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None, **condition: torch.Tensor
    ) -> torch.Tensor:
        result: torch.Tensor = self.network(x, sigma, labels, return_dict=False, **condition)[0]
        return result


def _prepared(network: Any, device: torch.device) -> Any:
    """Return `network` prepared for sampling; as it is, if it is of another kind or hooks may change its weights."""
    inner = network.network if isinstance(network, _Denoiser) else network
    if type(inner) is EDM2UNet and not _has_hooks(inner):
        inner = inner.denoiser
    return PrepareNetwork()(inner, device) if type(inner) is Precond and not _has_hooks(inner) else network


def _has_hooks(network: torch.nn.Module) -> bool:
    parts = network.modules()
    return any(hasattr(part, "_hf_hook") or part._forward_hooks or part._forward_pre_hooks for part in parts)


def _guidance(
    scale: float, num_guides: int, shares: tuple[float, ...] | None, interval: tuple[float, float] | None
) -> Guidance:
    """Return the guidance of a pipeline's arguments; a ConfigError has their names."""
    if scale != 1 and not num_guides:
        raise ConfigError(f"guidance_scale={scale:g} needs a guiding network; add guide=..., or use guidance_scale=1")
    try:
        return Guidance(weight=scale, num_guides=num_guides, shares=shares, interval=interval)
    except ConfigError as error:
        names = {"guidance=": "guidance_scale=", "the guidance interval": "guidance_interval", "shares": "guide_shares"}
        text = str(error)
        for name, own in names.items():
            text = re.sub(rf"(?<![_\w]){name}", own, text)
        raise ConfigError(text) from None


class EDM2Pipeline(DiffusionPipeline):
    """Samples EDM2 networks as generate_images.py does; see `__call__`.

    `vae` is for networks of latents. If it is None, the one that `unet` names is loaded when it is needed (`load_vae`).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (a list to the library, which adds it to others)

    def __init__(self, unet: EDM2UNet, scheduler: EDM2HeunScheduler, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "EDM2Pipeline":
        """Load a folder, or user/name[@revision] from the hub. Weights in pickles are not read.

        Downloads from the hub are our own, since diffusers refuses repositories with classes that it does not have.
        Raises ConfigError if neither the hub nor the cache has it.
        """
        if not os.path.isdir(pretrained_model_name_or_path):
            folder = _fetch(str(pretrained_model_name_or_path), kwargs.pop("revision", None))
            pretrained_model_name_or_path = folder
        kwargs.setdefault("use_safetensors", True)
        if not is_accelerate_available():
            kwargs.setdefault("low_cpu_mem_usage", False)  # the default logs a long request to install it
        pipeline: EDM2Pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return pipeline

    @classmethod
    def from_network(cls, source: str | os.PathLike[str]) -> "EDM2Pipeline":
        """Return a pipeline of any network that `load_snapshot` reads: .pkl, .safetensors, folder, URL or hub name."""
        return cls(EDM2UNet.from_snapshot(load_snapshot(source)), EDM2HeunScheduler())

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guide: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 32,
        output_type: str = "pil",
        *,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide_shares: Sequence[float] | None = None,
        latents: torch.Tensor | None = None,
        decode_batch_size: int = 4,
        image: Any = None,
        mask_image: Any = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        return_dict: bool = True,
    ) -> EDM2PipelineOutput | tuple[Any, torch.Tensor | None]:
        """Generate N images: N from classes, generators, `latents` or `batch_size`, else from a list `image`, else 1.

        class_labels: one class for all, one for each, or weights [N, L] (zeros: no class). None draws them from the
            generators, after the noise.
        guidance_scale, guide: D = D_guide + scale (D_main - D_guide), with 1 for none. The guide is another pipeline,
            EDM2UNet, network, file, folder, URL or hub name, or a list of them, with `guide_shares` that add up to 1.
            "self" is this pipeline's network without labels, if its file says it was trained with label dropout.
        generator: one for each image makes image i the one that generate_images.py makes from seed i, if it was seeded
            with that seed on the same kind of device. A single one draws all images in turn.
        num_inference_steps: of Heun's method, two evaluations each except for the last.
        output_type: pil (a list), np (float32 [N, H, W, C] from 0 to 1), pt (float32 [N, C, H, W] from 0 to 1), or
            latent (the network's output [N, C, H, W], float32).
        guidance_interval: guide only the steps that start at noise levels in (low, high], which may be rounded levels.
        latents: standard normal noise [N, C, H, W] to start from, in place of drawn noise.
        image, mask_image: for a network that is conditioned on images (docs/condition.md): a PIL image, a list of them,
            or a path as for generate_images.py --source and --masks. Image i is made from source image i, and after the
            last the first comes again.
        callback_on_step_end: called as callback(pipeline, evaluation, sigma, {"latents": x}) after every evaluation of
            the network. It may return a dictionary with latents to continue from.

        Raises ConfigError, a ValueError, for invalid values.
        """
        if output_type not in OUTPUT_TYPES:
            known, meant = ", ".join(OUTPUT_TYPES), did_you_mean(output_type, OUTPUT_TYPES)
            raise ConfigError(f"output_type={output_type!r} is unknown; choose from {known}{meant}")
        guides = as_list(guide)
        shares = None if guide_shares is None else tuple(guide_shares)
        guidance = _guidance(guidance_scale, len(guides), shares, guidance_interval)
        default = len(image) if isinstance(image, list | tuple) else 1
        num_images = count_images(class_labels, generator, latents, batch_size, default)
        device = self._execution_device
        conditioning = self._conditioning(image, mask_image, num_images)
        if guidance.weight == 1:
            guides, guidance = [], Guidance()
        net = _Denoiser(self.unet)
        networks = [net, *(self._guide(item, net, device) for item in guides)]
        networks = map_networks(lambda network: _prepared(network, device), networks)  # for this call only
        if conditioning is not None:
            networks = conditioned(networks, conditioning.images(range(num_images), device))
        noise, classes = self._draw(generator, latents, class_labels, num_images, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        guidance = guidance.on_schedule(self.scheduler.evaluated)
        denoise = guidance.denoiser(networks[0], networks[1:], self._weights(classes))
        x = noise * self.scheduler.init_noise_sigma
        for index, (sigma, timestep) in enumerate(
            self.progress_bar(list(zip(self.scheduler.evaluated, self.scheduler.timesteps, strict=True)))
        ):
            denoised = denoise(x, sigma, self.scheduler.step_sigma)
            x = self.scheduler.step(denoised, timestep, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, index, timestep, {"latents": x}) or {}).get("latents", x)
        images = self._finish(x, output_type, decode_batch_size, conditioning)
        self.maybe_free_model_hooks()
        return EDM2PipelineOutput(images=images, class_labels=classes) if return_dict else (images, classes)

    def load_vae(self) -> None:
        """Load the VAE that a network of latents names, and make it a component, unless the pipeline has one."""
        encoder = self.unet.make_encoder()
        if self.vae is None and isinstance(encoder, StabilityVAEEncoder):
            encoder.init(self._execution_device)
            self.register_modules(vae=encoder._vae)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Enable it as DiffusionPipeline does; the VAE is loaded first, so that it takes part."""
        self.load_vae()
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Enable it as DiffusionPipeline does; the VAE is loaded first, so that it takes part."""
        self.load_vae()
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def _conditioning(self, image: Any, mask_image: Any, num_images: int) -> Conditioning | None:
        return conditioning_of(
            self.unet.denoiser,
            self.unet.condition,
            source_images(image, mask_image, self.unet.img_channels),
            None,
            num_images=num_images,
            names=("image", "mask_image"),
        )

    def _guide(self, source: Any, net: _Denoiser, device: torch.device) -> Any:
        if isinstance(source, str) and source == SELF:
            info = (self.unet.config.snapshot or {}).get("info")
            require_label_dropout(self.unet.label_dim, info or {}, "this pipeline's network", "guide='self'")
            return WithoutLabels(net)
        network = source.unet if isinstance(source, DiffusionPipeline) else source
        condition = network.condition if isinstance(network, EDM2UNet) else None
        if isinstance(source, str | os.PathLike):
            snapshot = load_snapshot(os.fspath(source), device=device)
            network, condition = snapshot.net, snapshot.info.get("condition")
        if not isinstance(network, torch.nn.Module):
            raise ConfigError(f"guide={shortened(source)} is not a network, pipeline, file, folder, URL or hub name")
        plain = network.denoiser if isinstance(network, EDM2UNet) else network
        require_same_condition(self.unet.denoiser, self.unet.condition, plain, condition)
        require_matching_guide(self.unet.denoiser, plain)
        if isinstance(network, torch.nn.Module) and not hasattr(network, "_hf_hook"):
            network.to(device)
        return _Denoiser(network) if isinstance(network, EDM2UNet) else network

    def _draw(
        self, generator: Any, latents: torch.Tensor | None, class_labels: Any, num_images: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the noise [N, C, H, W], and the classes [N] or weights [N, L]: drawn in this order, or as given."""
        shape = (self.unet.img_channels, *self.unet.img_resolution)
        random = Randomness(generator, num_images, device)
        noise = random.normal(shape)
        classes = random.integers(self.unet.label_dim) if self.unet.label_dim else None
        if latents is not None:
            if tuple(latents.shape[1:]) != shape:
                raise ConfigError(f"latents of shape {list(latents.shape)} do not fit; give {[num_images, *shape]}")
            noise = latents.to(device, torch.float32)
        return noise, classes if class_labels is None else self._labels(class_labels, num_images, device)

    def _labels(self, given: Any, num_images: int, device: torch.device) -> torch.Tensor:
        num_classes = self.unet.label_dim
        if not num_classes:
            raise ConfigError("the network is unconditional and takes no class; leave out class_labels")
        names = ((self.unet.config.snapshot or {}).get("info") or {}).get("classes") or []
        indices = given
        if isinstance(given, str | list | tuple):
            each = [class_index(name, names, num_classes) for name in ([given] if isinstance(given, str) else given)]
            indices = each[0] if isinstance(given, str) else each
        try:
            labels = torch.as_tensor(indices, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"class_labels={given!r} names no classes; give numbers below {num_classes}") from None
        if labels.is_floating_point():
            if labels.shape != (num_images, num_classes):
                expected = [num_images, num_classes]
                raise ConfigError(f"class weights of shape {list(labels.shape)} do not fit; give {expected}")
            return labels
        labels = labels.reshape(-1).to(torch.int64).expand(num_images)
        if not bool(((labels >= 0) & (labels < num_classes)).all()):
            raise ConfigError(f"class_labels={given} is out of range; the network knows classes 0 to {num_classes - 1}")
        return labels

    def _weights(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None or labels.is_floating_point():
            return labels
        return torch.nn.functional.one_hot(labels, self.unet.label_dim).to(torch.float32)  # [N] -> [N, L]

    def _finish(
        self, latents: torch.Tensor, output_type: str, decode_batch_size: int, conditioning: Conditioning | None
    ) -> Any:
        if output_type == "latent":
            return latents
        encoder = self._decoder()
        pixels = torch.cat([encoder.decode(part) for part in latents.split(decode_batch_size)])  # uint8
        if conditioning is not None:
            pixels = conditioning.finish(pixels, range(len(pixels)))
        if output_type == "pt":
            return pixels.to(torch.float32) / 255
        rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return rows.astype(np.float32) / 255
        if rows.shape[3] > 4:
            raise ConfigError(f"images of {rows.shape[3]} channels do not fit PIL; use output_type='np' or 'pt'")
        return [PIL.Image.fromarray(row.squeeze(2) if row.shape[2] == 1 else row) for row in rows]

    def _decoder(self) -> Encoder:
        self.load_vae()
        encoder = self.unet.make_encoder()
        if isinstance(encoder, StabilityVAEEncoder):
            encoder._vae = _PlacedVAE(self.vae)
        return encoder


class _PlacedVAE:
    """A VAE whose device and type the pipeline manages, called with float32 as the encoder does."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae

    def to(self, device: torch.device | str) -> "_PlacedVAE":
        """Do nothing: hooks move it, or it is on the device already."""
        return self

    def decode(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode latents in the VAE's own scale to pixels in its own scale."""
        return {"sample": self._vae.decode(latents.to(self._vae.dtype))["sample"].to(torch.float32)}


def _fetch(source: str, revision: str | None) -> Path:
    name = hub.parse_hub_url(source) if hub.is_hub_url(source) else hub.parse_repository(source)
    if name is None:
        raise ConfigError(f"'{source}' is neither a folder nor a name on the hub, such as user/name")
    if name.file is not None:
        raise ConfigError(f"'{source}' is a file; EDM2Pipeline.from_network makes a pipeline of it")
    name = name if revision is None else replace(name, revision=revision)
    return locate_network(str(name))
