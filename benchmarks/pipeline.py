"""Compare generating images with files to generating without files, and to a plain loop that writes in between.

The network is the exact denoiser of Gaussian fields whose amplitudes fall with the frequency, as those of photographs
do: two Fourier transforms, a trivial network whose images have about the size and smoothness of real ones. The plain
loop samples a batch, then encodes and writes its images one by one with Pillow's defaults, then continues.

The result depends on free cores. With one thread of PyTorch on two cores the files have a core of their own, as they do
when a GPU samples; with two threads they take time from the sampling. The cost of a file alone is printed too, from
which follows the ratio for a faster network.

    python -m benchmarks.pipeline --num=2000 --threads=1
"""

import datetime
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch

from training.images.png import encode_png
from training.images.png_files import read_png
from training.sampling.generation import generate_images


class GaussianFields(torch.nn.Module):
    """D(x; sigma) = E[y | y + sigma n = x] for fields y of amplitudes about 1/f: a filter for each frequency."""

    img_channels = 3
    label_dim = 0

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.img_resolution = resolution
        y, x = torch.fft.fftfreq(resolution)[:, None], torch.fft.rfftfreq(resolution)[None]
        power = 1 / (y**2 + x**2).clamp(min=1 / resolution**2) ** 1.3
        self.register_buffer("power", power * (0.25 / power.mean()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the expected field for `x` [N, 3, H, W]."""
        power: Any = self.power
        return torch.fft.irfft2(torch.fft.rfft2(x) * (power / (power + sigma**2)), s=x.shape[-2:])


def seconds(work: Callable[[], None]) -> float:
    """Return the wall time of `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(num: int, resolution: int, batch: int, steps: int, compression: int, repeats: int, folder: Path) -> None:
    """Print the three times and their ratios; the ways take turns, and the fastest run of each counts."""
    net = GaussianFields(resolution)
    options: dict[str, Any] = {"net": net, "max_batch_size": batch, "num_steps": steps, "device": "cpu"}

    def without_files(count: int = num) -> None:
        for _ in generate_images(seeds=range(count), **options):
            pass

    def ours() -> None:
        for _ in generate_images(seeds=range(num), outdir=folder / "ours", png_compression=compression, **options):
            pass

    def plain_loop() -> None:
        (folder / "plain").mkdir(exist_ok=True)
        for step in generate_images(seeds=range(num), **options):
            assert step.images is not None
            for seed, image in zip(step.seeds, step.images.numpy(), strict=True):
                PIL.Image.fromarray(image.transpose(1, 2, 0)).save(folder / "plain" / f"{seed:06d}.png")

    without_files(batch)  # warm up
    fastest = dict.fromkeys(("without files", "with files", "plain loop"), float("inf"))
    for _ in range(repeats):
        for name, work in zip(fastest, (without_files, ours, plain_loop), strict=True):
            fastest[name] = min(fastest[name], seconds(work))
    for seed in range(0, num, max(1, num // 50)):
        own, plain = (read_png(folder / way / f"{seed:06d}.png") for way in ("ours", "plain"))
        assert np.array_equal(own, plain), f"the files of seed {seed} differ"
    base = fastest["without files"]
    for name, sec in fastest.items():
        click.echo(f"{name:<14}{sec:8.2f} s{sec / num * 1e3:9.2f} ms/image   ratio to without files {sec / base:.3f}")
    image = read_png(folder / "ours" / "000000.png")
    sizes = [path.stat().st_size / 1024 for path in (folder / "ours" / "000000.png", folder / "plain" / "000000.png")]
    alone = min(seconds(lambda: _repeat(lambda: encode_png(image, compression=compression), 20)) for _ in range(3)) / 20
    pillow = min(seconds(lambda: _repeat(lambda: encode_png(image, compression=6), 5)) for _ in range(3)) / 5
    click.echo(f"one file alone, in memory: ours {alone * 1e3:.1f} ms, {sizes[0]:.0f} KiB; Pillow's defaults "
               f"{pillow * 1e3:.1f} ms, {sizes[1]:.0f} KiB")  # fmt: skip


def _repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


@click.command()
@click.option("--num", default=2000, show_default=True, help="Images")
@click.option("--resolution", default=512, show_default=True, help="Size of the images")
@click.option("--batch", default=4, show_default=True, help="Images at once")
@click.option("--steps", default=2, show_default=True, help="Heun steps: 2 n - 1 evaluations of the network")
@click.option("--compression", default=1, show_default=True, help="Compression of the PNG files, 0 to 9")
@click.option("--repeats", default=1, show_default=True, help="Runs of each way, of which the fastest counts")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of PyTorch")
def main(threads: int, **options: Any) -> None:
    """Print the times with and without files."""
    torch.set_num_threads(threads)
    click.echo(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {threads} threads of PyTorch")
    click.echo(f"torch {torch.__version__}, {options}")
    with tempfile.TemporaryDirectory() as folder:
        compare(**options, folder=Path(folder))


if __name__ == "__main__":
    main()
