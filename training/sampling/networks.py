"""The networks of a request: loaded, checked against each other, prepared for sampling; and how latents are decoded."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean
from torch_utils.compiling import missing_compiler
from training.condition.conditioning import require_same_condition
from training.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.images.png import require_png_channels
from training.networks_edm2 import image_size
from training.sampling.denoisers import SELF, WithoutLabels, map_networks
from training.snapshot import label_dropout, load_snapshot
from training.snapshot.code import TrustCode

# Prepares a loaded network for sampling, on the device given. The result keeps img_channels, img_resolution and
# label_dim. If it has a true attribute `fixed_batch`, it only gets batches of one size.
Prepare = Callable[[Any, torch.device], Any]

DECODER_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LoadedNetworks:
    """The networks of a request on their device, and what the main network's file says besides."""

    net: Any
    guides: list[Any]
    encoder: Encoder | None
    condition: str | None  # what `net` is conditioned on, see training/condition/spec.py
    class_names: list[str]  # in the order of the indices; empty if the file has none

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what `net` makes, in pixels or latents."""
        return image_size(self.net)


def load_network(source: Any, device: torch.device, own_networks: Sequence[str] = ()) -> Any:
    """Return a network on `device`: from a snapshot's path or URL, or as given. `own_networks`: see `load_snapshot`."""
    return _load(source, device, None, own_networks)[0]


def load_networks(
    source: Any,
    guides: Sequence[Any],
    device: torch.device,
    trust_code: TrustCode | None,
    *,
    unlabelled: bool,
    condition: str | None,
    own_networks: Sequence[str] = (),
) -> LoadedNetworks:
    """Load the main network and its guides likewise. The guide 'self' is the main network without labels.

    `unlabelled`: images are generated without labels. `condition` replaces what the file says. For `own_networks` see
    `load_snapshot`. Raises ConfigError if networks do not fit together, or if the main one must do without labels and
    its file does not say that it can.
    """
    net, encoder, info = _load(source, device, trust_code, own_networks)
    for use, applies in (("--gnet=self", any(map(_is_self, guides))), ("--class=none", unlabelled)):
        if applies:
            require_label_dropout(net.label_dim, info, source, use)
    condition = _condition(info) if condition is None else condition
    loaded = []
    for guide in guides:
        if _is_self(guide):
            loaded.append(WithoutLabels(net))
            continue
        guide, _, guide_info = _load(guide, device, trust_code, own_networks)
        require_same_condition(net, condition, guide, _condition(guide_info))
        require_matching_guide(net, guide)
        loaded.append(guide)
    return LoadedNetworks(
        net=net, guides=loaded, encoder=encoder, condition=condition, class_names=class_names(info or {})
    )


def class_names(info: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes from the `info` of a network's file, in order; empty if it has none."""
    names = info.get("classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def prepare_networks(prepare: Prepare, networks: Sequence[Any], device: torch.device) -> list[Any]:
    """Return all networks prepared, each one once."""
    return map_networks(lambda network: prepare(network, device), networks)


def require_matching_guide(net: Any, gnet: Any) -> None:
    """Raise ConfigError if the guide takes other images or labels than the main network."""
    shapes = [(n.img_channels, *image_size(n)) for n in (net, gnet)]
    if shapes[0] != shapes[1]:
        main, guide = ("x".join(map(str, shape)) for shape in shapes)
        raise ConfigError(f"the guide is for images of {guide} (channels, height, width), the main network for {main}")
    if gnet.label_dim not in (0, net.label_dim):
        raise ConfigError(
            f"the guide knows {gnet.label_dim} classes and the main network {net.label_dim}; "
            "a guide must be unconditional or have the same classes"
        )
    channels, guide_channels = (getattr(n, "cond_channels", 0) for n in (net, gnet))
    if guide_channels not in (0, channels):
        raise ConfigError(
            f"the guide is conditioned on images of {guide_channels} channels and the main network on {channels}; "
            "a guide must take the same images or none"
        )


def require_label_dropout(label_dim: int, info: Mapping[str, Any] | None, name: Any, use: str) -> None:
    """Raise ConfigError unless the network called `name`, with labels [N, label_dim], can do without, as `use` needs.

    `info`: what its file says; None if the caller made or loaded the network and knows how it was trained.
    """
    if label_dim == 0:
        raise ConfigError(f"{use} leaves out labels, but the network is unconditional; give a conditional network")
    if info is not None and not label_dropout(info):
        raise ConfigError(
            f"{use} needs a network that knows images without labels, and {name} does not say that it was trained with"
            " --label-dropout; train with --label-dropout=0.1, or add an unconditional network as the guide"
        )


def require_writable_images(net: Any, encoder: Encoder | None) -> None:
    """Raise ConfigError if the images of `net` cannot be written as PNG. Decoders of latents give RGB."""
    if encoder is None or isinstance(encoder, StandardRGBEncoder):
        require_png_channels(net.img_channels)


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Precision and tiles of the VAE's decoder. Raises ConfigError for unknown values."""

    precision: str = "auto"  # fp32, tf32, fp16 or bf16; auto = fp16 on CUDA, fp32 elsewhere
    tile: int | None = None  # side in pixels of the tiles that larger images are decoded in; None = whole images

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *DECODER_DTYPES):
            known = ("auto", *DECODER_DTYPES)
            meant = did_you_mean(self.precision, known)
            raise ConfigError(f"--decoder-precision={self.precision} is unknown; choose from {', '.join(known)}{meant}")
        if self.tile is not None and self.tile < 1:
            raise ConfigError(f"--decoder-tile={self.tile} must be a number of pixels, such as 512")

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are not at their defaults, for a record of results."""
        precision = {} if self.precision == "auto" else {"decoder_precision": self.precision}
        return precision | ({} if self.tile is None else {"decoder_tile": self.tile})

    def apply(
        self, encoder: Encoder, device: torch.device, batch_size: int, *, compile: bool = False
    ) -> tuple[Encoder, dict[str, Any]]:
        """Return the encoder that decodes like this, `batch_size` images at once, and what PNG files note of it.

        With `compile`, the decoder is compiled on CUDA, unless it decodes in tiles, which are of many sizes. Encoders
        without a network, and foreign ones, stay as they are.
        """
        if not isinstance(encoder, StabilityVAEEncoder):
            return encoder, {}
        name = self.precision
        if name == "auto":
            name = "fp16" if device.type == "cuda" else "fp32"
        on_gpu = device.type == "cuda"
        encoder = encoder.with_decoder(
            DECODER_DTYPES[name],
            tile=self.tile,
            batch_size=batch_size,
            tf32=on_gpu and name == "tf32",
            compile=on_gpu and compile and self.tile is None and missing_compiler(device) is None,
        )
        return encoder, {"decoder": None if name == "fp32" else name, "decoder_tile": self.tile}


def _load(
    source: Any, device: torch.device, trust_code: TrustCode | None, own_networks: Sequence[str]
) -> tuple[Any, Encoder | None, dict[str, Any] | None]:
    """Return a network, its encoder, and what a snapshot says of its training; None for networks given in memory."""
    if isinstance(source, str | os.PathLike):
        snapshot = load_snapshot(os.fspath(source), trust_code, device=device, own_networks=own_networks)
        return snapshot.net, snapshot.encoder, snapshot.info
    return (source.to(device) if isinstance(source, torch.nn.Module) else source), None, None


def _condition(info: dict[str, Any] | None) -> str | None:
    condition = None if info is None else info.get("condition")
    return condition if isinstance(condition, str) else None


def _is_self(guide: Any) -> bool:
    return isinstance(guide, str) and guide == SELF
