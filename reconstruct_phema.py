"""Reconstruct networks with any EMA length from a run's snapshots (post-hoc EMA), as the published script does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
import tqdm

from dnnlib.cli import SOURCE, main, say_next
from dnnlib.errors import ConfigError
from edm2.options.metrics import KIMG, STD_LIST
from edm2.options.sampling import own_networks_option

if not ASKED_FOR_HELP:  # which does not wait for torch
    from training.posthoc import reconstruction
    from training.posthoc.inputs import kimg_text, list_input_pickles, parse_std_list
    from training.posthoc.reconstruction import Reconstruction, output_name
    from training.posthoc.response_plot import check_plot_path, plot_responses
    from training.snapshot import nimg_from_kimg as kimg_to_nimg

# Names that people's scripts import from here.
__all__ = ["kimg_to_nimg", "list_input_pickles", "parse_std_list", "pkl_path", "reconstruct_phema"]

# Parameters in float16 are rounded by up to 2**-11 of their size. Coefficients that amplify these errors to more than a
# few percent spoil the network, however good its fit.
_MAX_GAIN = 100


def reconstruct_phema(
    in_pkls: Iterable[Any],
    out_std: float | Iterable[float],
    out_nimg: int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    out_prefix: str = "phema",
    skip_existing: bool = False,
    max_batch_size: int = 8,
    verbose: bool = True,
    out_format: str = "pkl",
    own_networks: Sequence[str] = (),
) -> Reconstruction:
    """`training.posthoc.reconstruction.reconstruct_phema`; `verbose` prints what is going to be done."""
    work = reconstruction.reconstruct_phema(
        in_pkls, out_std, out_nimg, out_dir, out_prefix, skip_existing, max_batch_size, out_format,
        own_networks=own_networks,
    )  # fmt: skip
    if verbose:
        for path in work.skipped:
            print(f"{path} exists, skipped")
        kimg = kimg_text(work.out_nimg)
        print(f"Reconstructing {len(work.out_stds)} EMA profiles at {kimg} kimg from {len(work.inputs)} snapshots")
    return work


def pkl_path(dir: str | os.PathLike[str], prefix: str, nimg: int, std: float) -> str:
    """Return the path of a snapshot of EMA length `std` after `nimg` images."""
    return os.path.join(dir, f"{output_name(prefix, nimg, std)}.pkl")


@click.command()
@click.option("--indir", metavar="DIR", type=SOURCE, required=True, help="Folder with the snapshots of a training run")
@click.option("--inprefix", metavar="STR", help="Take only inputs named {this}-{kimg}-{std}")
@click.option("--instd", metavar="LIST", type=STD_LIST, help="Take only inputs with these EMA lengths")
@click.option("--outdir", metavar="DIR", type=SOURCE, required=True, help="Where to save the reconstructed networks")
@click.option("--outkimg", metavar="KIMG", type=KIMG, help="Training time of the outputs [default: newest input]")
@click.option(
    "--outstd",
    "out_std",
    metavar="LIST",
    type=STD_LIST,
    required=True,
    help="EMA lengths of the outputs: 0.100 or 0.01,0.02,...,0.25",
)
@click.option(
    "--outprefix",
    "out_prefix",
    metavar="STR",
    default="phema",
    show_default=True,
    help="Start of the output file names",
)
@click.option(
    "--skip",
    "--skip-existing",
    "skip_existing",
    is_flag=True,
    help="Keep existing outputs that were made of the same snapshots",
)
@click.option(
    "--batch",
    "max_batch_size",
    metavar="INT",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Outputs to build at a time; each batch reads all inputs once",
)
@click.option(
    "--format",
    "out_format",
    type=click.Choice(["pkl", "safetensors", "both"]),
    help="File format of the outputs  [default: pkl; safetensors with --network]",
)
@own_networks_option
@click.option(
    "--plot",
    metavar="FILE",
    type=SOURCE,
    help="Draw the wanted and the achieved averaging profiles over training time (png, pdf, svg)",
)
def cmdline(
    indir: str,
    inprefix: str | None,
    instd: list[float] | None,
    outdir: str,
    outkimg: int | None,
    out_std: list[float],
    plot: str | None,
    out_format: str | None,
    own_networks: tuple[str, ...],
    **options: Any,
) -> None:
    """Reconstruct networks with any EMA length from the snapshots of a training run.

    The snapshots are files {prefix}-{kimg}-{std}.pkl or .safetensors. One EMA length is enough; two lengths at a few
    times give good reconstructions. Each output is printed with its fit: the relative L2 error of the achieved
    averaging profile, where 0 is perfect.

    Examples:

    \b
    # One new EMA profile, std = 0.150
    python reconstruct_phema.py --indir=raw-snapshots/edm2-img512-xs \\
        --outdir=out --outstd=0.150

    \b
    # A set of 49 profiles, reading the inputs 7 times
    python reconstruct_phema.py --indir=raw-snapshots/edm2-img512-xs \\
        --outdir=out --outstd=0.010,0.015,...,0.250 --batch=8

    \b
    # A figure of the achieved and the wanted profiles
    python reconstruct_phema.py --indir=raw-snapshots/edm2-img512-xs \\
        --outdir=out --outstd=0.050,0.075,0.200 --plot=profiles.png

    \b
    # In the middle of training, from the snapshots of one tracked length
    python reconstruct_phema.py --indir=raw-snapshots/edm2-img512-xs \\
        --instd=0.050 --outkimg=1048576 --outdir=out --outstd=0.100
    """
    if plot is not None:
        check_plot_path(plot)
    inputs = list_input_pickles(indir, in_prefix=inprefix, in_std=instd)
    if not inputs:
        filters = f" with prefix '{inprefix}'" if inprefix is not None else ""
        filters += f" with EMA length {', '.join(f'{std:.3f}' for std in instd)}" if instd is not None else ""
        raise ConfigError(f"no snapshots {{prefix}}-{{kimg}}-{{std}}.pkl or .safetensors{filters} in {indir}")
    out_format = out_format or ("safetensors" if own_networks else "pkl")
    if own_networks and out_format != "safetensors":
        raise ConfigError(f"--format={out_format} cannot hold an own network; use --format=safetensors")
    options |= {"out_format": out_format, "own_networks": own_networks}
    work = reconstruct_phema(inputs, out_std, outkimg, outdir, **options)
    paths = list(work.skipped)
    with tqdm.tqdm(total=len(work), unit="step", dynamic_ncols=True, disable=not len(work)) as progress:
        for step in work:
            progress.update()
            for output in step.outputs:
                paths += output.paths
                note = f", amplifies rounding errors {output.gain:.0f} times" if output.gain > _MAX_GAIN else ""
                progress.write(f"{', '.join(str(path) for path in output.paths)}: fit {output.fit:.2e}{note}")
    if plot is not None:
        plot_responses(plot, work.inputs, work.out_nimg, out_std)
        print(f"Profiles in {plot}")
    say_next("generate_images.py", f"--net={paths[0]}", "--outdir=out")


if __name__ == "__main__":
    main(
        cmdline,
        interrupted="The networks printed above are complete; the same command with --skip makes the others.",
    )
