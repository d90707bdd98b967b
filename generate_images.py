"""Generate images from a trained network: command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
from tqdm import tqdm

import dnnlib.cli
from dnnlib.cli import PATH, say_next
from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError
from dnnlib.parse import parse_int_list
from edm2.options.sampling import file_options, sampling_options, settled_precision
from training.presets import describe_generation_presets

if not ASKED_FOR_HELP:  # which does not wait for torch
    import numpy as np

    from torch_utils import distributed
    from torch_utils.distributed import World
    from torch_utils.precision import numerics
    from training.condition.conditioning import with_sources
    from training.images.png_files import read_png
    from training.images.sheet import require_sheet, write_sheet
    from training.sampling.generation import generate_images
    from training.sampling.image_batches import GeneratedImages
    from training.sampling.networks import require_writable_images
    from training.sampling.request import SamplingRequest, resolve_sampling
    from training.sampling.sampler import StackedRandomGenerator, edm_sampler
    from training.snapshot.code import EmbeddedCode

# Names that people's scripts import from here.
__all__ = ["StackedRandomGenerator", "edm_sampler", "generate_images", "parse_int_list"]

MANY = 1000  # images that are worth measuring


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, checked as far as this is possible without the networks."""

    sampling: SamplingRequest
    seeds: list[int]
    class_idx: int | str | None  # a number, a name, 'all' or 'none'
    outdir: Path | None
    subdirs: bool
    grid: Path | None
    batch: int  # images at once per process
    trust_code: bool  # whether source code in the networks' files may run
    skip_existing: bool
    png_compression: int
    decoder_batch: int  # latents decoded at once

    def __post_init__(self) -> None:
        if self.outdir is None and self.grid is None:
            raise ConfigError("nowhere to put the images; give --outdir=DIR, --grid=FILE.png or both")
        if self.skip_existing and self.outdir is None:
            raise ConfigError("--skip-existing looks for files in --outdir, which is missing; give both or neither")
        if self.outdir is not None:
            require_folder(self.outdir)
        if self.grid is not None:
            require_sheet(self.grid)


class _ClassType(click.ParamType):
    name = "int|name|all|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return int(value)
        except ValueError:
            return str(value)


@click.command()
@sampling_options
@click.option("--outdir", metavar="DIR", type=PATH, help="Where to write {seed:06d}.png")
@click.option("--subdirs", is_flag=True, help="Write into a folder for every thousand seeds")
@click.option("--grid", metavar="FILE.png", type=PATH, help="Write one contact sheet of all images")
@click.option("--seeds", type=dnnlib.cli.INT_LIST, default="16-19", show_default=True, help="One per image: 1,2,5-10")
@click.option(
    "--class",
    "class_idx",
    type=_ClassType(),
    help="Class; all = deal them over the seeds, none = leave it out (--label-dropout) [default: random]",
)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once per process")
@file_options
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: the best one here]")
@click.option("--trust-code", is_flag=True, help="Run the source code in files of other architectures; prints which")
@click.option("--list-presets", is_flag=True, help="Show the presets with their published scores, and stop")
def cmdline(list_presets: bool, device: str | None, **options: Any) -> None:
    """Generate images from a trained network, or from a preset.

    Image i depends on the i-th seed alone, not on the batch size or the number of processes.

    \b
    # Four images from a published network, with guidance
    python generate_images.py --preset=edm2-img512-s-guid-dino --outdir=out

    \b
    # 50,000 images on 8 GPUs
    torchrun --standalone --nproc_per_node=8 generate_images.py \\
        --preset=edm2-img512-s-guid-fid --outdir=out --subdirs --seeds=0-49999

    \b
    # Small images made large, by a network of train_edm2.py --condition=lowres:4
    python generate_images.py --net=net.pkl --source=small --seeds=0-7 --outdir=out

    The same command with --skip-existing continues after an interruption.
    """
    if list_presets:
        click.echo(describe_generation_presets())
        return
    options["precision"] = settled_precision(options["precision"], device)
    request = resolve(**options)
    with distributed.joined(device) as world:
        if world.is_main:
            for note in request.sampling.notes_for(world.device):
                click.echo(note)
        with numerics(cudnn_benchmark=False):
            run(request, world)


def resolve(**options: Any) -> Request:
    """Return the request that the options of `cmdline` stand for. Raises ConfigError for invalid values."""
    own = {field.name: options.pop(field.name) for field in fields(Request) if field.name != "sampling"}
    return Request(sampling=resolve_sampling(**options), **own)


def run(request: Request, world: World) -> None:
    """Generate this process's share of the images; the main process reports, and writes the contact sheet."""
    images = request.sampling.generate(
        announce=click.echo if world.is_main else None,
        outdir=request.outdir,
        subdirs=request.subdirs,
        seeds=request.seeds,
        class_idx=request.class_idx,
        max_batch_size=request.batch,
        encoder_batch_size=request.decoder_batch,
        world=world,
        trust_code=functools.partial(announce_code, world) if request.trust_code else None,
        skip_existing=request.skip_existing,
        on_demand=True,
        png_compression=request.png_compression,
    )
    if request.grid is not None:
        require_writable_images(images.net, images.encoder)
        make_folder(request.grid.parent)
    tiles: dict[int, np.ndarray] = {}
    # Processes take batches in order as they become free, so the number of this one shows how far all of them are.
    sizes = [len(batch) for batch in images.batches]
    done = np.cumsum([len(images.seeds) - sum(sizes), *sizes]).tolist()
    with tqdm(total=done[-1], initial=done[0], desc="Generating", unit="image", disable=not world.is_main) as progress:
        for batch in images:
            if request.grid is not None and batch.images is not None:
                tiles.update(zip(batch.indices.tolist(), batch.images.cpu().numpy(), strict=True))
            progress.update(done[batch.batch_idx + 1] - progress.n)
        world.barrier()  # now all images exist
        progress.update(done[-1] - progress.n)
    if request.grid is not None:
        write_grid(request.grid, images, tiles, world)
    world.barrier()
    if world.is_main:
        paths = [str(path) for path in (request.outdir, request.grid) if path is not None]
        kept = f", {len(images.existing)} existed already" if images.existing else ""
        click.echo(f"Wrote {len(request.seeds) - len(images.existing)} images{kept}: {', '.join(paths)}")
        if request.outdir is not None and len(request.seeds) >= MANY:
            num = f"--num={len(request.seeds)}"
            say_next("calculate_metrics.py", "calc", f"--images={request.outdir}", num, "--ref=STATISTICS")
        elif images.conditioning is None:
            say_next("explore.py", f"--net={request.sampling.net}")


def announce_code(world: World, code: EmbeddedCode) -> None:
    """Print which source code of a file is about to run."""
    if world.is_main:
        names = ", ".join(code.class_names)
        click.echo(f"Running {code.num_lines} lines of source code from the file, sha256 {code.sha256}, for {names}")


def write_grid(path: Path, images: GeneratedImages, tiles: dict[int, np.ndarray], world: World) -> None:
    """Write a contact sheet of all processes' `tiles`, by position in the list of seeds, in the main process.

    Images that existed are read from their files.
    """
    merged = {index: tile for share in world.all_gather_objects(tiles) for index, tile in share.items()}
    if world.is_main:
        if images.files is not None:
            merged |= {position: read_png(images.files.paths[position]) for position in images.existing}
        ordered, num_columns = [merged[i] for i in range(len(images.seeds))], images.sheet_columns
        if images.conditioning is not None:
            ordered, num_columns = with_sources(ordered, images.conditioning)
        write_sheet(path, np.stack(ordered), num_columns=num_columns)


if __name__ == "__main__":
    dnnlib.cli.main(
        cmdline,
        interrupted="Images in --outdir are complete; the same command with --skip-existing makes the others.",
    )
