"""Measure how fast data sets are read and made.

    python -m benchmarks.dataset

Prints items per second, in one process and one thread, of a reader that calls zipfile for each item and copies, and of
ours; then batches per second of a loader with two workers. The items of both readers are compared first. Then come the
rates of `dataset_tool.py convert` with one worker and with two. All files are temporary. Needs two free cores.
"""

import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image

from benchmarks import convert

# Worker processes import this file, so torch, which takes seconds, is imported inside functions.

BATCH = 32


def natural(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a smooth image [3, size, size] with some noise, so that PNG's filters have work to do."""
    coarse = rng.normal(128, 40, (size // 8, size // 8, 3)).clip(0, 255).astype(np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC))
    return (
        (smooth.astype(np.int16) + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the .npy file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pillow_png(image: np.ndarray) -> bytes:
    """Return an uncompressed PNG as Pillow writes it: with filtered rows."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def write_archive(path: Path, suffix: str, items: Iterator[bytes]) -> None:
    """Write a data set as a ZIP file without compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, data in enumerate(items):
            archive.writestr(f"{i // 1000:05d}/img{i:08d}{suffix}", data)


def plain_reader(path: Path) -> Callable[[range], np.ndarray]:
    """Return the reader to compare with: zipfile for each item, decode, copy, stack."""
    archive = zipfile.ZipFile(path)
    names = sorted(archive.namelist())

    def load(name: str) -> np.ndarray:
        data = archive.read(name)
        if name.endswith(".npy"):
            return np.load(io.BytesIO(data))
        return np.ascontiguousarray(np.array(PIL.Image.open(io.BytesIO(data))).transpose(2, 0, 1))

    return lambda indices: np.stack([load(names[i]) for i in indices])


def items_per_sec(read: Callable[[range], np.ndarray], num_items: int) -> float:
    """Return items per second over one pass in batches."""
    start = time.perf_counter()
    for first in range(0, num_items, BATCH):
        read(range(first, min(first + BATCH, num_items)))
    return num_items / (time.perf_counter() - start)


def loader_batches_per_sec(dataset: Any, num_workers: int) -> float:
    """Return batches per second of a DataLoader, without the start of its workers."""
    import torch

    from training.dataset.contract import BatchReader

    order = [list(range(i, i + BATCH)) for i in range(0, len(dataset) - BATCH + 1, BATCH)] * 4
    loader = torch.utils.data.DataLoader(
        BatchReader(dataset),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        multiprocessing_context="spawn",
        prefetch_factor=4,
    )
    batches = iter(loader)
    for _ in range(2 * 4):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count / (time.perf_counter() - start)


def measure(label: str, path: Path, repeats: int) -> None:
    """Print a line of the table."""
    from training.dataset.image_folder import ImageFolderDataset

    dataset = ImageFolderDataset(path)
    num_items = len(dataset)
    ours: Callable[[range], np.ndarray] = lambda indices: dataset.read_batch(indices)[0]  # noqa: E731
    plain = plain_reader(path)
    first_pass = items_per_sec(ours, num_items)  # compares checksums
    for first in range(0, num_items, BATCH):
        indices = range(first, min(first + BATCH, num_items))
        assert np.array_equal(ours(indices), plain(indices))
    pairs = [(items_per_sec(plain, num_items), items_per_sec(ours, num_items)) for _ in range(repeats)]
    slow, fast = (float(np.median(rates)) for rates in zip(*pairs, strict=True))
    batches = loader_batches_per_sec(dataset, 2)
    print(
        f"{label:<34} zipfile {slow:8.0f}/s   mapped {fast:8.0f}/s   ratio {fast / slow:5.1f}x   "
        f"(first pass {first_pass:8.0f}/s)   2 workers {batches:6.0f} batches of {BATCH} per second"
    )


@click.command()
@click.option("--items", default=2000, show_default=True, help="Items of the small kinds; a quarter of the large one")
@click.option("--images", default=2000, show_default=True, help="Images to convert; 0 = leave this out")
@click.option("--repeats", default=5, show_default=True, help="Turns of both ways, of which the median counts")
def main(items: int, images: int, repeats: int) -> None:
    """Compare readers on latents and on PNGs, as dataset_tool.py and as Pillow writes them; then convert."""
    import torch

    from training.dataset.image_folder import ImageFolderDataset
    from training.images.png import PLAIN, encode_png

    def plain_png(image: np.ndarray) -> bytes:
        return encode_png(image, compression=PLAIN)

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder, "latents.zip")
        arrays = (rng.standard_normal((8, 64, 64), dtype=np.float32) for _ in range(items))
        write_archive(latents, ".npy", map(npy_bytes, arrays))
        measure("latents 8x64x64", latents, repeats)
        for size, count in ((64, items), (256, items // 4)):
            for label, encode in (("unfiltered", plain_png), ("as Pillow writes", pillow_png)):
                path = Path(folder, f"{size}-{label}.zip")
                write_archive(path, ".png", (encode(natural(rng, size)) for _ in range(count)))
                measure(f"PNG {size}x{size} {label}", path, repeats)
        many = Path(folder, "many.zip")
        write_archive(many, ".npy", (npy_bytes(np.zeros((1, 1, 1), dtype=np.float32)) for _ in range(20_000)))
        start = time.perf_counter()
        ImageFolderDataset(many)
        print(f"opening a ZIP of 20,000 items: {time.perf_counter() - start:.2f} s")
    if images:
        convert.compare(images, 1000, 256, 3)
    print(f"{convert.versions()}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
