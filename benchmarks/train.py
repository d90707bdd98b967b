"""Compare speed and memory of a training step with the plain eager implementation of the papers.

A step is noise, forward, backward, Adam and both averages: tensor by tensor in tests/helpers/oracle.py, fast in
training/run/state.py. Both start from the same weights. Loss and gradients are compared first; then both take turns.
The matrix rate is that of a large matrix product (on a CPU: of 3x3 convolutions), measured in the same run. A step has
three times the operations of the forward pass, of which convolutions, matrix products and attention count here.

    python -m benchmarks.train                        # by device: 5 million parameters, or S and XXL
    python -m benchmarks.train --shape=s --precision=bf16 --batch=64 --profile
    python -m benchmarks.train --loop                 # the whole loop against the bare step
"""

import datetime
import functools
import gc
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import click
import torch

from dnnlib.cli import main
from tests.helpers.oracle import PlainPrecond, PlainTrainer, plain_loss
from torch_utils.distributed import World, resolve_device
from torch_utils.precision import compute_dtype, numerics
from torch_utils.precision_names import Precision
from training.config import NetworkConfig, TrainingConfig
from training.flops import count_flops
from training.presets import locate, training_preset
from training.run.run_folder import RunFolder
from training.run.run_network import make_network
from training.run.state import TrainingState
from training.run.update import normalize_weights
from training.small_data.estimate import saved_bytes
from training.training_loop import Iteration, TrainingRun


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network to train, its images and the batch."""

    name: str
    network: NetworkConfig
    resolution: int
    channels: int
    label_dim: int
    batch: int

    def dataset(self) -> Any:
        """Return the attributes of a data set that TrainingState uses."""
        return SimpleNamespace(
            resolution=self.resolution,
            num_channels=self.channels,
            label_dim=self.label_dim,
            holds_latents=False,
            class_names=None,
        )


SMALL = NetworkConfig(channels=64, channel_mult=(1, 2), num_blocks=3, attn_resolutions=(16,))
# A second of work on a CPU, for tests.
TINY = Shape(
    name="tiny",
    network=NetworkConfig(channels=4, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), channels_per_head=4),
    resolution=8,
    channels=3,
    label_dim=3,
    batch=4,
)
SHAPES = {
    "small": Shape(name="5 million parameters", network=SMALL, resolution=32, channels=3, label_dim=10, batch=16),
    "s": Shape(
        name="img512-S", network=NetworkConfig(channels=192), resolution=64, channels=4, label_dim=1000, batch=64
    ),
    "xxl": Shape(
        name="img512-XXL",
        network=NetworkConfig(channels=448, dropout=0.1),
        resolution=64,
        channels=4,
        label_dim=1000,
        batch=16,
    ),
}


class Way:
    """One way of taking steps on one shape. `make` makes its state, `close` frees it."""

    def __init__(
        self, name: str, dtype: torch.dtype, device: torch.device, make: Callable[[], Callable[[], Any]]
    ) -> None:
        self.name, self.dtype = name, dtype
        self._device, self._make = device, make
        self._step: Callable[[], Any] | None = None
        self.seconds: list[float] = []
        self.memory = 0  # bytes

    def open(self) -> None:
        """Make the state, warm up, and measure memory.

        On a GPU the peak of a step with the whole state, on a CPU the bytes that a step keeps for its backward pass.
        """
        on_gpu = self._device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self._step = self._make()
        click.echo(f"{self.name}: first step {self(1):.1f} s")
        self(2)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self(1)
            self.memory = torch.cuda.max_memory_allocated() - before
        else:
            self.memory = saved_bytes(self._step)

    def __call__(self, num: int) -> float:
        """Take `num` steps, wait for their end, and return the seconds per step."""
        assert self._step is not None
        wait(self._device)
        start = time.perf_counter()
        for _ in range(num):
            self._step()
        wait(self._device)
        return (time.perf_counter() - start) / num

    def close(self) -> None:
        """Free the memory."""
        self._step = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return operations per second (a multiply-add is 2) of a large matrix product, on a CPU of 3x3 convolutions."""
    if device.type == "cuda":
        size = 8192
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        work, num_ops = (lambda: a @ b), 2 * size**3
    else:
        x, w = torch.randn(16, 128, 32, 32), torch.randn(128, 128, 3, 3)
        x, w = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, w))
        work, num_ops = (lambda: torch.nn.functional.conv2d(x, w, padding=1)), 2 * 16 * 1024 * 128 * 128 * 9
    times = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(5):
                work()
        wait(device)
        times.append((time.perf_counter() - start) / 5)
    return num_ops / min(times)


def our_state(shape: Shape, precision: Precision, device: torch.device, **options: Any) -> TrainingState:
    """Return the training state of a run of `shape`."""
    config = TrainingConfig(data="", network=replace(shape.network, precision=precision), batch=shape.batch, **options)
    return TrainingState(config, shape.dataset(), World(device=device), resumed=True)


def plain_network(shape: Shape, state: TrainingState, dtype: torch.dtype) -> PlainPrecond:
    """Return the oracle's network with the weights of `state`."""
    arguments = {k: v for k, v in shape.network.arguments().items() if k != "use_fp16"}
    net = PlainPrecond(shape.resolution, shape.channels, shape.label_dim, dtype=dtype, **arguments)
    net.load_state_dict(state.net.state_dict())
    return net.to(state.world.device)


def check(shape: Shape, state: TrainingState, dtype: torch.dtype, tolerance: float) -> str:
    """Compare loss and gradient with the oracle's on two images. Raises AssertionError if they differ by more."""
    device = state.world.device
    size = [2, shape.channels, shape.resolution, shape.resolution]
    generator = torch.Generator(device).manual_seed(0)
    images, noise = (torch.randn(size, device=device, generator=generator) for _ in range(2))
    sigmas = torch.randn([2, 1, 1, 1], device=device, generator=generator)
    labels = torch.eye(shape.label_dim, device=device)[:2]
    with torch.no_grad():
        for param in state.net.parameters():
            if param.ndim == 0:
                param.fill_(0.5)  # a gain of zero would hide most of the network
    normalize_weights(state.net)
    plain = plain_network(shape, state, dtype)
    fast = state.replica
    plain.eval(), fast.eval()  # without dropout
    losses = [
        state.loss_fn(fast, images, labels, rnd_normal=sigmas, unit_noise=noise),
        plain_loss(plain, images, labels, sigmas, noise),
    ]
    gradients = []
    for loss, net in zip(losses, (state.net, plain), strict=True):
        loss.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        net.zero_grad(set_to_none=True)
    fast.train()
    errors = [float((a - b).detach().norm() / b.detach().norm()) for a, b in (losses, gradients)]
    assert max(errors) < tolerance, f"loss and gradient are off by {errors}, more than {tolerance}"
    return f"loss to {errors[0]:.1e}, gradient to {errors[1]:.1e}"


def ways_of(
    shape: Shape, precisions: Sequence[Precision], device: torch.device, *, compiled: bool | None, recompute: bool
) -> list[Way]:
    """Return the oracle, then ours in every precision; opening these checks them against the oracle."""
    size = [shape.batch, shape.channels, shape.resolution, shape.resolution]
    images = torch.randint(0, 256, size, device=device).to(torch.uint8)
    labels = torch.eye(shape.label_dim, device=device)[torch.arange(shape.batch) % shape.label_dim]
    plain_dtype = torch.float16 if device.type == "cuda" else torch.float32

    def plain() -> Callable[[], Any]:
        state = our_state(shape, "fp32", device, compile=False)
        trainer = PlainTrainer(plain_network(shape, state, plain_dtype), batch_size=shape.batch, nimg=1 << 20)
        latents = images.float() / 127.5 - 1

        def step() -> None:
            sigmas = torch.randn([shape.batch, 1, 1, 1], device=device)
            trainer.step(latents, labels, sigmas, torch.randn_like(latents))

        return step

    def ours(precision: Precision, again: bool) -> Callable[[], Any]:
        state = our_state(shape, precision, device, compile=compiled, recompute=again)
        exact = precision == "fp32" and plain_dtype == torch.float32
        click.echo(f"Agrees with the oracle: {check(shape, state, plain_dtype, 1e-3 if exact else 0.1)}")
        return lambda: state.step(images, labels)

    ways = [Way(f"plain, {str(plain_dtype).removeprefix('torch.')}", plain_dtype, device, plain)]
    for precision, again in itertools.product(precisions, [False, True] if recompute else [False]):
        name = f"ours, {precision}" + (", recompute" if again else "")
        make = functools.partial(ours, precision, again)
        ways.append(Way(name, compute_dtype(precision, device), device, make))
    return ways


def profile(way: Way, device: torch.device) -> str:
    """Return the operations that take most time in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        way(1)
    averages = prof.key_averages()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in averages)
    rows = sorted(averages, key=lambda event: getattr(event, key), reverse=True)
    words = ("gemm", "conv", "cutlass", "attention", "flash", "fmha", "mm", "xmma", "wgrad", "dgrad")
    matrix = sum(getattr(event, key) for event in rows if any(word in event.key.lower() for word in words))
    lines = [f"Share of matrix time in {way.name}: {matrix / total:.0%}"]
    lines += [f"{getattr(event, key) / total:7.1%}  {event.count:5d} x  {event.key[:90]}" for event in rows[:15]]
    return "\n".join(lines)


def loop_against_step(precision: Precision, num_steps: int, rounds: int, *, compiled: bool | None = None) -> float:
    """Return the rate of a whole run, with loader, statistics and averages, relative to bare steps in turn."""
    with tempfile.TemporaryDirectory() as folder:
        fashion = training_preset("fashion")
        config = replace(
            fashion,
            data=locate(fashion.data),
            network=replace(SMALL, precision=precision),
            batch=16,
            compile=compiled,
            duration=1 << 31,
            status=16 * num_steps,
            snapshot=0,
            checkpoint=0,
        )
        run = TrainingRun(config, RunFolder(folder), world=World(device=resolve_device()))
        device = run.world.device
        images = torch.zeros([16, 1, 32, 32], dtype=torch.uint8, device=device)
        labels = torch.eye(10, device=device)[torch.arange(16) % 10]
        events = iter(run)

        def whole() -> None:
            while not isinstance(next(events), Iteration):
                pass

        ways = [
            Way("run", torch.float32, device, lambda: whole),
            Way("step", torch.float32, device, lambda: functools.partial(run.state.step, images, labels)),
        ]
        for way in ways:
            way.open()
        ratios = [ways[1](num_steps) / ways[0](num_steps) for _ in range(rounds)]
        run.close()
    return statistics.median(ratios)


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="[default: suits the device]")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(["fp32", "tf32", "fp16", "bf16"]))
@click.option("--batch", type=click.IntRange(min=1), help="Images per step  [default: by shape]")
@click.option("--steps", "num_steps", default=0, help="Steps at a time  [default: 1 on a CPU, 20 on a GPU]")
@click.option("--repeats", default=7, show_default=True, help="Turns of each way, of which the median counts")
@click.option("--compile", "compiled", type=bool, help="[default: on CUDA devices]")
@click.option("--recompute", is_flag=True, help="Measure activation checkpointing too")
@click.option("--profile", "profiled", is_flag=True, help="Print a profile of the last way")
@click.option("--loop", "loop", is_flag=True, help="Measure the loop around the step instead")
def train(
    shapes: tuple[str, ...],
    precisions: tuple[Precision, ...],
    batch: int | None,
    num_steps: int,
    repeats: int,
    compiled: bool | None,
    recompute: bool,
    profiled: bool,
    loop: bool,
) -> None:
    """Time training steps against the plain oracle."""
    device = resolve_device()
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads, {platform.machine()}"
    click.echo(f"{datetime.date.today()}, {machine}, torch {torch.__version__}")
    num_steps = num_steps or (20 if on_gpu else 1)
    precisions = precisions or (("fp16", "bf16") if on_gpu else ("fp32", "bf16"))
    if loop:
        for precision in precisions:
            ratio = loop_against_step(precision, max(num_steps, 5), repeats)
            click.echo(f"A whole run reaches {ratio:.1%} of the bare step's rate, {precision}")
        return
    for name in shapes or (("s", "xxl") if on_gpu else ("small",)):
        shape = SHAPES[name] if batch is None else replace(SHAPES[name], batch=batch)
        measure(
            shape,
            precisions,
            device,
            compiled=compiled,
            recompute=recompute,
            num_steps=num_steps,
            repeats=repeats,
            profiled=profiled,
        )


def measure(
    shape: Shape,
    precisions: Sequence[Precision],
    device: torch.device,
    *,
    compiled: bool | None,
    recompute: bool,
    num_steps: int,
    repeats: int,
    profiled: bool,
) -> None:
    """Time the ways in turn and print a table."""
    ways = ways_of(shape, precisions, device, compiled=compiled, recompute=recompute)
    # On a CPU the ways take turns, since its speed drifts; a GPU's does not, and its memory holds one way at a time.
    turns = [[way] for way in ways] if device.type == "cuda" else [ways]
    report = ""
    with numerics(cudnn_benchmark=True):
        for group in turns:
            for way in group:
                way.open()
            for way in group * repeats:
                way.seconds.append(way(num_steps))
            if profiled and ways[-1] in group:
                report = profile(ways[-1], device)
            for way in group:
                way.close()
        rates = {way.dtype: matrix_rate(way.dtype, device) for way in ways}
    click.echo(table(shape, ways, rates))
    click.echo(report)


def table(shape: Shape, ways: list[Way], rates: dict[torch.dtype, float]) -> str:
    """Return a table with a row for each way; ratios to the first one. Elementwise operations count only in time."""
    with torch.device("meta"):
        net = make_network(TrainingConfig(data="", network=shape.network), shape.dataset())
    num_ops = 2 * 3 * count_flops(net).matrix_flops * shape.batch
    lines = [
        f"\n{shape.name}, {shape.resolution}x{shape.resolution}x{shape.channels}, batch {shape.batch}:",
        "| way | images/s | ratio | matrix Tflop/s | of the matrix rate | memory, GiB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    base = statistics.median(ways[0].seconds)
    for way in ways:
        seconds = statistics.median(way.seconds)
        rate = num_ops / seconds
        lines.append(
            f"| {way.name} | {shape.batch / seconds:.1f} | {base / seconds:.2f} | {rate / 1e12:.2f} |"
            f" {rate / rates[way.dtype]:.0%} | {way.memory / 2**30:.2f} | {way.memory / ways[0].memory:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(train)
