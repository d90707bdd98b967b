"""From seeds to images: batches dealt to processes, noise and labels by seed, sampling, decoding, files.

Shape legend: N images, C channels, H x W pixels, L labels; latents and images may differ in C, H and W.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from torch_utils.distributed import World, resolve_device
from torch_utils.processes.dealing import all_batches, deal_on_demand, remaining_batches
from training.condition.conditioning import (
    Conditioning,
    Source,
    conditioning_of,
    require_one_picture_per_seed,
)
from training.encoders import Encoder, StandardRGBEncoder
from training.images.png_files import FAST, require_compression
from training.sampling.checks import (
    check_request,
    classes_per_seed,
    image_size,
    is_none,
    require_one_image_per_file,
    require_writable_images,
)
from training.sampling.guidance import listed
from training.sampling.image_decoder import DecoderOptions
from training.sampling.loading import Prepare, load_networks, prepare_networks
from training.sampling.request_files import BatchFiles, FilePlan, plan_files
from training.sampling.sampler import StackedRandomGenerator, edm_sampler
from training.sampling.two_stages import streams_of, two_stages
from training.snapshot.code import TrustCode


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """One batch of this process. The tensors are None in the batches left empty where seeds are few."""

    images: torch.Tensor | None  # uint8 [N, C, H, W] on the compute device
    labels: torch.Tensor | None  # float32 one-hot [N, L]; None for an unconditional network
    noise: torch.Tensor | None  # float32 [N, C, H, W], the latents' shape
    batch_idx: int  # among the batches of this process; where they are dealt on demand, of all processes
    num_batches: int  # likewise; the same in all processes
    indices: np.ndarray  # int [N], positions in the list of seeds
    seeds: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sampled:
    """A batch on its way from the sampler to the decoder."""

    latents: torch.Tensor | None
    labels: torch.Tensor | None
    noise: torch.Tensor | None
    batch_idx: int
    indices: np.ndarray
    seeds: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImages:
    """The batches of this process, computed while they are iterated over; a new loop computes them anew."""

    net: Any
    gnet: Any  # one guide, a list of several, or None
    encoder: Encoder
    outdir: Path | None
    subdirs: bool
    seeds: list[int]
    classes: list[int] | None  # per seed; None = drawn from the seed
    unlabelled: bool  # whether a conditional network is given zeros for labels
    one_row_per_class: bool  # whether the seeds were dealt over all classes, the images of one class in succession
    batches: list[np.ndarray]  # positions in `seeds`, of this process; where dealt on demand, of all processes
    encoder_batch_size: int
    device: torch.device
    sampler_fn: Callable[..., torch.Tensor]
    sampler_kwargs: dict[str, Any]
    world: World
    on_demand: bool  # whether a process takes the next batch when it is free
    files: FilePlan | None  # None: nothing is written
    full_batch: int  # images in the largest batch of any process
    conditioning: Conditioning | None = None  # the pictures that the network sees, where it sees any

    @property
    def there(self) -> frozenset[int]:
        """Positions in `seeds` of the images whose files were there and stay. Some may be in a batch all the same."""
        return frozenset() if self.files is None else self.files.there

    @property
    def sheet_columns(self) -> int:
        """Columns of a contact sheet of all images: a row for each class where they were dealt, else about square."""
        num_images = len(self.seeds)
        return num_images // self.net.label_dim if self.one_row_per_class else math.isqrt(num_images - 1) + 1

    def path_of(self, position: int) -> Path:
        """The file of an image, by its position in `seeds`."""
        assert self.files is not None
        return self.files.paths[position]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        dealt = deal_on_demand(self.batches, self.world) if self.on_demand else enumerate(self.batches)
        with ExitStack() as stack:
            files = None if self.files is None else stack.enter_context(BatchFiles(self.files))

            def finish(sampled: _Sampled) -> ImageBatch:
                batch = self._decode(sampled)
                if files is not None and batch.images is not None:
                    files.write(batch.images, batch.indices)
                return batch

            yield from two_stages(dealt, self._sample, finish, _tensors_of, streams_of(self.device))

    @torch.no_grad()
    def _sample(self, dealt: tuple[int, np.ndarray]) -> _Sampled:
        batch_idx, indices = dealt
        seeds = [self.seeds[i] for i in indices]
        latents = labels = noise = None
        if seeds:
            random, noise, labels = self.draw(indices)
            seen = {}
            if self.conditioning is not None:
                seen["cond_images"] = self.conditioning.images(self._padded(indices), self.device)
            latents = self.sampler_fn(
                net=self.net,
                noise=noise,
                labels=labels,
                gnet=self.gnet,
                randn_like=random.randn_like,
                **seen,
                **self.sampler_kwargs,
            )
            noise, labels, latents = (None if x is None else x[: len(seeds)] for x in (noise, labels, latents))
        return _Sampled(latents=latents, labels=labels, noise=noise, batch_idx=batch_idx, indices=indices, seeds=seeds)

    def draw(self, indices: np.ndarray) -> tuple[StackedRandomGenerator, torch.Tensor, torch.Tensor | None]:
        """The generators of the images at these positions, at least one, and the noise and labels drawn from them.

        Rows beyond these images are there where all batches must be of one size.
        """
        rows = self._padded(indices)
        random = StackedRandomGenerator(self.device, [self.seeds[i] for i in rows])
        noise = random.randn([len(rows), self.net.img_channels, *image_size(self.net)])
        return random, noise, self._labels(random, rows)

    def _padded(self, indices: np.ndarray) -> np.ndarray:
        """`indices`, the last one repeated to the size of the largest batch where a network wants all of one size.

        The seed is repeated with it, so that the same noise, class and churn is drawn for each of its rows.
        """
        if not any(getattr(net, "fixed_batch", False) for net in (self.net, *listed(self.gnet))):
            return indices
        return np.pad(indices, (0, self.full_batch - len(indices)), mode="edge")

    def _labels(self, random: StackedRandomGenerator, indices: np.ndarray) -> torch.Tensor | None:
        label_dim = self.net.label_dim
        if label_dim == 0:
            return None
        # Drawn also where it is then overridden, so that the churn noise after it stays the same.
        chosen = random.randint(label_dim, size=[len(indices)])
        if self.unlabelled:
            return torch.zeros([len(indices), label_dim], device=self.device)
        if self.classes is not None:
            chosen = torch.tensor([self.classes[i] for i in indices])
            if self.device.type == "cuda":  # from pinned memory the copy does not wait for the work in flight
                chosen = chosen.pin_memory()
            chosen = chosen.to(self.device, non_blocking=True)
        return torch.nn.functional.one_hot(chosen, label_dim).to(torch.float32)  # [N] -> [N, L]

    @torch.no_grad()
    def _decode(self, sampled: _Sampled) -> ImageBatch:
        latents = sampled.latents
        images = None if latents is None else self.decode(latents)
        if images is not None and self.conditioning is not None:
            images = self.conditioning.finish(images, sampled.indices)
        return ImageBatch(
            images=images,
            labels=sampled.labels,
            noise=sampled.noise,
            batch_idx=sampled.batch_idx,
            num_batches=len(self.batches),
            indices=sampled.indices,
            seeds=sampled.seeds,
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The pictures, uint8 [N, C, H, W], of what the sampler gives."""
        return torch.cat([self.encoder.decode(part) for part in latents.split(self.encoder_batch_size)])


def _tensors_of(batch: ImageBatch) -> list[torch.Tensor]:
    return [tensor for tensor in (batch.images, batch.labels, batch.noise) if tensor is not None]


def generate_images(
    net: Any,
    gnet: Any = None,
    encoder: Encoder | None = None,
    outdir: str | os.PathLike[str] | None = None,
    subdirs: bool = False,
    seeds: Sequence[int] = range(16, 24),
    class_idx: int | Sequence[int] | Literal["all", "none"] | None = None,
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
    **sampler_kwargs: Any,
) -> GeneratedImages:
    """Check the request, load the networks, and return an iterable over this process's batches (`ImageBatch`).

    `net` and `gnet`: networks, or paths or URLs of snapshots; several guides as a list. A snapshot of `net` brings its
    encoder, unless one is given; without either, images are grey or RGB. The guide 'self' is `net` without labels
    (`WithoutLabels`); a snapshot must say that it was trained so, of a network the caller has to know. `class_idx`: one
    class for all, one per seed, 'all' (see `deal_classes`), or 'none' (likewise without labels), instead of those that
    the seeds draw. `outdir` gets {seed:06d}.png, with `subdirs` in folders of a thousand. `max_batch_size`: images at
    once per process; `encoder_batch_size`: decoded at once.
    `device`: default the world's, else the best of this machine. `world`: which share of the batches is this process's;
    default torch.distributed's, if it is initialized. `trust_code`: see `load_snapshot`.
    `verbose` is accepted and prints nothing: progress is the caller's. Other keywords go to `sampler_fn`, which is
    called like `edm_sampler`.

    `prepare` is applied to `net` and each guide, with the device, before they are used (see `Prepare`); if it has an
    attribute `settings`, a dictionary, this is noted in the files. `skip_existing`: images whose files are in `outdir`
    stay as they are, and what is left is dealt evenly (see `remaining_batches`); files that say they were made from
    something else are refused. `on_demand`: a batch goes to whichever process is free, so that batch_idx, num_batches
    and the length count those of all processes, and a process sees some of them; every process must iterate.
    `decoder`: how latents are decoded; default: see DecoderOptions. `png_compression`: see `encode_png`.

    `source`: the pictures for a network that is conditioned on such (docs/condition.md): a file, folder or ZIP file, or
    an object with the methods of `training.condition.cond_source.Pictures`; `masks`: what to fill, for one that
    inpaints.
    The i-th seed gets the i-th picture, and after the last the first again; where `class_idx` is None, images have the
    classes of pictures with such. `condition`: what the network was trained with, where it is no file that says so.

    Image i depends on seed i alone: a generator on the compute device, seeded with the seed modulo 2**32, draws the
    noise [C, H, W], then the class (whether used or not), then churn. Raises ConfigError before anything runs or is
    written. Nothing is computed before the iteration starts. On CUDA the next batch is being computed when a batch is
    given out, and decoding and files of a batch go beside it.
    """
    seeds = [int(seed) for seed in seeds]
    guides = listed(gnet)
    check_request(seeds, max_batch_size, encoder_batch_size, sampler_fn, sampler_kwargs, num_guides=len(guides))
    require_compression(png_compression)
    if outdir is not None:
        require_folder(Path(outdir))
    elif skip_existing:
        raise ConfigError("--skip-existing looks for files in --outdir, and there is none; give both or neither")
    world = world if world is not None else _current_world(device)
    device = world.device if device is None else torch.device(device)
    unlabelled = is_none(class_idx)
    net, guides, own_encoder, condition = load_networks(
        net, guides, device, trust_code, unlabelled=unlabelled, condition=condition
    )
    encoder = encoder or own_encoder or StandardRGBEncoder()
    conditioning = conditioning_of(net, condition, source, masks, num_images=len(seeds))
    if conditioning is not None and not isinstance(encoder, StandardRGBEncoder):
        raise ConfigError("the network makes latents, and conditioning on pictures is for networks of pixels")
    if conditioning is not None and class_idx is None and net.label_dim and conditioning.pictures.classes is not None:
        known = conditioning.pictures.classes
        class_idx = [known[conditioning.index_of(position)] for position in range(len(seeds))]
    if outdir is not None:
        require_writable_images(net, encoder)
    classes = classes_per_seed(net, seeds, class_idx)
    encoder, decoder_record = (decoder or DecoderOptions()).apply(encoder, device, encoder_batch_size)
    encoder.init(device)
    files = None
    if outdir is not None:
        require_one_image_per_file(seeds, classes)
        require_one_picture_per_seed(seeds, conditioning)
        notes = None if conditioning is None else conditioning.notes(len(seeds))
        files = plan_files(
            Path(outdir), subdirs, seeds, classes, skip_existing, png_compression, world,
            net=net, guides=guides, encoder=encoder, notes=notes, device=device, sampler_fn=sampler_fn,
            sampler_kwargs=sampler_kwargs,
            more={**decoder_record, **getattr(prepare, "settings", {}), "class": "none" if unlabelled else None},
        )  # fmt: skip
        make_folder(Path(outdir))
    if prepare is not None:
        net, *guides = prepare_networks(prepare, (net, *guides), device)
    batches = all_batches(len(seeds), max_batch_size, world.size)
    if files is not None and files.there:
        batches = remaining_batches(batches, sorted(files.there), max_batch_size, world.size)
    return GeneratedImages(
        net=net,
        gnet=guides if len(guides) > 1 else guides[0] if guides else None,
        encoder=encoder,
        outdir=None if outdir is None else Path(outdir),
        subdirs=subdirs,
        seeds=seeds,
        classes=classes,
        unlabelled=unlabelled,
        one_row_per_class=class_idx == "all",
        batches=batches if on_demand else batches[world.rank :: world.size],
        encoder_batch_size=encoder_batch_size,
        device=device,
        sampler_fn=sampler_fn,
        sampler_kwargs=sampler_kwargs,
        world=world,
        on_demand=on_demand,
        files=files,
        full_batch=max(map(len, batches), default=0),
        conditioning=conditioning,
    )


def _current_world(device: torch.device | str | None) -> World:
    resolved = resolve_device() if device is None else torch.device(device)
    if not torch.distributed.is_initialized():
        return World(device=resolved)
    return World(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size(), device=resolved)
