"""Measure weak scaling: two processes against one, with the same number of images for each.

Over gloo, one thread a process, a network of 5 million parameters on 32x32 pixels, float32. Four ways take turns in one
pair of processes: one process alone while the other waits; both at once on their own, which shows the cost of sharing
a machine; both as one run with DistributedDataParallel; both as one run with FSDP2 (--shard). The exchange of the
gradients is also timed by itself. At the end the weights of the processes are compared.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling
"""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from torch_utils import distributed
from torch_utils.distributed import World
from training.config import NetworkConfig, TrainingConfig
from training.run.state import TrainingState

DATA = SimpleNamespace(resolution=32, num_channels=3, label_dim=10, holds_latents=False, class_names=None)
NETWORK = NetworkConfig(channels=64, channel_mult=(1, 2), num_blocks=3, attn_resolutions=(16,), precision="fp32")
STEPS = 2  # timed together


def make_state(world: World, batch_rank: int, **options: Any) -> TrainingState:
    """Return the start of a run with `batch_rank` images for each process."""
    config = TrainingConfig(data="none", network=NETWORK, batch=batch_rank * world.size, rampup=0, **options)
    return TrainingState(config, DATA, world, resumed=False)  # type: ignore[arg-type]  # all that it asks of a data set


def stepper(state: TrainingState, rank: int, batch_rank: int) -> Callable[[], None]:
    """Return a function that takes one step on images of this rank."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, [batch_rank, 3, 32, 32], generator=generator, dtype=torch.uint8)
    labels = torch.eye(10)[torch.arange(batch_rank) % 10]

    def step() -> None:
        state.step(images, labels)

    return step


def timed(work: Callable[[], Any], world: World, count: int) -> float:
    """Return the seconds per call, of `count` in a row, until all processes are through."""
    world.barrier()
    start = time.perf_counter()
    for _ in range(count):
        work()
    world.barrier()
    return (time.perf_counter() - start) / count


def exchange(num_floats: int, bucket_bytes: int = 25 << 20) -> Callable[[], None]:
    """Return a function that sums `num_floats` floats over all processes, in the buckets of DistributedDataParallel."""
    buckets = torch.zeros(num_floats).split(bucket_bytes // 4)

    def work() -> None:
        for bucket in buckets:
            torch.distributed.all_reduce(bucket)

    return work


def gathers_and_scatter(sizes: list[int]) -> Callable[[], None]:
    """Return a function that sends the data of FSDP2 for blocks of these sizes: each gathered twice, then scattered."""
    wholes = [torch.zeros(size // 2 * 2) for size in sizes]
    parts = [torch.zeros(size // 2) for size in sizes]

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new names need PyTorch 2.13
            for whole, part in zip(wholes, parts, strict=True):
                for _ in range(2):
                    torch.distributed.all_gather_into_tensor(whole, part)
                torch.distributed.reduce_scatter_tensor(part, whole)

    return work


def whole_weights(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return the tensors of the network, gathered if they are spread over processes."""
    tensors = state.net.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def member(rank: int, folder: str, batch_rank: int, repeats: int) -> None:
    """Run one of the two processes; the first one prints."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = distributed.init("cpu")
    own = make_state(World(), batch_rank)
    runs = {"ddp": make_state(world, batch_rank), "fsdp": make_state(world, batch_rank, shard=True)}
    steps = {name: stepper(state, rank, batch_rank) for name, state in {"own": own, **runs}.items()}
    num_params = sum(param.numel() for param in own.net.parameters())
    unet: Any = own.net.unet
    blocks = [*unet.enc.values(), *unet.dec.values()]
    sizes = [sum(param.numel() for param in block.parameters()) for block in blocks]
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "one process": (steps["own"] if rank == 0 else lambda: None, STEPS),
        "two on their own": (steps["own"], STEPS),
        "DDP": (steps["ddp"], STEPS),
        "FSDP2": (steps["fsdp"], STEPS),
        "exchange": (exchange(num_params), 5),
        "gathers": (gathers_and_scatter(sizes), 5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (work, count) in ways.items():
            result = timed(work, world, count)
            if turn:  # the first is the warm-up
                seconds[name].append(result)
    check_weights(runs, world)
    if rank == 0:
        report({name: statistics.median(values) for name, values in seconds.items()}, batch_rank, num_params)
    for state in runs.values():
        state.close()
    world.close()


def check_weights(runs: dict[str, TrainingState], world: World) -> None:
    """Raise AssertionError if the weights differ between the processes or between the two kinds of run."""
    weights = {name: whole_weights(state) for name, state in runs.items()}
    for name, value in weights["ddp"].items():
        mean = world.all_reduce_sum(value.clone()) / world.size
        assert torch.equal(mean, value), f"{name} differs between processes"
        error = float((weights["fsdp"][name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        assert error < 1e-2, f"{name} differs by {error:.1e} between DDP and FSDP2"  # Adam magnifies rounding


def report(seconds: dict[str, float], batch_rank: int, num_params: int) -> None:
    """Print rates, ratios, and the parts of the loss."""
    alone = seconds["one process"]
    size = f"{num_params / 1e6:.2f} million parameters"
    print(f"{size}, {batch_rank} images per process and step, PyTorch {torch.__version__}")
    for name in ("one process", "two on their own", "DDP", "FSDP2"):
        processes = 1 if name == "one process" else 2
        rate = processes * batch_rank / seconds[name]
        efficiency = alone / seconds[name]
        print(f"{name:18s} {seconds[name] * 1e3:8.1f} ms per step {rate:7.2f} img/s   efficiency {efficiency:.3f}")
    shared = seconds["two on their own"] - alone
    print(f"sharing the machine: {shared * 1e3:.1f} ms")
    print(f"by itself, the sum of all gradients: {seconds['exchange'] * 1e3:.1f} ms; ", end="")
    print(f"FSDP2's gathers and scatters, block by block: {seconds['gathers'] * 1e3:.1f} ms")
    for name in ("DDP", "FSDP2"):
        rest = seconds[name] - seconds["two on their own"]
        print(f"{name}: {rest * 1e3:.1f} ms more than two processes on their own")
    print("The processes agree in every weight, DDP and FSDP2 to rounding.")


@click.command()
@click.option("--batch", default=8, show_default=True, help="Images per process and step")
@click.option("--repeats", default=5, show_default=True, help="Turns of all ways")
def main(batch: int, repeats: int) -> None:
    """Weak scaling over two processes on this machine's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(member, args=(folder, batch, repeats), nprocs=2)


if __name__ == "__main__":
    main()
