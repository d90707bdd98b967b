"""Generate images from a trained network: command line."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from tqdm import tqdm

import dnnlib.cli
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from dnnlib.parse import parse_int_list
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.precision import numerics
from training.generation import GeneratedImages, generate_images, require_writable_images
from training.guidance import require_guide
from training.image_files import contact_sheet, write_png
from training.presets import GENERATION, generation_preset, locate
from training.sampler import HeunOptions, StackedRandomGenerator, edm_sampler

# Names that people's scripts import from here.
__all__ = ["StackedRandomGenerator", "edm_sampler", "generate_images", "parse_int_list"]

_HEUN_NAMES = ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked as far as this is possible without the networks."""

    net: str
    gnet: str | None  # None where guidance is 1
    guidance: float
    seeds: list[int]
    class_idx: int | Literal["all"] | None
    outdir: Path | None
    subdirs: bool
    grid: Path | None
    batch: int  # images at once per process
    heun: dict[str, Any]  # options given by the user

    def __post_init__(self) -> None:
        HeunOptions(**self.heun)
        require_guide(self.guidance, has_guide=self.gnet is not None)
        if self.outdir is None and self.grid is None:
            raise ConfigError("nowhere to put the images; give --outdir=DIR, --grid=FILE.png or both")
        if self.outdir is not None:
            require_folder(self.outdir)
        if self.grid is not None:
            if self.grid.suffix.lower() != ".png" or self.grid.is_dir():
                raise ConfigError(f"--grid={self.grid} cannot be written; name a file that ends in .png")
            require_folder(self.grid.parent)


class _ClassType(click.ParamType):
    name = "int|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["all"]:
        if isinstance(value, int) or value == "all":
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"'{value}' is no class; give its number, or all", param, ctx)


@click.command()
@click.option("--preset", metavar="NAME", help="Networks and guidance of a published result; other options win over it")
@click.option("--net", metavar="PATH|URL", help="Network snapshot, .pkl or .safetensors")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network, used where guidance is not 1")
@click.option("--outdir", metavar="DIR", type=click.Path(path_type=Path), help="Where to write {seed:06d}.png")
@click.option("--subdirs", is_flag=True, help="Write into a folder for every thousand seeds")
@click.option(
    "--grid", metavar="FILE.png", type=click.Path(path_type=Path), help="Write one contact sheet of all images"
)
@click.option("--seeds", type=dnnlib.cli.INT_LIST, default="16-19", show_default=True, help="One per image: 1,2,5-10")
@click.option("--class", "class_idx", type=_ClassType(), help="Class; all = deal them over the seeds [default: random]")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once per process")
@click.option("--steps", "num_steps", type=int, help="Sampling steps [default: 32]")
@click.option("--sigma_min", type=float, help="Lowest noise level [default: 0.002]")
@click.option("--sigma_max", type=float, help="Highest noise level [default: 80]")
@click.option("--rho", type=float, help="Exponent of the noise levels [default: 7]")
@click.option("--guidance", type=float, help="Guidance strength; 1 = none [default: 1]")
@click.option("--S_churn", "S_churn", type=float, help="Strength of added noise [default: 0]")
@click.option("--S_min", "S_min", type=float, help="Add noise from this noise level ... [default: 0]")
@click.option("--S_max", "S_max", type=float, help="... up to this one [default: inf]")
@click.option("--S_noise", "S_noise", type=float, help="Inflation of added noise [default: 1]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: the best one here]")
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
    """
    if list_presets:
        click.echo(describe_presets())
        return
    request = resolve(**options)
    world = distributed.init(device)
    if world.is_main and options["gnet"] is not None and request.gnet is None:
        click.echo("Guidance is 1, so the guide is not used; --guidance=1.4, for example, uses it.")
    try:
        with numerics(cudnn_benchmark=False):
            run(request, world)
    finally:
        world.close()


def resolve(
    *,
    preset: str | None,
    net: str | None,
    gnet: str | None,
    guidance: float | None,
    seeds: list[int],
    class_idx: int | Literal["all"] | None,
    outdir: Path | None,
    subdirs: bool,
    grid: Path | None,
    batch: int,
    **heun: Any,
) -> Request:
    """Fill what was left open (None) from the preset. Raises ConfigError for what cannot work."""
    if preset is not None:
        row = generation_preset(preset)
        net = locate(row.net) if net is None else net
        if row.gnet is not None:
            gnet = locate(row.gnet) if gnet is None else gnet
            guidance = row.guidance if guidance is None else guidance
    if net is None:
        raise ConfigError("no network to sample from; give --net=FILE or --preset=NAME (--list-presets shows them)")
    if guidance is not None and guidance != 1 and gnet is None:
        raise ConfigError(f"--guidance={guidance:g} needs a guiding network; add --gnet=FILE or leave --guidance out")
    return Request(
        net=net,
        gnet=None if guidance in (None, 1) else gnet,
        guidance=1 if guidance is None else guidance,
        seeds=seeds,
        class_idx=class_idx,
        outdir=outdir,
        subdirs=subdirs,
        grid=grid,
        batch=batch,
        heun={name: heun[name] for name in _HEUN_NAMES if heun[name] is not None},
    )


def run(request: Request, world: World) -> None:
    """Generate this process's share of the images; the main process reports, and writes the contact sheet."""
    images = generate_images(
        net=request.net,
        gnet=request.gnet,
        outdir=request.outdir,
        subdirs=request.subdirs,
        seeds=request.seeds,
        class_idx=request.class_idx,
        max_batch_size=request.batch,
        world=world,
        guidance=request.guidance,
        **request.heun,
    )
    if request.grid is not None:
        require_writable_images(images.net, images.encoder)
        make_folder(request.grid.parent)
    tiles: dict[int, np.ndarray] = {}
    num_images = sum(len(batch) for batch in images.batches)
    with tqdm(total=num_images, desc="Generating", unit="image", disable=not world.is_main) as progress:
        for batch in images:
            if request.grid is not None and batch.images is not None:
                tiles.update(zip(batch.indices.tolist(), batch.images.cpu().numpy(), strict=True))
            progress.update(len(batch.seeds))
    if request.grid is not None:
        write_grid(request.grid, images, tiles, world)
    world.barrier()
    if world.is_main:
        places = [str(place) for place in (request.outdir, request.grid) if place is not None]
        click.echo(f"Wrote {len(request.seeds)} images: {', '.join(places)}")


def write_grid(path: Path, images: GeneratedImages, tiles: dict[int, np.ndarray], world: World) -> None:
    """Put all processes' `tiles` (by position in the list of seeds) together; the main process writes the file."""
    merged = {index: tile for share in world.all_gather_objects(tiles) for index, tile in share.items()}
    if world.is_main:
        num_images = len(images.seeds)
        num_columns = num_images // images.net.label_dim if images.one_row_per_class else math.isqrt(num_images - 1) + 1
        write_png(path, contact_sheet(np.stack([merged[i] for i in range(num_images)]), num_columns=num_columns))


def describe_presets() -> str:
    """A line per preset: name, guidance, published score."""
    lines = []
    for name, row in GENERATION.items():
        guidance = f"guidance {row.guidance:.2f}" if row.gnet is not None else ""
        score = f"{row.metric} {row.score:.2f}" if row.metric is not None and row.score is not None else ""
        lines.append(f"{name:<36}{guidance:<16}{score}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
