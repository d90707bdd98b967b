"""What can be asked of generation: checks of a request before anything is computed, and the classes it asks for."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training.encoders import Encoder, StandardRGBEncoder
from training.images.png_files import require_png_channels
from training.sampling.guidance import Guidance
from training.sampling.sampler import HeunOptions, choose_solver, edm_sampler
from training.snapshot import label_dropout


def image_size(net: Any) -> tuple[int, int]:
    """Height and width in pixels of what `net` denoises; its img_resolution may be one number or both."""
    size = net.img_resolution
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def deal_classes(num_seeds: int, num_classes: int) -> list[int]:
    """A class per seed, all classes equally often and each for a contiguous part of the seeds.

    Raises ConfigError where the seeds do not divide over the classes.
    """
    if num_seeds % num_classes:
        fit = -(-num_seeds // num_classes) * num_classes
        raise ConfigError(
            f"{num_seeds} seeds do not deal evenly over all {num_classes} classes; "
            f"give a multiple of {num_classes}, e.g. --seeds=0-{fit - 1}"
        )
    return [i // (num_seeds // num_classes) for i in range(num_seeds)]


def require_matching_guide(net: Any, gnet: Any) -> None:
    """Raise ConfigError if the guide takes other images or labels than the main network."""
    shapes = [(n.img_channels, *image_size(n)) for n in (net, gnet)]
    if shapes[0] != shapes[1]:
        main, guide = ("x".join(map(str, shape)) for shape in shapes)
        raise ConfigError(f"the guide is for images of {guide} (channels, height, width), the main network for {main}")
    if gnet.label_dim not in (0, net.label_dim):
        raise ConfigError(
            f"the guide knows {gnet.label_dim} classes and the main network {net.label_dim}; "
            "a guide is unconditional or has the same classes"
        )
    seen, guide_seen = (getattr(n, "cond_channels", 0) for n in (net, gnet))
    if guide_seen not in (0, seen):
        raise ConfigError(
            f"the guide sees conditioning pictures of {guide_seen} channels and the main network of {seen}; "
            "a guide sees the same ones or none"
        )


def require_label_dropout(label_dim: int, info: Mapping[str, Any] | None, name: Any, use: str) -> None:
    """Raise ConfigError unless the network called `name`, with labels [N, label_dim], knows zeros, as `use` needs it.

    `info`: what its file says; None where the caller made or loaded it, and knows how it was trained.
    """
    if label_dim == 0:
        raise ConfigError(f"{use} leaves out labels, and the network has none to leave out; give a conditional network")
    if info is not None and not label_dropout(info):
        raise ConfigError(
            f"{use} needs a network that knows images without labels, and {name} does not say that it was trained with"
            " --label-dropout; train with --label-dropout=0.1, or use an unconditional network beside it"
        )


def require_writable_images(net: Any, encoder: Encoder | None) -> None:
    """Raise ConfigError if the images of `net` cannot be written as PNG. Decoders of latents give RGB."""
    if encoder is None or isinstance(encoder, StandardRGBEncoder):
        require_png_channels(net.img_channels)


def check_request(
    seeds: list[int],
    max_batch_size: int,
    encoder_batch_size: int,
    sampler_fn: Callable[..., torch.Tensor],
    sampler_kwargs: dict[str, Any],
    *,
    num_guides: int,
) -> None:
    """Raise ConfigError for options of `generate_images` that cannot work, as far as that shows without networks."""
    if not seeds:
        raise ConfigError("there are no seeds; give at least one")
    for name, count in (("max_batch_size", max_batch_size), ("encoder_batch_size", encoder_batch_size)):
        if count < 1:
            raise ConfigError(f"{name}={count} images at once cannot be computed; ask for 1 or more")
    guided = {key: sampler_kwargs[key] for key in ("shares", "interval") if key in sampler_kwargs}
    Guidance(weight=sampler_kwargs.get("guidance", 1), num_guides=num_guides, **guided)
    if sampler_fn is edm_sampler:
        known = inspect.signature(HeunOptions).parameters
        options = HeunOptions(**{key: value for key, value in sampler_kwargs.items() if key in known})
        choose_solver(sampler_kwargs.get("solver", "heun"), options)


def is_none(class_idx: Any) -> bool:
    """Whether generate_images' `class_idx` asks for images without a class."""
    return isinstance(class_idx, str) and class_idx == "none"


def classes_per_seed(net: Any, seeds: list[int], class_idx: int | Sequence[int] | str | None) -> list[int] | None:
    """The class of each seed, from generate_images' `class_idx`; None where the seeds draw it, or none is wanted.

    Raises ConfigError.
    """
    if class_idx is None or is_none(class_idx):
        return None
    if net.label_dim == 0:
        raise ConfigError("the network is unconditional and takes no class; leave the class out")
    if class_idx == "all":
        return deal_classes(len(seeds), net.label_dim)
    classes = [class_idx] * len(seeds) if isinstance(class_idx, int | np.integer) else [int(c) for c in class_idx]
    if len(classes) != len(seeds):
        raise ConfigError(f"{len(classes)} classes were given for {len(seeds)} seeds; give one each, or one for all")
    for chosen in classes:
        if not 0 <= chosen < net.label_dim:
            raise ConfigError(f"class {chosen} is out of range; the network knows classes 0 to {net.label_dim - 1}")
    return classes


def require_one_image_per_file(seeds: list[int], classes: list[int] | None) -> None:
    """Raise ConfigError where a seed, and so a file, would get two classes."""
    if classes is None:
        return
    class_of: dict[int, int] = {}
    for seed, chosen in zip(seeds, classes, strict=True):
        if class_of.setdefault(seed, chosen) != chosen:
            raise ConfigError(f"seed {seed} is asked for with two classes, but has one file; list each seed once")
