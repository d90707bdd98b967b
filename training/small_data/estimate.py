"""An estimate of the time and memory of a run on the device at hand: time by a few real steps, memory by counting.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dnnlib.memory import container_free_bytes
from dnnlib.parse import format_nimg
from dnnlib.text import format_duration, format_passes
from torch_utils.distributed import World
from torch_utils.precision import numerics, unchanged_random_state
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.encoders import StabilityVAEEncoder
from training.flops import count_flops
from training.networks_edm2 import image_size
from training.run.run_data import CACHE_BYTES, network_shape
from training.run.state import TrainingState

# Forward and backward: three times the forward pass.
PASSES = 3
# Operations that a measured step may have, and the least time of all measured steps.
_CPU_OPS = 60e9
_GPU_OPS = 10e12
_MEASURE_SEC = 1.5
_HOUR_SEC = 3600.0
_UNIT = 1024  # the images of an hour are rounded down to a multiple of this


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured times of steps with `num_images` images each, on one process."""

    image_sec: float  # per image: noise, forward and backward pass
    batch_sec: float  # per batch of any size: optimizer, averages, forced normalization
    num_images: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, by what they are for."""

    weights: int  # with their gradients, Adam's two moments and the tracked averages
    activations: int  # what a round's images leave for the backward pass, and the weights as they act on them
    copies: int  # of weights, moments and averages, while a checkpoint is on its way to the disk; on the host
    images: int  # of the data set, decoded; on the host
    image: int = 0  # the part of the activations that one more image of the round adds
    program: int = 0  # what the process took before the run; on the host

    def total(self, device: torch.device) -> int:
        """On a CPU all of it; elsewhere what lies in the device's memory."""
        on_device = self.weights + self.activations
        return on_device + self.copies + self.images + self.program if device.type == "cpu" else on_device


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
        """Speed of all processes together, each as fast as the one that was measured."""
        share, _ = self.config.share_of(self.num_ranks)
        return self.config.batch / (share * self.speed.image_sec + self.speed.batch_sec)

    def seconds(self, nimg: int) -> float:
        """Return the time for `nimg` images, without snapshots, samples and metrics."""
        return nimg / self.images_per_sec

    def images_in(self, seconds: float) -> int:
        """Return how many images fit, rounded down to whole batches, and to whole Ki from 1 Ki on."""
        nimg = int(seconds * self.images_per_sec)
        unit = _UNIT if nimg >= _UNIT else self.config.batch
        unit = math.lcm(unit, self.config.batch)
        return max(nimg // unit, 1) * unit


def estimate(config: TrainingConfig, dataset: ImageDataset, device: torch.device, num_ranks: int) -> Estimate:
    """Estimate the run `config` by a few steps on noise, which take seconds. Leaves global random states unchanged.

    A step has fewer images than the run's if a whole batch would take long, and the network is not compiled.
    """
    program_bytes = psutil.Process().memory_info().rss
    with unchanged_random_state(device):
        share, rounds = config.share_of(num_ranks)
        shortened = dataclasses.replace(config, compile=False, shard=False, shard_group=None, batch_gpu=None, init=None)
        state = TrainingState(shortened, dataset, World(device=device), resumed=True)
        image_ops = PASSES * count_flops(state.net).total_flops
        most = max(int((_CPU_OPS if device.type == "cpu" else _GPU_OPS) / image_ops), 1)
        num_images = min(most, share // rounds)
        state.config = dataclasses.replace(shortened, batch=num_images, vae=None)
        speed = _measure(state, network_shape(config, dataset)[0])
        num_params = sum(parameter.numel() for parameter in state.net.parameters())
        memory = count_memory(state, config, dataset, per_round=share // rounds)
        del state
    if device.type == "cuda":  # leave no trace in the run's own memory statistics
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


def count_memory(state: TrainingState, config: TrainingConfig, dataset: ImageDataset, *, per_round: int) -> Memory:
    """Count the memory of a process, not sharded or compiled, with the network of `state` and `per_round` images."""
    weight_bytes = sum(parameter.nbytes for parameter in state.net.parameters())
    kept = 1 + 2 + len(config.ema_stds)  # weights, Adam's moments, averages
    one, two = (loss_bytes(state, num_images) for num_images in (1, 2))
    return Memory(
        weights=weight_bytes * (kept + 1),
        activations=one + (two - one) * (per_round - 1),
        image=two - one,
        copies=weight_bytes * kept if config.background_saves else 0,
        images=dataset.decoded_bytes if config.workers == 0 and dataset.decoded_bytes <= CACHE_BYTES else 0,
    )


def loss_bytes(state: TrainingState, num_images: int) -> int:
    """Return the bytes of all tensors but parameters that the loss of `num_images` keeps for its backward pass."""
    net, device = state.net, state.world.device
    height, width = image_size(net)
    images = torch.zeros([num_images, net.img_channels, height, width], device=device)
    labels = torch.zeros([num_images, net.label_dim], device=device)
    noise = torch.ones_like(images)
    condition_kwargs = {}
    if net.cond_channels:
        condition_kwargs["cond_images"] = torch.zeros([num_images, net.cond_channels, height, width], device=device)
    return saved_bytes(
        lambda: state.loss_fn(
            state.replica, images, labels, rnd_normal=noise[:, :1, :1, :1], unit_noise=noise, **condition_kwargs
        )
    )


def saved_bytes(work: Callable[[], Any]) -> int:
    """Return the bytes of all tensors but parameters that `work()` keeps for its backward pass, each counted once."""
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int:
    """Return the memory that a run may take, that of this process included: the device's, for a CPU the container's."""
    if device.type != "cpu" and not torch.cuda.is_available():
        return sys.maxsize  # unknown
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    available, allowed = int(psutil.virtual_memory().available), container_free_bytes()
    return min(available, available if allowed is None else allowed) + int(psutil.Process().memory_info().rss)


def _memory_advice(e: Estimate) -> list[str]:
    """Return a line if the processes of this machine need more memory than it has, with the rounds that would fit."""
    memory, config = e.memory, e.config
    local = 1 if e.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", e.num_ranks))
    limit = free_bytes(e.device) // local
    excess = memory.total(e.device) - limit
    if excess <= 0:
        return []
    share, rounds = config.share_of(e.num_ranks)
    most = share // rounds - -(-excess // memory.image) if memory.image else 0
    fit = max((n for n in range(1, most + 1) if share % n == 0), default=0)
    advice = f"--batch-gpu={fit} fits" if fit else "a smaller --channels is needed, besides --batch-gpu=1"
    return [f"which is more than the {limit / 2**30:.2f} GiB that are free here: {advice}"]


def describe_estimate(estimate: Estimate, *, nimg: int = 0) -> str:
    """Return the estimate for what is left of the run after `nimg` images, and what fits an hour if it takes longer."""
    e, config, speed, memory = estimate, estimate.config, estimate.speed, estimate.memory
    rate, passes = e.images_per_sec, config.duration / e.num_images
    lines = [
        f"Estimate for this machine ({e.device.type}), {e.num_ranks} process(es):",
        f"  network  {e.num_params / 1e6:.2f} million parameters, {e.image_ops / 1e9:.3g} Gflop of training an image",
        f"  speed    {rate:.3g} images/s, measured in {speed.num_steps} steps of {speed.num_images};"
        f" {e.image_ops * rate / e.num_ranks / 1e9:,.3g} Gflop/s a process",
        f"  time     {format_duration(e.seconds(max(config.duration - nimg, 0)))}"
        f" for {'the rest of ' if nimg else ''}{format_nimg(config.duration)} images,"
        f" {format_passes(passes)}",
    ]
    if e.seconds(config.duration - nimg) > _HOUR_SEC and not nimg:
        fit = e.images_in(_HOUR_SEC)
        lines.append(f"           --duration={format_nimg(fit)} takes an hour; it can be raised later to continue")
        lines.append(f"           in 20 minutes here: --duration={format_nimg(e.images_in(_HOUR_SEC / 3))}")
    parts = {
        "weights, moments, averages": memory.weights,
        "activations": memory.activations,
        "images": memory.images,
        "copies for checkpoints": memory.copies,
        "program": memory.program,
    }
    where = "" if e.device.type == "cpu" else " on the device"
    named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
    lines.append(f"  memory   {memory.total(e.device) / 2**30:.2f} GiB a process{where}; in all: {named}")
    lines += [f"           {line}" for line in _memory_advice(e)]
    left_out = ["snapshots", *(["samples"] if config.samples else []), *(["metrics"] if config.metrics else [])]
    left_out += ["the VAE"] if config.vae is not None else []
    compiled = "; compiled code is faster" if config.compiles_on(e.device) else ""
    lines.append(f"  without  {', '.join(left_out)}{compiled}")
    return "\n".join([*lines, ""])
