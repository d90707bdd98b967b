"""Compare sampling by prepared networks with the plain eager oracle and its own sampler, and print a profile.

On a CUDA device: the published shapes of img512-S, with and without a guide of the shapes of XS and a decoder of the
published size, all with random weights. Else a network of five million parameters on the CPU in float32 and bfloat16.
The ways take turns, and the fastest run of each counts; the images of both must agree.

    python -m benchmarks.sample
"""

import dataclasses
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers.oracle import PlainPrecond, plain_guided, plain_heun_sampler
from torch_utils.distributed import resolve_device
from torch_utils.precision import numerics
from torch_utils.precision_names import Precision
from training.fast.prepare import PrepareNetwork
from training.networks_edm2 import Precond
from training.sampling.sampler import edm_sampler

# Allowed difference of the images relative to their spread: rounding, carried through all steps.
TOLERANCE: dict[str, float] = {"fp32": 1e-3, "tf32": 0.05, "fp16": 0.05, "bf16": 0.2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    name: str
    net: dict[str, Any]  # arguments of the network
    gnet: dict[str, Any] | None = None
    guidance: float = 1.0
    batch: int
    precision: Precision
    compile: bool = False
    decoder: bool = False


SMALL = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 64, "channel_mult": [1, 2],
         "num_blocks": 3, "attn_resolutions": [16]}  # fmt: skip
IMG512_S = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 192}
IMG512_XS = IMG512_S | {"model_channels": 128}


def cases_of(device: torch.device, batch: int | None) -> list[Case]:
    """Return the lines for `device`; `batch` replaces the usual one."""
    if device.type != "cuda":
        small = Case(name="5 million parameters, 32x32", net=SMALL, batch=batch or 8, precision="fp32")
        return [small, dataclasses.replace(small, precision="bf16")]
    plain = Case(name="S", net=IMG512_S, batch=batch or 32, precision="fp16", compile=True)
    guided = dataclasses.replace(plain, name="S, guided by XS", gnet=IMG512_XS, guidance=1.4)
    decoded = [dataclasses.replace(case, name=f"{case.name}, with decoder", decoder=True) for case in (plain, guided)]
    eager = dataclasses.replace(plain, name="S, not compiled", compile=False)
    return [plain, guided, *decoded, eager, dataclasses.replace(plain, name="S, one image", batch=1)]


def random_network(options: dict[str, Any], device: torch.device, seed: int) -> tuple[Precond, PlainPrecond]:
    """Return a network with random weights, none of its gains zero, and the oracle with the same weights."""
    torch.manual_seed(seed)
    net = Precond(**options).eval().requires_grad_(False)
    for param in net.parameters():
        if param.ndim == 0:
            param.fill_(0.3)
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # as published
    plain = PlainPrecond(**options, dtype=dtype).eval().requires_grad_(False)
    plain.load_state_dict(net.state_dict())
    return net.to(device), plain.to(device)


def random_decoder(device: torch.device, width: int = 128) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a decoder of the published size (`width` 128): latents to pixels, four at once, on a GPU in float16."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=4,
    )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    vae = vae.eval().requires_grad_(False).to(device, dtype).to(memory_format=torch.channels_last)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([vae.decode(part.to(dtype)).sample for part in latents.split(4)])

    return decode


class Ways:
    """Two ways to sample the images of a case: ours and the oracle's."""

    def __init__(self, case: Case, device: torch.device, num_steps: int, decoder_width: int = 128) -> None:
        self.device = device
        net, plain = random_network(case.net, device, seed=0)
        guide, plain_guide = (None, None) if case.gnet is None else random_network(case.gnet, device, seed=1)
        prepare = PrepareNetwork(precision=case.precision, compile=case.compile, announce=click.echo)
        net, guide = prepare(net, device), None if guide is None else prepare(guide, device)
        random = torch.Generator().manual_seed(2)
        shape = [case.batch, net.img_channels, net.img_resolution, net.img_resolution]
        noise = torch.randn(shape, generator=random).to(device)
        labels = torch.eye(net.label_dim)[torch.randint(net.label_dim, [case.batch], generator=random)].to(device)
        decode = random_decoder(device, decoder_width) if case.decoder else lambda latents: latents

        def ours() -> torch.Tensor:
            options: dict[str, Any] = {"num_steps": num_steps, "guidance": case.guidance}
            return decode(edm_sampler(net, noise, labels, guide, **options))

        def oracle() -> torch.Tensor:
            denoise = plain_guided(plain, plain_guide, labels, case.guidance)
            return decode(plain_heun_sampler(denoise, noise, num_steps=num_steps))

        self.ours, self.oracle = ours, oracle

    @torch.no_grad()
    def seconds(self, way: Callable[[], torch.Tensor]) -> float:
        """Return the wall time until the images of `way` are ready."""
        start = time.perf_counter()
        way()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def difference(self) -> float:
        """Return the root mean square difference of the images, relative to the spread of the oracle's."""
        expected = self.oracle().float()
        return float((self.ours().float() - expected).square().mean().sqrt() / expected.std())

    def profile(self, rows: int) -> str:
        """Return a profile of our way: the operations or kernels that take most time, and the share of matrix work."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as recorded:
            self.seconds(self.ours)
        events = recorded.key_averages()
        on_gpu = self.device.type == "cuda"
        times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
        total = sum(times.values())
        lines = [f"  {micros / total:6.1%}  {key[:90]}" for key, micros in sorted(times.items(), key=lambda i: -i[1])]
        matrix = sum(micros for key, micros in times.items() if is_matrix_work(key)) / total
        return "\n".join([*lines[:rows], f"  {matrix:6.1%}  convolutions, matrix products and attention together"])


def is_matrix_work(name: str) -> bool:
    """Return whether an operation or kernel of this name is a convolution, a matrix product or attention."""
    parts = ("conv", "gemm", "mm", "attention", "flash", "fmha", "xmma", "cutlass", "cudnn", "wgmma", "nvjet")
    return any(part in name.lower() for part in parts) and "memcpy" not in name.lower()


def measure(case: Case, device: torch.device, *, num_steps: int, repeats: int, **sizes: Any) -> tuple[float, float]:
    """Return the seconds for the images of `case`, ours and the oracle's; print the line, and the profile of ours."""
    ways = Ways(case, device, num_steps, **sizes)
    difference = ways.difference()
    assert difference < TOLERANCE[case.precision], f"{case.name}: the images differ by {difference:.3g}"
    ours = oracle = float("inf")
    for _ in range(repeats):
        ours, oracle = min(ours, ways.seconds(ways.ours)), min(oracle, ways.seconds(ways.oracle))
    mode = f"{case.precision}{', compiled' if case.compile else ''}"
    click.echo(
        f"{case.name}, batch {case.batch}, {mode}: {case.batch / ours:.3g} images/s, {ours:.3f} s; oracle "
        f"{case.batch / oracle:.3g} images/s, {oracle:.3f} s; ratio {oracle / ours:.2f}; difference {difference:.1e}"
    )
    click.echo(ways.profile(rows=8))
    return ours, oracle


@click.command()
@click.option("--steps", default=None, type=int, help="Heun steps [default: 32 on a GPU, 4 on a CPU]")
@click.option("--batch", default=None, type=int, help="Images at once [default: 32 and 1 on a GPU, 8 on a CPU]")
@click.option("--repeats", default=3, show_default=True, help="Runs of each way")
@click.option("--device", default=None, help="[default: the best of this machine]")
def main(steps: int | None, batch: int | None, repeats: int, device: str | None) -> None:
    """Print the table."""
    place = resolve_device(device)
    on_gpu = place.type == "cuda"
    steps = steps or (32 if on_gpu else 4)
    machine = (
        torch.cuda.get_device_name(place) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    click.echo(
        f"{datetime.date.today()}, {machine}, torch {torch.__version__}, {steps} steps, {2 * steps - 1} evaluations"
    )
    with numerics(cudnn_benchmark=False):  # as generate_images.py; a CUDA graph is recorded with it on
        for case in cases_of(place, batch):
            measure(case, place, num_steps=steps, repeats=repeats)


if __name__ == "__main__":
    main()
