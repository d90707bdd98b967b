"""A word on the default preset where nobody chose it: what suits the data, and how long the choice would take."""

import dataclasses

import torch

from dnnlib.text import format_duration
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.flops import count_flops
from training.networks_edm2 import Precond
from training.presets import SMALL
from training.run.run_data import network_shape
from training.small_data.estimate import PASSES, estimate
from training.small_data.rules import MANY_IMAGES, SHAPES

_MEASURED_CHANNELS = 32  # of the network whose speed stands for a wide one's on a CPU


def suggestion(preset: str, config: TrainingConfig, dataset: ImageDataset) -> str:
    """Return which preset suits the data of a run that got `preset` by default."""
    resolution, channels = network_shape(config, dataset)
    latents = config.vae is not None or dataset.holds_latents
    kind = "latents" if latents else "images"
    if latents and resolution == 64:
        other = "it suits them"
    elif (latents, resolution) in SHAPES and len(dataset) <= MANY_IMAGES:
        other = f"--preset={SMALL} suits them"
    elif not latents and resolution == 64:
        other = "--preset=edm2-img64-s suits them"
    else:
        other = "no preset is for these; start from the nearest one, see docs/training.md"
    return (
        f"No --preset was given, so this is {preset}, for latents of 64x64. The data are {len(dataset):,} {kind} of"
        f" {resolution}x{resolution}, {channels} channels: {other}."
    )


def rough_time(config: TrainingConfig, dataset: ImageDataset, device: torch.device, num_ranks: int) -> str:
    """Return the network's size and about how long the run takes here.

    On a CPU a narrower network is measured: the run's own could take minutes, and more memory than there is.
    """
    resolution, channels = network_shape(config, dataset)
    label_dim = dataset.label_dim if config.cond else 0
    with torch.device("meta"):
        net = Precond(resolution, channels, label_dim, **config.network.arguments())
        image_ops = PASSES * count_flops(net).total_flops
    network = config.network
    if device.type != "cuda" and network.channels > _MEASURED_CHANNELS:
        narrow = dataclasses.replace(network, channels=_MEASURED_CHANNELS).fitted_to(resolution)
        network = narrow
    found = estimate(dataclasses.replace(config, network=network), dataset, device, num_ranks)
    seconds = found.seconds(config.duration) * image_ops / found.image_ops
    num_params = sum(parameter.numel() for parameter in net.parameters())
    time = format_duration(seconds)
    return f"Its network has {num_params / 1e6:,.1f} million parameters: roughly {time} on this machine."
