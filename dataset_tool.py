"""Make data sets for training: command line."""

import signal
import sys
from pathlib import Path
from typing import Any

import dnnlib.start  # noqa: F401 - before packages that may be missing

import click
from tqdm import tqdm

from dnnlib.cli import BYTES, PAIR, PATH, SOURCE, main, say_next

# Worker processes of `convert` import this file when they start. Commands import everything else themselves, so that
# neither workers nor --help wait for torch.

# Processes that share the work finish far apart, and wait for each other only at the end.
PATIENCE_HOURS = 48

COUNT = click.IntRange(min=1)


@click.group()
def cmdline() -> None:
    """Make data sets for training."""


@cmdline.command()
@click.option("--source", metavar="PATH", type=PATH, required=True, help="The images")
@click.option("--dest", metavar="PATH", type=PATH, required=True, help="ZIP file or empty folder")
@click.option("--max-images", metavar="INT", type=COUNT, help="Take the first N in the order of names")
@click.option("--balanced", is_flag=True, help="Take --max-images evenly over the classes")
@click.option("--resolution", metavar="WxH", help="Size of the results, as in 64x64 [default: as they are]")
@click.option(
    "--transform",
    type=click.Choice(["center-crop", "center-crop-wide", "center-crop-dhariwal"]),
    help="How to bring images to --resolution [default: scale, not keeping the aspect]",
)
@click.option("--exif", is_flag=True, help="Turn images upright as their EXIF data says [default: ignore it]")
@click.option(
    "--background",
    metavar="COLOR|none",
    help="Put images with transparent pixels on this color, or keep transparency [default: drop it]",
)
@click.option(
    "--range",
    "value_range",
    metavar="LOW,HIGH",
    type=PAIR,
    help="Values of images with more than 8 bits that become black and white [default: all 16 bits]",
)
@click.option("--split", metavar="NAME", help="Part of a source that has several [default: train]")
@click.option("--label", metavar="NAME", help="Labels of a source that has several kinds, as in coarse")
@click.option("--label-level", metavar="INT", type=COUNT, help="Classes are the folders of this level, 1 for the top")
@click.option("--no-labels", is_flag=True, help="Leave the labels out")
@click.option("--shards", metavar="INT", type=COUNT, help="Write N files name-00000.zip, ...")
@click.option("--shard-size", type=BYTES, help="Write files name-00000.zip, ... of at most this size: 2GB")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do at a file that cannot be read; skip lists them",
)
@click.option("--overwrite", is_flag=True, help="Replace existing ZIP files")
@click.option("--skip-existing", is_flag=True, help="Keep finished files of the same command; shards appear one by one")
@click.option("--workers", metavar="INT", type=COUNT, help="Processes to use [default: one per core]")
def convert(resolution: str | None, workers: int | None, **options: Any) -> None:
    """Make a data set from images, on all cores.

    The source is a folder or a ZIP file of images (JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF), an .npz batch of samples,
    the files of MNIST or CIFAR, an LMDB, a Hugging Face data set on disk, or WebDataset tars; docs/datasets.md
    describes how each is converted. Labels come from a dataset.json, a metadata.jsonl or metadata.csv with file_name
    and label, the .cls or .json files of WebDatasets, else from the names of the top-level folders; the last line lists
    the classes. The result does not depend on the number of processes, and appears when it is complete.

    \b
    # ImageNet at 64x64, as for the published models
    python dataset_tool.py convert --source=imagenet/train --dest=img64.zip \\
        --resolution=64x64 --transform=center-crop-dhariwal

    \b
    # CIFAR-10 as downloaded
    python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=cifar10.zip

    \b
    # A large set on two machines, in 64 files that together are one data set
    torchrun --nnodes=2 ... dataset_tool.py convert --source=photos \\
        --dest=photos.zip --shards=64 --resolution=256x256 --transform=center-crop
    """
    from torch_utils import distributed
    from torch_utils.processes.dealing import cores_per_process
    from training.conversion.convert import ConvertOptions, DatasetConversion
    from training.conversion.transforms import parse_resolution

    # After `kill`, or from torchrun when another process fails: end by an exception, which removes unfinished files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    size = None if resolution is None else parse_resolution(resolution)
    request = ConvertOptions(**options, resolution=size, workers=workers or cores_per_process())
    with distributed.joined("cpu", patience_hours=PATIENCE_HOURS) as world:
        conversion = DatasetConversion(request, world)
        with tqdm(total=len(conversion), desc="Converting", unit="image", disable=not world.is_main) as progress:
            for step in conversion:
                progress.update(step.num_images)
                for line in step.unreadable:
                    progress.write(f"Left out: {line}", file=sys.stderr)
        lines = [conversion.summary(), *conversion.notes()]
    if world.is_main:
        click.echo("\n".join(lines))
        say_how_to_train(request.dest, labels=conversion.source.labels is not None)


def say_how_to_train(dest: Path, *, labels: bool) -> None:
    """Say which command proposes a preset for a data set."""
    unlabeled = () if labels else ("--cond=False",)
    say_next("train_edm2.py", "--outdir=training-runs/NAME", f"--data={dest}", *unlabeled, "--dry-run")


@cmdline.command()
@click.argument("path", metavar="PATH", type=PATH)
@click.option("--grid", metavar="FILE.png", type=PATH, help="Write a contact sheet")
@click.option("--json", "json_file", metavar="FILE", type=PATH, help="Write the report as JSON")
def inspect(path: Path, grid: Path | None, json_file: Path | None) -> None:
    """Look at every item of a data set, and tell whether training would take it.

    Exit code 0 if it would, 1 if not; every problem is listed with its remedy.

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
        kind = "pictures" if report.kind == "images" else report.kind  # programs know the kind by this word
        record = {**dataclasses.asdict(report), "kind": kind, "accepted": report.accepted}
        write_text(json_file, json.dumps(record, indent=2) + "\n")
    if grid is not None:
        write_sheet(grid, inspection.sample(), num_columns=8)
    if not report.accepted:
        sys.exit(1)  # click would print a returned number


_TRANSCODE_OPTIONS = [
    click.option("--source", metavar="PATH", type=PATH, required=True, help="Data set to read"),
    click.option("--dest", metavar="PATH", type=PATH, required=True, help="ZIP file or empty folder"),
    click.option("--max-images", metavar="INT", type=COUNT, help="Take the first N"),
    click.option("--shards", metavar="INT", type=COUNT, help="Write N files name-00000.zip, ..."),
    click.option("--batch", metavar="INT", type=COUNT, default=8, show_default=True, help="Images at once"),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: the best one here]"),
    click.option("--overwrite", is_flag=True, help="Replace existing ZIP files"),
    click.option("--skip-existing", is_flag=True, help="Keep a finished result of the same command"),
    click.option("--grid", metavar="FILE.png", type=PATH, help="Contact sheet of the result"),
]


def transcode_options(command: Any) -> Any:
    """Add the options of `encode` and `decode`."""
    for option in reversed(_TRANSCODE_OPTIONS):
        command = option(command)
    return command


@cmdline.command()
@transcode_options
@click.option(
    "--model-url",
    metavar="NAME|DIR",
    type=SOURCE,
    help="VAE: hub name or diffusers folder [default: the published one]",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Measure the latents' statistics for training [default: unless the VAE is the published one]",
)
@click.option(
    "--pixel-min", metavar="FLOAT", type=float, default=0, show_default=True, help="Black for the VAE: 0 or -1"
)
@click.option(
    "--encoder-precision",
    type=click.Choice(["tf32", "fp32"]),
    default="tf32",
    show_default=True,
    help="Convolutions of the VAE on NVIDIA GPUs; tf32 as for published latents",
)
def encode(
    model_url: str | None, measure: bool | None, pixel_min: float, encoder_precision: str, **options: Any
) -> None:
    """Encode the images of a data set as raw VAE latents: mean and standard deviation for each latent pixel.

    The published networks were trained on latents of the default VAE, for pixels from 0 to 1. Other VAEs that diffusers
    loads as AutoencoderKL work as well; dataset.json then notes the VAE and what training needs. The same command
    continues interrupted work. --grid shows images next to the decoding of their latents.

    \b
    python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip

    \b
    # On 8 GPUs, in 64 files that together are one data set
    torchrun --standalone --nproc_per_node=8 dataset_tool.py encode \\
        --source=img512.zip --dest=img512-sd.zip --shards=64
    """
    from training.config import PUBLISHED_VAE
    from training.dataset.latents import vae_encoder

    def make_encoder(source: Any, batch: int) -> Any:
        encoder = vae_encoder(source, model_url or PUBLISHED_VAE, batch_size=batch, pixel_min=pixel_min)
        return encoder.with_encoder(tf32=encoder_precision == "tf32")

    run_transcoding(
        make_encoder,
        to_latents=True,
        measure=model_url not in (None, PUBLISHED_VAE) if measure is None else measure,
        **options,
    )


@cmdline.command()
@transcode_options
@click.option(
    "--model-url",
    metavar="NAME|DIR",
    type=SOURCE,
    help="VAE: hub name or diffusers folder [default: the data set's own]",
)
def decode(model_url: str | None, **options: Any) -> None:
    """Decode raw VAE latents, as written by `encode`, to images.

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
    to_latents: bool,
    **options: Any,
) -> None:
    """Encode or decode: check, load the VAE, run, and draw the contact sheet."""
    from torch_utils import distributed
    from torch_utils.precision import numerics
    from training.conversion import transcode
    from training.dataset.image_folder import ImageFolderDataset
    from training.images.sheet import require_sheet, write_sheet

    dataset = ImageFolderDataset(source)
    encoder = make_encoder(dataset, batch)
    dataset.check_headers(1000)  # fail now rather than after hours if items differ
    if grid is not None:
        require_sheet(grid)
    with distributed.joined(device, patience_hours=PATIENCE_HOURS) as world:
        num_images = min(len(dataset), options["max_images"] or len(dataset))
        encoder = transcode.compiled_for(encoder, num_images, world, to_latents=to_latents, announce=click.echo)
        work = transcode.Transcoding(
            dataset, dest, encoder, source_path=source, world=world, num_shards=shards, to_latents=to_latents, **options
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
                write_sheet(grid, transcode.sample_images(dataset, work.encoder, world.device), num_columns=8)
    if world.is_main:
        click.echo(work.summary() + (f"; contact sheet {grid}" if grid else ""))
        if to_latents:
            say_how_to_train(dest, labels=dataset.label_dim > 0)
        else:
            say_next("dataset_tool.py", "inspect", str(dest), "--grid=sheet.png")


_CONTINUES = "Finished work stays in the folder DEST.partial, and the same command continues from there."
INTERRUPTED = {
    "convert": "No unfinished file is left. The same command starts again; with --shards and --skip-existing, after the"
    " finished shards.",
    "inspect": "The data set is as it was; the same command starts again.",
    "encode": _CONTINUES,
    "decode": _CONTINUES,
}

if __name__ == "__main__":
    main(cmdline, interrupted=INTERRUPTED)
