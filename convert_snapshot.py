"""Convert network files between the published pickle and .safetensors: command line."""

from typing import Any

import click
import tqdm

from dnnlib.cli import main
from training.snapshot_convert import convert_snapshots


@click.command()
@click.argument("sources", metavar="PATH|URL...", nargs=-1, required=True)
@click.option("--outdir", metavar="DIR", help="Write {name}.safetensors for {name}.pkl here, and the other way round")
@click.option("--out", metavar="FILE", help="Write the one input to FILE.pkl or FILE.safetensors")
def cmdline(sources: tuple[str, ...], **options: Any) -> None:
    """Convert network files between the published pickle and .safetensors, without running anything from them.

    The configuration, EMA length, image count, encoder, loss and provenance come along; docs/file-formats.md tells
    where. Parameters are stored as float16, as they are in published files. Inputs are never overwritten.

    \b
    # Published or own pickles to .safetensors
    python convert_snapshot.py snapshots/*.pkl --outdir=converted

    \b
    # Back to a pickle, which the published code reads
    python convert_snapshot.py converted/net.safetensors --out=net.pkl
    """
    work = convert_snapshots(sources, **options)
    with tqdm.tqdm(work, unit="file", dynamic_ncols=True, disable=len(work) < 2) as progress:
        for done in progress:
            nimg, std = done.snapshot.nimg, done.snapshot.ema_std
            details = [] if nimg is None else [f"{nimg} images"]
            details += [] if std is None else [f"EMA length {std:g}"]
            progress.write(f"Wrote {done.path}" + f" ({', '.join(details)})" * bool(details))


if __name__ == "__main__":
    main(cmdline)
