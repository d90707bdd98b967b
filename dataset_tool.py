"""Make data sets for training: command line."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from dnnlib.cli import BYTES, main

# Worker processes of `convert` import this file when they start. What a command needs beyond the above is imported by
# the command, so that they don't wait for torch.


# Processes that share the work finish far apart, and wait for each other at the end alone.
PATIENCE_HOURS = 48


class _ResolutionType(click.ParamType):
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
        if match is None:
            self.fail(f"'{value}' is no size; write width and height, as in 64x64", param, ctx)
        return int(match[1]), int(match[2])


@click.group()
def cmdline() -> None:
    """Make data sets for training."""


@cmdline.command()
@click.option("--source", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Where the pictures are")
@click.option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="ZIP file or empty folder")
@click.option("--max-images", metavar="INT", type=click.IntRange(min=1), help="Take the first N in the order of names")
@click.option("--balanced", is_flag=True, help="Take --max-images evenly over the classes")
@click.option(
    "--resolution",
    metavar="WxH",
    type=_ResolutionType(),
    help="Size of the results, as in 64x64 [default: as they are]",
)
@click.option(
    "--transform",
    type=click.Choice(["center-crop", "center-crop-wide", "center-crop-dhariwal"]),
    help="How to bring pictures to --resolution [default: scale, not keeping the aspect]",
)
@click.option("--exif", is_flag=True, help="Turn pictures upright as their EXIF data says [default: ignore it]")
@click.option("--split", metavar="NAME", help="Which part of a source that has several [default: train]")
@click.option("--label", metavar="NAME", help="Which labels of a source that has several, as in coarse")
@click.option("--shards", metavar="INT", type=click.IntRange(min=1), help="Write N files name-00000.zip, ...")
@click.option("--shard-size", type=BYTES, help="Write files name-00000.zip, ... of at most this size: 2GB")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do at a file that cannot be read; skip lists them",
)
@click.option("--overwrite", is_flag=True, help="Replace existing ZIP files")
@click.option("--skip-existing", is_flag=True, help="Leave files alone that hold just this; shards appear one by one")
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
    with distributed.joined("cpu", patience_hours=PATIENCE_HOURS) as world:
        conversion = Conversion(request, world)
        left_out, num_unreadable = 0, 0
        with tqdm(total=len(conversion), desc="Converting", unit="image", disable=not world.is_main) as progress:
            for step in conversion:
                progress.update(step.num_images)
                left_out += step.left_out
                num_unreadable += len(step.unreadable)
                for line in step.unreadable:
                    progress.write(f"Left out: {line}", file=sys.stderr)
        counts = (conversion.num_kept, left_out, num_unreadable)
        totals = [sum(column) for column in zip(*world.all_gather_objects(counts), strict=True)]
    if world.is_main:
        click.echo(describe_result(request.dest, conversion, *totals))


@cmdline.command()
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--grid", metavar="FILE.png", type=click.Path(path_type=Path), help="Write a contact sheet")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write the report as JSON")
def inspect(path: Path, grid: Path | None, json_file: Path | None) -> None:
    """Look at every item of a data set, and tell whether training would take it.

    Exit code 0 if so, 1 if not; the problems are listed with what mends them.

    \b
    python dataset_tool.py inspect datasets/img64.zip --grid=sheet.png
    """
    import dataclasses
    import json

    from dnnlib.atomic import write_text
    from training.conversion.inspect import Inspection, describe
    from training.images.sheet import require_sheet, write_sheet

    if grid is not None:
        require_sheet(grid)
    inspection = Inspection(path)
    for _ in tqdm(inspection, desc="Looking", unit="item", total=len(inspection)):
        pass
    report = inspection.report
    click.echo(describe(report))
    if json_file is not None:
        write_text(json_file, json.dumps({**dataclasses.asdict(report), "accepted": report.accepted}, indent=2) + "\n")
    if grid is not None:
        write_sheet(grid, inspection.sample(), num_columns=8)
    if not report.accepted:
        sys.exit(1)  # click would make a return value of it


_TRANSCODE_OPTIONS = [
    click.option("--source", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Data set to read"),
    click.option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="ZIP or empty folder"),
    click.option("--max-images", metavar="INT", type=click.IntRange(min=1), help="Take the first N"),
    click.option("--shards", metavar="INT", type=click.IntRange(min=1), help="Write N files name-00000.zip, ..."),
    click.option("--batch", metavar="INT", type=click.IntRange(min=1), default=8, show_default=True, help="At once"),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: the best one here]"),
    click.option("--overwrite", is_flag=True, help="Replace existing ZIP files"),
    click.option("--skip-existing", is_flag=True, help="End at once where the result is there, made from the same"),
    click.option("--grid", metavar="FILE.png", type=click.Path(path_type=Path), help="Contact sheet of the result"),
]


def transcode_options(command: Any) -> Any:
    """What `encode` and `decode` share."""
    for option in reversed(_TRANSCODE_OPTIONS):
        command = option(command)
    return command


@cmdline.command()
@transcode_options
@click.option("--model-url", metavar="NAME|DIR", help="VAE: hub name or diffusers folder [default: the published one]")
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Measure the latents' statistics for training [default: for another than the published VAE]",
)
@click.option(
    "--pixel-min", metavar="FLOAT", type=float, default=0, show_default=True, help="Black, as the VAE sees it: 0 or -1"
)
def encode(model_url: str | None, measure: bool | None, pixel_min: float, **options: Any) -> None:
    """Encode the pictures of a data set as raw VAE latents: mean and standard deviation for each latent pixel.

    The published networks were trained on latents of the default VAE, for pixels from 0 to 1. Other VAEs that diffusers
    knows as AutoencoderKL work as well; dataset.json then says which one it was and what training has to know. The same
    command again takes up work that was interrupted. --grid shows pictures beside what their latents decode to.

    \b
    python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip

    \b
    # On 8 GPUs, in 64 files that together are one data set
    torchrun --standalone --nproc_per_node=8 dataset_tool.py encode \\
        --source=img512.zip --dest=img512-sd.zip --shards=64
    """
    from training.dataset.latents import PUBLISHED_VAE, vae_encoder

    measure = model_url not in (None, PUBLISHED_VAE) if measure is None else measure
    run_transcoding(
        lambda source, batch: vae_encoder(source, model_url or PUBLISHED_VAE, batch_size=batch, pixel_min=pixel_min),
        to_latents=True,
        measure=measure,
        **options,
    )


@cmdline.command()
@transcode_options
@click.option("--model-url", metavar="NAME|DIR", help="VAE: hub name or diffusers folder [default: the data set's own]")
def decode(model_url: str | None, **options: Any) -> None:
    """Decode raw VAE latents, as `encode` writes them, to pictures.

    \b
    python dataset_tool.py decode --source=img512-sd.zip --dest=img512-decoded.zip
    """
    from training.conversion.transcode import own_encoder

    run_transcoding(lambda source, batch: own_encoder(source, model_url, batch=batch), to_latents=False, **options)


def run_transcoding(
    make_encoder: Any,
    *,
    source: Path,
    dest: Path,
    batch: int,
    device: str | None,
    shards: int | None,
    grid: Path | None,
    **options: Any,
) -> None:
    """What `encode` and `decode` do: check, load the VAE, run, and draw the contact sheet."""
    from torch_utils import distributed
    from torch_utils.precision import numerics
    from training.conversion import transcode
    from training.dataset.image_folder import ImageFolderDataset
    from training.images.sheet import require_sheet, write_sheet

    dataset = ImageFolderDataset(source)
    encoder = make_encoder(dataset, batch)
    dataset.check_headers(1000)  # what differs from the rest is told now, not after hours
    if grid is not None:
        require_sheet(grid)
    with distributed.joined(device, patience_hours=PATIENCE_HOURS) as world:
        work = transcode.Transcoding(
            dataset, dest, encoder, source_path=source, world=world, num_shards=shards, **options
        )
        if not work.finished or grid is not None:
            encoder.init(world.device)
        with (
            numerics(cudnn_benchmark=False),
            tqdm(total=len(work), desc="Working", unit="image", disable=not world.is_main) as progress,
        ):
            for step in work:
                progress.update(step.num_images)
            if grid is not None and world.is_main:
                write_sheet(grid, transcode.samples(dataset, work.encoder, world.device), num_columns=8)
    if world.is_main:
        place = dest if shards is None else f"{dest} in {len(work.parts)} files"
        there = ", there already" if work.finished else ""
        click.echo(f"{place}: {work.num_images} images{there}" + (f"; contact sheet {grid}" if grid else ""))


def describe_result(dest: Path, conversion: Any, num_kept: int, left_out: int, num_unreadable: int) -> str:
    """What was written, in one line."""
    width, height = conversion.size
    if num_kept:
        text = f"{dest}: {num_kept} of {conversion.num_parts} files there already"
        return text if num_kept == conversion.num_parts else f"{text}, the others written; images of {width}x{height}"
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
