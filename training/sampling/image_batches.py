"""The batches of a request: noise and labels by seed, sampling, decoding, files.

Shape legend: N images, C channels, H x W pixels, L labels; latents and images may differ in C, H and W.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.processes.dealing import deal_on_demand
from training.condition.conditioning import Conditioning
from training.encoders import Encoder
from training.networks_edm2 import image_size
from training.sampling.denoisers import conditioned
from training.sampling.output_files import FilePlan
from training.sampling.sampler import ForeignSampler, Sampler, StackedRandomGenerator
from training.sampling.solvers import Evaluations
from training.sampling.two_stages import streams_of, two_stages


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """One batch of this process. If there are fewer seeds than processes, some batches are empty: tensors are None."""

    images: torch.Tensor | None  # uint8 [N, C, H, W] on the compute device
    labels: torch.Tensor | None  # float32 one-hot [N, L]; None for an unconditional network
    noise: torch.Tensor | None  # float32 [N, C, H, W], the latents' shape
    batch_idx: int  # among the batches of this process; of all processes if they are dealt on demand
    num_batches: int  # likewise; the same in all processes
    indices: np.ndarray  # int [N], positions in the list of seeds
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class ClassChoice:
    """The classes of a request's images."""

    per_seed: list[int] | None = None  # None = drawn from the seeds, or no classes
    unlabelled: bool = False  # a conditional network gets zeros for labels
    dealt: bool = False  # all classes equally often, each for a contiguous part of the seeds

    @classmethod
    def of(cls, class_idx: int | Sequence[int] | str | None, num_seeds: int, label_dim: int) -> "ClassChoice":
        """Return the choice that generate_images' `class_idx` stands for. Raises ConfigError."""
        if class_idx is None or (isinstance(class_idx, str) and class_idx == "none"):
            return cls(unlabelled=class_idx is not None)
        if label_dim == 0:
            raise ConfigError("the network is unconditional and takes no class; leave the class out")
        if isinstance(class_idx, str) and class_idx == "all":
            return cls(per_seed=deal_classes(num_seeds, label_dim), dealt=True)
        single = isinstance(class_idx, int | np.integer)
        classes = [int(class_idx)] * num_seeds if single else [int(c) for c in class_idx]  # type: ignore[union-attr, arg-type]
        if len(classes) != num_seeds:
            raise ConfigError(f"{len(classes)} classes were given for {num_seeds} seeds; give one each, or one for all")
        for index in classes:
            if not 0 <= index < label_dim:
                raise ConfigError(f"class {index} is out of range; the network knows classes 0 to {label_dim - 1}")
        return cls(per_seed=classes)


def deal_classes(num_seeds: int, num_classes: int) -> list[int]:
    """Return a class per seed: all equally often, each for a contiguous part of the seeds.

    Raises ConfigError if the seeds do not divide over the classes.
    """
    if num_seeds % num_classes:
        fit = -(-num_seeds // num_classes) * num_classes
        raise ConfigError(
            f"{num_seeds} seeds do not deal evenly over all {num_classes} classes; "
            f"give a multiple of {num_classes}, e.g. --seeds=0-{fit - 1}"
        )
    return [i // (num_seeds // num_classes) for i in range(num_seeds)]


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImages:
    """The batches of this process, computed while they are iterated over; a new loop computes them again."""

    net: Any
    guides: list[Any]
    encoder: Encoder
    encoder_batch_size: int  # latents decoded at once
    sampler: Sampler
    seeds: list[int]
    classes: ClassChoice
    batches: list[np.ndarray]  # positions in `seeds`, of this process; of all processes if dealt on demand
    full_batch: int  # images in the largest batch of any process
    world: World  # with the compute device
    on_demand: bool  # whether a process takes the next batch when it is free
    files: FilePlan | None  # None = nothing is written
    conditioning: Conditioning | None  # None = the network is not conditioned on images

    @property
    def gnet(self) -> Any:
        """The guides as `generate_images` takes them: one guide, a list of several, or None."""
        return self.guides if len(self.guides) > 1 else self.guides[0] if self.guides else None

    @property
    def existing(self) -> frozenset[int]:
        """Positions in `seeds` of images whose files existed and stay. Some may be in a batch all the same."""
        return frozenset() if self.files is None else self.files.existing

    @property
    def sheet_columns(self) -> int:
        """Columns of a contact sheet of all images: one row per class if they were dealt, else about square."""
        num_images = len(self.seeds)
        return num_images // self.net.label_dim if self.classes.dealt else math.isqrt(num_images - 1) + 1

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        dealt = deal_on_demand(self.batches, self.world) if self.on_demand else enumerate(self.batches)
        with nullcontext() if self.files is None else self.files.writer() as write:

            def finish(sampled: tuple[torch.Tensor | None, ImageBatch]) -> ImageBatch:
                batch = self._decode(*sampled)
                if write is not None and batch.images is not None:
                    write(batch.images, batch.indices)
                return batch

            yield from two_stages(dealt, self._sample, finish, _tensors_of, streams_of(self.world.device))

    @torch.no_grad()
    def _sample(self, dealt: tuple[int, np.ndarray]) -> tuple[torch.Tensor | None, ImageBatch]:
        """Return the latents of a batch, and the batch without its images."""
        batch_idx, indices = dealt
        latents = labels = noise = None
        if len(indices):
            random, noise, labels = self.draw(indices)
            net, *guides = self._networks(indices)
            latents = self.sampler.sample(net, noise, labels, guides, randn_like=random.randn_like)
            noise, labels, latents = (None if x is None else x[: len(indices)] for x in (noise, labels, latents))
        return latents, ImageBatch(
            images=None,
            labels=labels,
            noise=noise,
            batch_idx=batch_idx,
            num_batches=len(self.batches),
            indices=indices,
            seeds=[self.seeds[i] for i in indices],
        )

    def evaluations(self, indices: np.ndarray) -> tuple[torch.Tensor | None, Evaluations]:
        """Return the labels drawn for the images at these positions, and the sampler as a generator."""
        assert not isinstance(self.sampler, ForeignSampler)
        random, noise, labels = self.draw(indices)
        net, *guides = self._networks(indices)
        return labels, self.sampler.evaluations(net, noise, labels, guides, randn_like=random.randn_like)

    def _networks(self, indices: np.ndarray) -> list[Any]:
        """Return the main network and the guides, with the conditioning images of the images at these positions."""
        networks = [self.net, *self.guides]
        if self.conditioning is None:
            return networks
        return conditioned(networks, self.conditioning.images(self._padded(indices), self.world.device))

    def draw(self, indices: np.ndarray) -> tuple[StackedRandomGenerator, torch.Tensor, torch.Tensor | None]:
        """Return the generators of the images at these positions, at least one, and noise and labels drawn from them.

        There are rows beyond these images if all batches must be of one size.
        """
        rows = self._padded(indices)
        random = StackedRandomGenerator(self.world.device, [self.seeds[i] for i in rows])
        noise = random.randn([len(rows), self.net.img_channels, *image_size(self.net)])
        return random, noise, self._labels(random, rows)

    def _padded(self, indices: np.ndarray) -> np.ndarray:
        """Repeat the last of `indices` up to the size of the largest batch, if a network takes only one size.

        The seed is repeated with it, so that the same noise, class and churn is drawn for each of its rows.
        """
        if not any(getattr(net, "fixed_batch", False) for net in (self.net, *self.guides)):
            return indices
        return np.pad(indices, (0, self.full_batch - len(indices)), mode="edge")

    def _labels(self, random: StackedRandomGenerator, indices: np.ndarray) -> torch.Tensor | None:
        label_dim, device = self.net.label_dim, self.world.device
        if label_dim == 0:
            return None
        # Drawn even if it is then overridden, so that the churn noise after it stays the same.
        classes = random.randint(label_dim, size=[len(indices)])
        if self.classes.unlabelled:
            return torch.zeros([len(indices), label_dim], device=device)
        if self.classes.per_seed is not None:
            classes = torch.tensor([self.classes.per_seed[i] for i in indices])
            if device.type == "cuda":  # from pinned memory the copy does not wait for the work in flight
                classes = classes.pin_memory()
            classes = classes.to(device, non_blocking=True)
        return torch.nn.functional.one_hot(classes, label_dim).to(torch.float32)  # [N] -> [N, L]

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor | None, batch: ImageBatch) -> ImageBatch:
        if latents is None:
            return batch
        images = self.decode(latents)
        if self.conditioning is not None:
            images = self.conditioning.finish(images, batch.indices)
        return replace(batch, images=images)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images, uint8 [N, C, H, W], of the sampler's result."""
        return torch.cat([self.encoder.decode(part) for part in latents.split(self.encoder_batch_size)])


def _tensors_of(batch: ImageBatch) -> list[torch.Tensor]:
    return [tensor for tensor in (batch.images, batch.labels, batch.noise) if tensor is not None]
