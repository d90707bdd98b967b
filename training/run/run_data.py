"""The data of a run: opened once, checked against the options, encoded, and read in batches."""

import json
from collections.abc import Generator

import numpy as np
import torch

from dnnlib.atomic import write_text
from dnnlib.disk import make_folder
from dnnlib.download import is_remote
from dnnlib.errors import ConfigError
from torch_utils.cuda import on_device
from torch_utils.distributed import World
from torch_utils.processes.data_workers import prepare_worker, worker_batches
from training.condition.spec import Condition, parse_condition
from training.config import TrainingConfig
from training.dataset.contract import BatchReader, ImageDataset
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.latents import (
    PUBLISHED_VAE,
    encoder_entry,
    encoder_of,
    measured_encoder,
    read_encoder_file,
    vae_encoder,
    vae_geometry,
)
from training.dataset.order import BatchPositions
from training.encoders import Encoder, StabilityVAEEncoder
from training.own.own_dataset import open_own_dataset
from training.run.run_folder import RunFolder
from training.streaming.streamed import StreamedDataset

_MOST_NAMED = 10  # classes in a line of text

# A process that reads the data itself keeps decoded items in memory if all of them take at most this.
CACHE_BYTES = 512 << 20


def open_dataset(config: TrainingConfig) -> ImageDataset:
    """Open the data set of a run. Raises ConfigError if it cannot be read; `check_dataset` looks at the rest."""
    if config.dataset_class is not None:
        return open_own_dataset(config)
    if not is_remote(config.data):
        return ImageFolderDataset(config.data, use_labels=config.uses_labels, xflip=config.xflip)
    return StreamedDataset(
        config.data,
        use_labels=config.uses_labels,
        xflip=config.xflip,
        buffer=config.shuffle_images,
        cache_dir=config.data_cache,
        cache_bytes=config.data_cache_size,
    )


def check_dataset(config: TrainingConfig, dataset: ImageDataset) -> None:
    """Raise ConfigError if the run cannot train on the data set: on its labels, its latents or its size."""
    _check_labels(config, dataset)
    make_encoder(config, dataset)
    condition_of(config, dataset)


def _check_labels(config: TrainingConfig, dataset: ImageDataset) -> None:
    if config.uses_labels and not dataset.has_labels:
        need, instead = "a conditional network", "use --cond=False"
        if config.balance:
            need, instead = "--balance", "leave it out"
        elif config.label_dropout:
            need, instead = f"--label-dropout={config.label_dropout}", "use --cond=False alone"
        raise ConfigError(f"{config.data or dataset.name} has no labels, which {need} needs; add labels, or {instead}")
    if config.balance and not dataset.has_onehot_labels:
        raise ConfigError(
            f"--balance needs class indices as labels, and those of {config.data or dataset.name} are vectors of"
            f" {dataset.label_dim}; leave it out"
        )


def describe_labels(config: TrainingConfig, dataset: ImageDataset) -> str:
    """Return how the run uses the classes, in one line."""
    text = f"{dataset.label_dim}" if config.cond else "not used"
    if config.cond and dataset.class_names:
        names, more = dataset.class_names[:_MOST_NAMED], len(dataset.class_names) - _MOST_NAMED
        text += f" ({', '.join(names)}{f' and {more} more' if more > 0 else ''})"
    if config.balance:
        counts = np.bincount(dataset.item_labels())
        filled = counts[counts > 0]
        empty = f", {len(counts) - len(filled)} without any" if len(filled) < len(counts) else ""
        text += f", seen equally often ({filled.min()} to {filled.max()} images each{empty})"
    if config.label_dropout:
        text += f"; labels are left out with probability {config.label_dropout:g}"
    return text


def condition_of(config: TrainingConfig, dataset: ImageDataset) -> Condition | None:
    """Return what the network is conditioned on besides classes; None for nothing. ConfigError for unfit data."""
    if config.condition is None:
        return None
    condition = parse_condition(config.condition)
    if config.vae is not None or dataset.holds_latents:
        kind = f"latents, encoded by {config.vae}" if config.vae is not None else "a data set of latents"
        raise ConfigError(
            f"--condition={condition} is for pixels, and this run trains on {kind}; give a data set of images"
            " without --encode-on-the-fly"
        )
    condition.check_size(dataset.resolution, dataset.resolution)
    return condition


def network_shape(config: TrainingConfig, dataset: ImageDataset) -> tuple[int, int]:
    """Return resolution and channels of the images that the network sees."""
    if config.vae is not None:
        geometry = vae_geometry(config.vae)
        return geometry.resolution(dataset.resolution), geometry.channels
    channels = dataset.num_channels // 2 if dataset.holds_latents else dataset.num_channels
    return dataset.resolution, channels


def make_encoder(config: TrainingConfig, dataset: ImageDataset) -> Encoder:
    """Return the encoder for the options and the data set: pixels with any number of channels, or latents of a VAE.

    Raises ConfigError if the two do not go together.
    """
    return encoder_of(dataset) if config.vae is None else vae_encoder(dataset, config.vae)


def load_encoder(
    config: TrainingConfig, dataset: ImageDataset, folder: RunFolder, world: World, *, resumed: bool
) -> Encoder:
    """Return the encoder, with its VAE loaded if the run encodes pixels while it trains. Every process calls this.

    The statistics of a VAE other than the published one are measured at the start of the run and kept in its folder;
    with `resumed`, they are those in the folder.
    """
    encoder = make_encoder(config, dataset)
    if config.vae is None:
        return encoder
    assert isinstance(encoder, StabilityVAEEncoder)
    tf32 = config.encoder_precision != "fp32"
    encoder = encoder.with_encoder(tf32=tf32)
    if config.vae != PUBLISHED_VAE:
        if world.is_main and not (resumed and folder.encoder_file.is_file()):
            make_folder(folder.path)
            write_text(folder.encoder_file, json.dumps(encoder_entry(measured_encoder(encoder, dataset, world.device))))
        world.barrier()
        encoder = read_encoder_file(folder.encoder_file)
    encoder = encoder.with_encoder(tf32=tf32, compile=config.compiles_on(world.device))
    encoder.init(world.device)
    return encoder


def batches(
    config: TrainingConfig, dataset: ImageDataset, world: World, *, start: int
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Yield this process's share of each batch, on its device, from position `start` of the run on."""
    if config.workers == 0 and dataset.decoded_bytes <= CACHE_BYTES:
        dataset.keep_items()
    with dataset.order(config.seed, balance=config.balance) as order:
        loader = torch.utils.data.DataLoader(
            BatchReader(dataset),
            batch_size=None,
            sampler=BatchPositions(order, start=start, batch_size=config.batch, rank=world.rank, num_ranks=world.size),
            num_workers=config.workers,
            pin_memory=world.device.type == "cuda",
            multiprocessing_context="spawn" if config.workers else None,
            prefetch_factor=2 if config.workers else None,
            worker_init_fn=prepare_worker,
        )
        with worker_batches(loader) as items:
            yield from on_device(items, world.device)
