"""How fast a data set is read, against a reader that calls zipfile for each item and copies.

`python -m benchmarks.dataset` prints the items a second of both in one process and one thread, their ratio, and the
batches a second of a loader with two workers. The items of both are compared first. The archives are made in a
temporary folder.
"""

import datetime
import io
import platform
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

from training.dataset import BatchReader, ImageFolderDataset
from training.dataset_png import encode_plain_png

BATCH = 32


def natural(rng: np.random.Generator, size: int) -> np.ndarray:
    """A picture [3, size, size] that is smooth with some noise on it, so that PNG's filters have work to do."""
    coarse = rng.normal(128, 40, (size // 8, size // 8, 3)).clip(0, 255).astype(np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC))
    return (
        (smooth.astype(np.int16) + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pillow_png(image: np.ndarray) -> bytes:
    """An uncompressed PNG as Pillow writes it, which filters the rows all the same."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def write_archive(path: Path, suffix: str, items: Iterator[bytes]) -> None:
    """A data set as a ZIP file without compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, data in enumerate(items):
            archive.writestr(f"{i // 1000:05d}/img{i:08d}{suffix}", data)


def plain_reader(path: Path) -> Callable[[range], np.ndarray]:
    """The loop to compare with: zipfile for each item, decode, copy, stack."""
    archive = zipfile.ZipFile(path)
    names = sorted(archive.namelist())

    def load(name: str) -> np.ndarray:
        data = archive.read(name)
        if name.endswith(".npy"):
            return np.load(io.BytesIO(data))
        return np.ascontiguousarray(np.array(PIL.Image.open(io.BytesIO(data))).transpose(2, 0, 1))

    return lambda indices: np.stack([load(names[i]) for i in indices])


def items_per_sec(read: Callable[[range], np.ndarray], num_items: int) -> float:
    """Over one pass in batches."""
    start = time.perf_counter()
    for first in range(0, num_items, BATCH):
        read(range(first, min(first + BATCH, num_items)))
    return num_items / (time.perf_counter() - start)


def loader_batches_per_sec(dataset: ImageFolderDataset, num_workers: int) -> float:
    """Batches of a DataLoader, its workers' start left out."""
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
        f"(first pass {first_pass:8.0f}/s)   2 workers {batches:6.0f} batches of {BATCH} a second"
    )


@click.command()
@click.option("--items", default=2000, show_default=True, help="Items of the small kinds; a quarter of the large one")
@click.option("--repeats", default=5, show_default=True, help="Times that both ways take turns; medians are printed")
def main(items: int, repeats: int) -> None:
    """Compare the two readers on latents and on PNGs of two sizes, as dataset_tool.py and as Pillow writes them."""
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {datetime.date.today()}")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder, "latents.zip")
        write_archive(
            latents,
            ".npy",
            (npy_bytes(rng.standard_normal((8, 64, 64), dtype=np.float32)) for _ in range(items)),
        )
        measure("latents 8x64x64", latents, repeats)
        for size, count in ((64, items), (256, items // 4)):
            for label, encode in (("unfiltered", encode_plain_png), ("as Pillow writes", pillow_png)):
                path = Path(folder, f"{size}-{label}.zip")
                write_archive(path, ".png", (encode(natural(rng, size)) for _ in range(count)))
                measure(f"PNG {size}x{size} {label}", path, repeats)
        many = Path(folder, "many.zip")
        write_archive(many, ".npy", (npy_bytes(np.zeros((1, 1, 1), dtype=np.float32)) for _ in range(20_000)))
        start = time.perf_counter()
        ImageFolderDataset(many)
        print(f"opening a ZIP of 20,000 items: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
