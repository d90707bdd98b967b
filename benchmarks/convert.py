"""Compare dataset_tool.py convert with two workers and with one.

Makes JPEGs in a temporary folder, of 1000x750 or another --width (ImageNet's have about 500), converts them with one
worker and with two in turn, checks that both write the same bytes, and prints the medians and their ratio. Needs two
free cores.

    python -m benchmarks.convert --images=2000
"""

import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import PIL.Image
import PIL.ImageFilter

from dnnlib.cli import main

NUM_CLASSES = 10
NUM_DIFFERENT = 500  # photographs; more are links to these


def make_photographs(folder: Path, count: int, width: int) -> None:
    """Write JPEGs of width x width * 3 / 4 with about the detail of photographs: crops of smoothed noise."""
    rng = np.random.default_rng(0)
    canvas = PIL.Image.fromarray(rng.integers(0, 256, (width + 400, width + 400, 3), dtype=np.uint8))
    smooth = np.asarray(canvas.filter(PIL.ImageFilter.GaussianBlur(3)), dtype=np.float32)
    canvas = PIL.Image.fromarray(((smooth - 128) * 6 + 128).clip(0, 255).astype(np.uint8))
    made: list[Path] = []
    for i in range(count):
        left, top = int(rng.integers(400)), int(rng.integers(400))
        path = folder / f"{i % NUM_CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= NUM_DIFFERENT:
            os.link(made[i % NUM_DIFFERENT], path)
            continue
        made.append(path)
        canvas.crop((left, top, left + width, top + width * 3 // 4)).save(path, quality=90)


def convert(source: Path, dest: Path, size: int, workers: int) -> float:
    """Return the seconds of a conversion, including the start of its workers."""
    # Not at the top: worker processes import this file, and torch takes seconds.
    from training.conversion.convert import ConvertOptions, DatasetConversion

    options = ConvertOptions(
        source=source,
        dest=dest,
        resolution=(size, size),
        transform="center-crop-dhariwal",
        workers=workers,
        overwrite=True,
    )
    start = time.perf_counter()
    for _ in DatasetConversion(options):
        pass
    return time.perf_counter() - start


def compare(images: int, width: int, size: int, repeats: int) -> None:
    """Convert with one worker and with two in turn, and print the rates and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder / "source", images, width)
        convert(folder / "source", folder / "1.zip", size, 1)  # warm up: imports, and the files into memory
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats):
            for workers, times in seconds.items():
                times.append(convert(folder / "source", folder / f"{workers}.zip", size, workers))
        assert (folder / "1.zip").read_bytes() == (folder / "2.zip").read_bytes()
    one, two = (statistics.median(times) for times in seconds.values())
    work = f"{images} JPEGs of {width}x{width * 3 // 4} to {size}x{size}"
    print(
        f"convert {work}: 1 worker {images / one:.0f}/s, 2 workers {images / two:.0f}/s, ratio {one / two:.2f}x, "
        f"median of {repeats}, same bytes"
    )


def versions() -> str:
    """Return date, machine and versions, for the head of the table."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, Pillow {PIL.__version__}"
    )


@click.command()
@click.option("--images", type=click.IntRange(min=100), default=2000, show_default=True)
@click.option("--width", type=click.IntRange(min=8), default=1000, show_default=True, help="Width of the JPEGs")
@click.option("--size", type=click.IntRange(min=8), default=256, show_default=True, help="Size of the results")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
def benchmark(images: int, width: int, size: int, repeats: int) -> None:
    """Compare one worker with two."""
    compare(images, width, size, repeats)
    print(versions())


if __name__ == "__main__":
    main(benchmark)
