"""From seeds to images: check a request, load its networks, deal its batches to the processes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError
from dnnlib.text import similar_names
from torch_utils.distributed import World, resolve_device
from torch_utils.processes.dealing import all_batches, remaining_batches
from training.condition.conditioning import Conditioning, Source, conditioning_of
from training.encoders import Encoder, StandardRGBEncoder
from training.images.png import FAST, require_compression
from training.sampling.denoisers import as_list
from training.sampling.image_batches import ClassChoice, GeneratedImages
from training.sampling.networks import (
    DecoderOptions,
    Prepare,
    load_networks,
    prepare_networks,
    require_writable_images,
)
from training.sampling.output_files import plan_files, request_record
from training.sampling.sampler import Sampler, edm_sampler, sampler_of
from training.snapshot.code import TrustCode


def generate_images(
    net: Any,
    gnet: Any = None,
    encoder: Encoder | None = None,
    outdir: str | os.PathLike[str] | None = None,
    subdirs: bool = False,
    seeds: Sequence[int] = range(16, 24),
    class_idx: int | Sequence[int] | str | None = None,
    max_batch_size: int = 32,
    encoder_batch_size: int = 4,
    verbose: bool = True,
    device: torch.device | str | None = None,
    sampler_fn: Callable[..., torch.Tensor] = edm_sampler,
    *,
    world: World | None = None,
    trust_code: TrustCode | None = None,
    prepare: Prepare | None = None,
    skip_existing: bool = False,
    on_demand: bool = False,
    decoder: DecoderOptions | None = None,
    png_compression: int = FAST,
    source: Source | None = None,
    masks: str | os.PathLike[str] | None = None,
    condition: str | None = None,
    sampler_options: Sampler | None = None,
    own_networks: Sequence[str] = (),
    **sampler_kwargs: Any,
) -> GeneratedImages:
    """Check the request, load the networks, and return an iterable over this process's batches (`ImageBatch`).

    net, gnet: networks, or paths or URLs of snapshots; several guides as a list. The guide 'self' is `net` without
        labels (`WithoutLabels`). A snapshot must say that it was trained so; for a network, the caller must know.
    encoder: default the one of the snapshot of `net`; without either, images are grayscale or RGB.
    outdir, subdirs: where {seed:06d}.png are written, with `subdirs` in folders of a thousand.
    class_idx: one class for all (its index, or its name if the file has names), one index per seed, 'all' (see
        `deal_classes`), or 'none' (without labels, for networks as with 'self'); default: the seeds draw them.
    max_batch_size, encoder_batch_size: images sampled, and decoded, at once per process.
    verbose: accepted and ignored; progress is the caller's.
    device, world: default that of `world`, else the best of this machine; and torch.distributed's processes.
    sampler_fn, sampler_kwargs: a function called like `edm_sampler`, and its further keywords. `sampler_options`: both
        as one value.
    trust_code, own_networks: see `load_snapshot`.
    prepare: applied to `net` and each guide before use (see `Prepare`). Its attribute `settings`, a dictionary, if it
        has one, goes into the files' records; with a true attribute `compile`, the decoder is compiled too, on CUDA.
    skip_existing: images whose files are in `outdir` stay, and the others are dealt evenly (see `remaining_batches`).
        Files whose records differ are refused.
    on_demand: a batch goes to whichever process is free, so that batch_idx, num_batches and the length count those of
        all processes, and a process gets some of them; every process must iterate.
    decoder, png_compression: see DecoderOptions and `encode_png`.
    source, masks: conditioning images (docs/condition.md), as a file, folder, ZIP file or `SourceImages`, and what to
        fill of them. Seed i gets image i, and after the last the first again. They bring their classes, if they have
        such and `class_idx` is None. `condition`: what the network was trained with, if its file does not say so.

    Image i depends on seed i alone: a generator on the compute device, seeded with the seed modulo 2**32, draws the
    noise [C, H, W], then the class (whether used or not), then churn. Raises ConfigError before anything is computed or
    written. Nothing is computed before the iteration starts. On CUDA the next batch is already being computed when a
    batch is returned, while decoding and file writing run at the same time.
    """
    seeds, guides = [int(seed) for seed in seeds], as_list(gnet)
    sampler = sampler_options or sampler_of(sampler_fn, sampler_kwargs, len(guides))
    _require_counts(seeds=len(seeds), max_batch_size=max_batch_size, encoder_batch_size=encoder_batch_size)
    require_compression(png_compression)
    _require_target(outdir, skip_existing=skip_existing)
    world = _world_on(device, world)

    unlabelled = isinstance(class_idx, str) and class_idx == "none"
    loaded = load_networks(
        net, guides, world.device, trust_code, unlabelled=unlabelled, condition=condition, own_networks=own_networks
    )
    encoder = encoder or loaded.encoder or StandardRGBEncoder()
    makes_pixels = isinstance(encoder, StandardRGBEncoder)
    if outdir is not None:
        require_writable_images(loaded.net, encoder)
    conditioning = conditioning_of(loaded.net, loaded.condition, source, masks, num_images=len(seeds))
    if conditioning is not None:
        class_idx = _class_of_sources(conditioning, class_idx, loaded.net, len(seeds), makes_pixels=makes_pixels)
    class_idx = class_index(class_idx, loaded.class_names, loaded.net.label_dim)
    classes = ClassChoice.of(class_idx, len(seeds), loaded.net.label_dim)
    encoder, decoder_record = (decoder or DecoderOptions()).apply(
        encoder, world.device, encoder_batch_size, compile=getattr(prepare, "compile", False)
    )
    encoder.init(world.device)

    files = None
    if outdir is not None:
        extra = {**decoder_record, **getattr(prepare, "settings", {}), "class": "none" if unlabelled else None}
        files = plan_files(
            Path(outdir), seeds, request_record(loaded.net, loaded.guides, encoder, world.device, sampler, extra),
            classes=classes.per_seed, conditioning=conditioning, subdirs=subdirs, compression=png_compression,
            skip_existing=skip_existing, shape=(loaded.net.img_channels, *loaded.size) if makes_pixels else None,
            world=world,
        )  # fmt: skip
        make_folder(Path(outdir))
    batches = all_batches(len(seeds), max_batch_size, world.size)
    if files is not None and files.existing:
        batches = remaining_batches(batches, sorted(files.existing), max_batch_size, world.size)
    networks = [loaded.net, *loaded.guides]
    if prepare is not None:
        networks = prepare_networks(prepare, networks, world.device)
    return GeneratedImages(
        net=networks[0],
        guides=networks[1:],
        encoder=encoder,
        encoder_batch_size=encoder_batch_size,
        sampler=sampler,
        seeds=seeds,
        classes=classes,
        batches=batches if on_demand else batches[world.rank :: world.size],
        full_batch=max(map(len, batches), default=0),
        world=world,
        on_demand=on_demand,
        files=files,
        conditioning=conditioning,
    )


def class_index(name: Any, names: Sequence[str], label_dim: int, owner: str = "the network's file") -> Any:
    """Return `name` with the name of a class replaced by its index. Raises ConfigError with similar names.

    `owner` has the names.
    """
    if not isinstance(name, str) or name in ("all", "none") or not label_dim:
        return name
    names = names[:label_dim]
    if name in names:
        return names.index(name)
    if not names:
        raise ConfigError(f"'{name}' is not a class: {owner} has no names; give a number below {label_dim}")
    known = ", ".join(similar_names(name, names) or names[:5])
    raise ConfigError(f"'{name}' is not a class; the network knows {len(names)}, such as {known}; numbers work as well")


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError("no seeds; give at least one" if name == "seeds" else f"{name}={count} must be 1 or more")


def _require_target(outdir: str | os.PathLike[str] | None, *, skip_existing: bool) -> None:
    if outdir is not None:
        require_folder(Path(outdir))
    elif skip_existing:
        raise ConfigError("--skip-existing looks for files in --outdir, which is missing; give both or neither")


def _class_of_sources(
    conditioning: Conditioning, class_idx: Any, net: Any, num_images: int, *, makes_pixels: bool
) -> Any:
    if not makes_pixels:
        raise ConfigError("the network makes latents, and conditioning on images is for networks of pixels")
    return conditioning.classes(num_images) if class_idx is None and net.label_dim else class_idx


def _world_on(device: torch.device | str | None, world: World | None) -> World:
    """Return the processes that share the work, with the device that this one computes on."""
    if world is not None:
        return world if device is None else replace(world, device=torch.device(device))
    resolved = resolve_device() if device is None else torch.device(device)
    if not torch.distributed.is_initialized():
        return World(device=resolved)
    return World(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size(), device=resolved)
