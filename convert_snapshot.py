"""Convert networks between the published pickle, .safetensors and model folders: command line."""

from __future__ import annotations

from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
import tqdm

from dnnlib.cli import PATH, SOURCE, main, say_next

if not ASKED_FOR_HELP:  # which does not wait for torch
    from training.sharing.convert_network import convert_snapshots


@click.command()
@click.argument("sources", metavar="PATH|URL|NAME...", type=SOURCE, nargs=-1, required=True)
@click.option("--outdir", metavar="DIR", type=PATH, help="Write {name}.safetensors for {name}.pkl here, and vice versa")
@click.option(
    "--out", metavar="FILE|DIR", type=PATH, help="Write the one input to FILE.pkl or FILE.safetensors, or to a folder"
)
@click.option(
    "--to",
    type=click.Choice(["pkl", "safetensors", "folder"]),
    help="Form to write [default: by the suffix of --out, else the other kind of file]",
)
@click.option("--license", "licence", metavar="ID", help="License for the model card of a folder, e.g. apache-2.0")
@click.option(
    "--metrics",
    metavar="FILE",
    type=PATH,
    multiple=True,
    help="Result of calculate_metrics.py --json for the model card; may be repeated",
)
def cmdline(sources: tuple[str, ...], **options: Any) -> None:
    """Convert networks between the published pickle, .safetensors and model folders of the diffusers library, without
    running anything from them.

    Inputs are files, model folders, URLs, and names on the Hugging Face hub. Configuration, EMA length, image count,
    encoder, loss and provenance are kept (docs/file-formats.md). Parameters are stored as float16, as in published
    files. Inputs and non-empty folders are never overwritten.

    \b
    # Pickles, published ones or your own, to .safetensors
    python convert_snapshot.py snapshots/*.pkl --outdir=converted

    \b
    # Back to a pickle, which the published code reads
    python convert_snapshot.py converted/net.safetensors --out=net.pkl

    \b
    # A folder to share, with its model card
    python convert_snapshot.py net.pkl --out=my-model --to=folder --license=apache-2.0 --metrics=result.json

    \b
    # From the hub
    python convert_snapshot.py hf://user/name --out=net.pkl
    """
    work = convert_snapshots(sources, **options)
    with tqdm.tqdm(work, unit="file", dynamic_ncols=True, disable=len(work) < 2) as progress:
        for done in progress:
            nimg, std = done.snapshot.nimg, done.snapshot.ema_std
            details = [] if nimg is None else [f"{nimg} images"]
            details += [] if std is None else [f"EMA length {std:g}"]
            progress.write(f"Wrote {done.path}" + f" ({', '.join(details)})" * bool(details))
    say_next("generate_images.py", f"--net={done.path}", "--outdir=out")


if __name__ == "__main__":
    main(
        cmdline,
        interrupted="The files printed above are complete; convert the others with the same command without these.",
    )
