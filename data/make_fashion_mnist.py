"""Build a data set ZIP from the Fashion-MNIST files, padded from 28x28 to 32x32.

    python data/make_fashion_mnist.py --source DIR --dest FILE.zip [--split train|test] [--per-class N]

DIR holds the four files of https://github.com/zalandoresearch/fashion-mnist (Debian: package dataset-fashion-mnist,
folder /usr/share/datasets/fashion-mnist). The same arguments give the same bytes with the same version of zlib,
and the same pixels with any version. See data/README.md.
"""

import gzip
import io
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, which need not be installed

from dnnlib.cli import PathType

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
PADDING = 2  # 28 + 2 + 2 = 32, a size that halves into 16 and 8
# Ways to run zlib that tend to differ most on small images.
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)


@click.command()
@click.option(
    "--source",
    type=PathType(exists=True, file_okay=False),
    required=True,
    help="Folder with the four .gz files.",
)
@click.option("--dest", type=PathType(dir_okay=False), required=True, help="ZIP file to write.")
@click.option("--split", type=click.Choice(list(FILES)), default="train", show_default=True)
@click.option("--per-class", type=click.IntRange(min=1), help="Take the first N images of every class, not all.")
def main(source: Path, dest: Path, split: str, per_class: int | None) -> None:
    """Write one split of Fashion-MNIST as a data set ZIP of 32x32 gray PNGs."""
    images, labels = (read_idx(source / name) for name in FILES[split])
    if len(images) != len(labels):
        raise click.ClickException(f"{source} has {len(images)} images but {len(labels)} labels in split {split}")
    chosen = first_per_class(labels, per_class)
    write_dataset(dest, pad(images[chosen]), labels[chosen])
    click.echo(f"{dest}: {len(chosen)} images, {dest.stat().st_size} bytes")


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array in a gzipped file of the idx format (http://yann.lecun.com/exdb/mnist)."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, num_axes = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{num_axes}I", data[4 : 4 + 4 * num_axes])
        if (zeros, kind) != (0, 8):
            raise ValueError(f"its first bytes are {data[:4].hex()}, not those of 8-bit idx data")
        return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise click.ClickException(f"{path} is not a readable idx file: {error}") from None


def first_per_class(labels: np.ndarray, per_class: int | None) -> np.ndarray:
    """Return the indices of the first `per_class` images of every class, or of all, in their original order."""
    if per_class is None:
        return np.arange(len(labels))
    smallest = int(np.bincount(labels, minlength=len(CLASSES)).min())
    if per_class > smallest:
        raise click.ClickException(f"--per-class={per_class} is more than the smallest class holds, {smallest}")
    return np.sort(np.concatenate([np.flatnonzero(labels == i)[:per_class] for i in range(len(CLASSES))]))


def pad(images: np.ndarray) -> np.ndarray:
    """Pad [N, 28, 28] to [N, 32, 32] with zeros (the images' own background) on all sides."""
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))


def write_dataset(dest: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images [N, H, W] and class indices [N] in the layout that dataset_tool.py writes."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    index = {"labels": [[name, int(label)] for name, label in zip(names, labels, strict=True)]}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(entry(name), encode_png(image))
        archive.writestr(entry("dataset.json", zipfile.ZIP_DEFLATED), json.dumps(index), compresslevel=9)
    temp = dest.with_name(f".{dest.name}.tmp")  # an interrupted run leaves no half archive under the name
    temp.write_bytes(buffer.getvalue())
    temp.replace(dest)


def entry(name: str, compression: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    """Return a ZIP entry that does not depend on the clock or the system."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = compression
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


def encode_png(image: np.ndarray) -> bytes:
    """Return a gray 8-bit PNG of `image` [H, W]: the smallest over row filters and zlib strategies.

    An image takes some 440 bytes of pixel data this way, where Pillow's optimize=True takes 460.
    """
    pixels = min(
        (deflate(rows, strategy) for rows in filtered_rows(image) for strategy in STRATEGIES),
        key=len,
    )
    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def filtered_rows(image: np.ndarray) -> list[bytes]:
    """Return the rows behind their filters' numbers: once for each of the five filters, and once for the usual mixture.

    For each row, the mixture takes the filter whose output, read as signed bytes, has the least sum of magnitudes.
    """
    x = image.astype(np.int32)
    padded = np.pad(x, ((1, 0), (1, 0)))
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    estimate = left + up - corner
    to_left, to_up, to_corner = (abs(estimate - neighbour) for neighbour in (left, up, corner))
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
    predictions = (np.zeros_like(x), left, up, (left + up) // 2, paeth)
    residuals = np.stack([(x - prediction) % 256 for prediction in predictions])  # [filter, H, W]
    magnitudes = np.minimum(residuals, 256 - residuals).sum(axis=2)  # [filter, H]
    choices = [np.full(len(x), i) for i in range(len(predictions))] + [magnitudes.argmin(axis=0)]
    return [
        b"".join(bytes([number]) + residuals[number, y].astype(np.uint8).tobytes() for y, number in enumerate(choice))
        for choice in choices
    ]


def deflate(data: bytes, strategy: int) -> bytes:
    """Return `data` as a zlib stream."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return compressor.compress(data) + compressor.flush()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


if __name__ == "__main__":
    main()
