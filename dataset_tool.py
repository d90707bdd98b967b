"""Make data sets for training: command line."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from dnnlib.cli import main

# Worker processes of `convert` import this file when they start. What a command needs beyond the above is imported by
# the command, so that they don't wait for torch.

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class _ResolutionType(click.ParamType):
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
        if match is None:
            self.fail(f"'{value}' is no size; write width and height, as in 64x64", param, ctx)
        return int(match[1]), int(match[2])


class _BytesType(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([1-9]\d*)(|K|M|G|T|Ki|Mi|Gi)B?", value)
        if match is None:
            self.fail(f"'{value}' is no size; write bytes with an optional unit, as in 500MB or 2GiB", param, ctx)
        return int(match[1]) * _BYTES[match[2]]


@click.group()
def cmdline() -> None:
    """Make data sets for training."""


@cmdline.command()
@click.option("--source", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Where the pictures are")
@click.option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="ZIP file or empty folder")
@click.option("--max-images", metavar="INT", type=click.IntRange(min=1), help="Take the first N in the order of names")
@click.option("--balanced", is_flag=True, help="Take --max-images evenly over the classes")
@click.option("--resolution", type=_ResolutionType(), help="Size of the results, as in 64x64 [default: as they are]")
@click.option(
    "--transform",
    type=click.Choice(["center-crop", "center-crop-wide", "center-crop-dhariwal"]),
    help="How to bring pictures to --resolution [default: scale, not keeping the aspect]",
)
@click.option("--exif", is_flag=True, help="Turn pictures upright as their EXIF data says [default: ignore it]")
@click.option("--split", metavar="NAME", help="Which part of a source that has several [default: train]")
@click.option("--label", metavar="NAME", help="Which labels of a source that has several, as in coarse")
@click.option("--shards", metavar="INT", type=click.IntRange(min=1), help="Write N files name-00000.zip, ...")
@click.option("--shard-size", type=_BytesType(), help="Write files name-00000.zip, ... of at most this size: 2GB")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do at a file that cannot be read; skip lists them",
)
@click.option("--overwrite", is_flag=True, help="Replace existing ZIP files")
@click.option("--workers", metavar="INT", type=click.IntRange(min=1), help="Processes to use [default: one per core]")
def convert(workers: int | None, **options: Any) -> None:
    """Make a data set out of pictures, on all cores.

    The source is a folder or a ZIP file of pictures (JPEG, PNG, WebP, BMP, GIF, TIFF), the files of MNIST or CIFAR, an
    LMDB, a Hugging Face data set on disk, or WebDataset tars; docs/datasets.md tells what becomes of each. Labels come
    from a dataset.json, else from the names of the top-level folders. The result does not depend on the number of
    processes, and appears when it is complete.

    \b
    # ImageNet at 64x64, as the published models saw it
    python dataset_tool.py convert --source=imagenet/train --dest=img64.zip \\
        --resolution=64x64 --transform=center-crop-dhariwal

    \b
    # CIFAR-10 as it is downloaded
    python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=cifar10.zip

    \b
    # A large set on two machines, in 64 files that together are one data set
    torchrun --nnodes=2 ... dataset_tool.py convert --source=photos \\
        --dest=photos.zip --shards=64 --resolution=256x256 --transform=center-crop
    """
    from torch_utils import distributed
    from training.conversion.convert import Conversion, ConvertOptions

    # So that `kill`, and torchrun when another process fails, leave no unfinished files behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    request = ConvertOptions(**options, workers=workers or default_workers())
    world = distributed.init("cpu")
    try:
        conversion = Conversion(request, world)
        left_out, num_unreadable = 0, 0
        with tqdm(total=len(conversion), desc="Converting", unit="image", disable=not world.is_main) as progress:
            for step in conversion:
                progress.update(step.num_images)
                left_out += step.left_out
                num_unreadable += len(step.unreadable)
                for line in step.unreadable:
                    progress.write(f"Left out: {line}", file=sys.stderr)
        totals = [sum(counts) for counts in zip(*world.all_gather_objects((left_out, num_unreadable)), strict=True)]
    finally:
        world.close()
    if world.is_main:
        click.echo(describe_result(request.dest, conversion, *totals))


def describe_result(dest: Path, conversion: Any, left_out: int, num_unreadable: int) -> str:
    """What was written, in one line."""
    width, height = conversion.size
    text = f"{dest}: {conversion.num_images - left_out - num_unreadable} images of {width}x{height}"
    if conversion.num_parts > 1:
        text += f" in {conversion.num_parts} files"
    if left_out:
        text += f"; left out {left_out} that are smaller"
    return text + (f"; left out {num_unreadable} that cannot be read" if num_unreadable else "")


def default_workers() -> int:
    """One for each core that this process may use, divided among the processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


if __name__ == "__main__":
    main(cmdline)
