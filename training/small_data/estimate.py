"""What a run will take on the device at hand: its time by a few real steps, its memory by counting.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass

import psutil
import torch

from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.random_state import unchanged_random_state
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.encoders import StabilityVAEEncoder
from training.flops import count_flops
from training.run.state import TrainingState, network_shape
from training.small_data.memory import Memory, count_memory

# Forward and backward: three times the forward pass.
_PASSES = 3
# Operations that a measured step may have, and the seconds that steps are taken for at least.
_CPU_OPS = 60e9
_GPU_OPS = 10e12
_MEASURE_SEC = 1.5
_SPEED_UP = 1024  # an hour's images are rounded down to a multiple of this


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What steps took, with `num_images` images each, on one process."""

    image_sec: float  # of each image: noise, forward and backward pass
    batch_sec: float  # of each batch whatever its size: optimizer, averages, forced normalization
    num_images: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time and memory of a run."""

    config: TrainingConfig
    device: torch.device
    num_ranks: int
    num_images: int  # of the data set, mirrored ones left out
    num_params: int
    image_ops: int  # multiply-accumulates of training on one image
    speed: Speed
    memory: Memory

    @property
    def images_per_sec(self) -> float:
        """Over all processes, each as fast as the one that was measured."""
        share, _ = self.config.share_of(self.num_ranks)
        return self.config.batch / (share * self.speed.image_sec + self.speed.batch_sec)

    def seconds(self, nimg: int) -> float:
        """The time for `nimg` images, without snapshots, samples and metrics."""
        return nimg / self.images_per_sec

    def images_in(self, seconds: float) -> int:
        """How many images fit, rounded down to whole Ki where there are as many, and to whole batches."""
        nimg = int(seconds * self.images_per_sec)
        unit = _SPEED_UP if nimg >= _SPEED_UP else self.config.batch
        unit = math.lcm(unit, self.config.batch)
        return max(nimg // unit, 1) * unit


def estimate(config: TrainingConfig, dataset: ImageFolderDataset, device: torch.device, num_ranks: int) -> Estimate:
    """Take a few steps of `config` on noise, in a few seconds, and count. The global random states stay.

    A step has fewer images than the run's where a whole batch would take long, and the network is not compiled.
    """
    program_bytes = psutil.Process().memory_info().rss
    with unchanged_random_state(device):
        share, rounds = config.share_of(num_ranks)
        shortened = dataclasses.replace(config, compile=False, shard=False, shard_group=None, batch_gpu=None, init=None)
        state = TrainingState(shortened, dataset, World(device=device), resumed=True)
        image_ops = _PASSES * count_flops(state.net).total_flops
        most = max(int((_CPU_OPS if device.type == "cpu" else _GPU_OPS) / image_ops), 1)
        num_images = min(most, share // rounds)
        state.config = dataclasses.replace(shortened, batch=num_images, vae=None)
        speed = _measure(state, network_shape(config, dataset)[0])
        num_params = sum(parameter.numel() for parameter in state.net.parameters())
        memory = count_memory(state, config, dataset, per_round=share // rounds)
        del state
    if device.type == "cuda":  # as if nothing had been there
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Estimate(
        config=config,
        device=device,
        num_ranks=num_ranks,
        num_images=len(dataset) // (2 if config.xflip else 1),
        num_params=num_params,
        image_ops=image_ops,
        speed=speed,
        memory=dataclasses.replace(memory, program=program_bytes),
    )


def _measure(state: TrainingState, side: int) -> Speed:
    device, config = state.world.device, state.config
    net, num_images = state.net, config.batch
    moments = isinstance(state.encoder, StabilityVAEEncoder)  # mean and deviation of each channel
    size = [num_images, net.img_channels * (2 if moments else 1), side, side]
    images = torch.zeros(size, dtype=torch.float32 if moments else torch.uint8, device=device)
    labels = torch.zeros([num_images, net.label_dim], device=device)
    labels[:, :1] = 1
    with numerics(cudnn_benchmark=config.bench, precision=config.network.precision):
        state.step(images, labels)  # makes Adam's moments
        halves: list[float] = []
        wholes: list[float] = []
        end = time.monotonic() + _MEASURE_SEC
        while not wholes or time.monotonic() < end:
            halves.append(_seconds(state, images, labels, whole=False))
            wholes.append(_seconds(state, images, labels, whole=True))
    image_sec = statistics.median(halves) / num_images
    return Speed(
        image_sec=image_sec,
        batch_sec=max(statistics.median(wholes) - statistics.median(halves), 0.0),
        num_images=num_images,
        num_steps=2 * len(wholes),
    )


def _seconds(state: TrainingState, images: torch.Tensor, labels: torch.Tensor, *, whole: bool) -> float:
    """Of a step; without its end, of the gradients alone."""
    _wait(state.world.device)
    start = time.perf_counter()
    if whole:
        state.step(images, labels)
    else:
        state.accumulate_gradients(images, labels)
    _wait(state.world.device)
    seconds = time.perf_counter() - start
    state.optimizer.zero_grad(set_to_none=True)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
