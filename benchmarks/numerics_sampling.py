"""Compare the images of each number format with those of the plain network in float32, in gray levels.

Network, guide and sampler are those of the shipped demo, with the same seeds.

    python -m benchmarks.numerics_sampling
"""

import datetime
import platform
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import torch

from torch_utils.distributed import resolve_device
from torch_utils.precision import numerics, precision_note
from torch_utils.precision_names import PRECISIONS
from training.fast.prepare import PrepareNetwork
from training.sampling.generation import Prepare, generate_images
from training.sampling.request import resolve_sampling


def images_of(prepare: Prepare, num: int, device: torch.device, **options: Any) -> np.ndarray:
    """Return the images of seeds 0 to num - 1, [N, C, H, W] as integers from 0 to 255."""
    request = resolve_sampling(preset="demo")
    options = {"max_batch_size": 25, "sampler_options": request.sampler, **options}
    images = generate_images(request.net, request.gnets, seeds=range(num), device=device, prepare=prepare, **options)
    with numerics(cudnn_benchmark=False):
        return np.concatenate([batch.images.cpu().numpy() for batch in images if batch.images is not None]).astype(int)


def ways_on(device: torch.device, compiled: bool) -> dict[str, tuple[PrepareNetwork, dict[str, Any]]]:
    """Return by name: the preparation of the networks, and options of `generate_images`."""
    ways: dict[str, tuple[PrepareNetwork, dict[str, Any]]] = {}
    for precision in PRECISIONS:
        if precision in ("fp32", "bf16") or precision_note(precision, device) is None:
            ways[precision] = PrepareNetwork(precision=precision), {}
            if compiled:
                ways[f"{precision}, compiled"] = PrepareNetwork(precision=precision, compile=True), {}
    ways["fp32, batches of 1"] = PrepareNetwork(precision="fp32"), {"max_batch_size": 1}
    return ways


def in_float32(net: Any, device: torch.device) -> Any:
    """Return the plain network in float32, the reference, even if its file asks for float16."""
    net.use_fp16 = False
    return net


def table(num: int, device: torch.device, compiled: bool, **options: Any) -> Iterator[str]:
    """Yield the lines of the table; `options` go to `generate_images`."""
    expected = images_of(in_float32, num, device, **options)
    yield "| mode | largest | mean | pixels that differ |"
    yield "|---|---|---|---|"
    for name, (prepare, more) in ways_on(device, compiled).items():
        difference = np.abs(images_of(prepare, num, device, **{**options, **more}) - expected)
        yield f"| {name} | {difference.max()} | {difference.mean():.4f} | {np.mean(difference > 0):.2%} |"


@click.command()
@click.option("--num", default=100, show_default=True, help="Images")
@click.option("--device", default=None, help="[default: the best of this machine]")
@click.option("--compiled/--no-compiled", default=False, show_default=True, help="Compiled networks too")
def main(num: int, device: str | None, compiled: bool) -> None:
    """Print the table."""
    place = resolve_device(device)
    machine = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    click.echo(f"{datetime.date.today()}, {machine}, torch {torch.__version__}, {num} images, from 0 to 255")
    for line in table(num, place, compiled):
        click.echo(line)


if __name__ == "__main__":
    main()
