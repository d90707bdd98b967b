"""Write the report of a training run: one self-contained HTML file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from dnnlib.start import ASKED_FOR_HELP

import click

import dnnlib.cli
from dnnlib.atomic import write_text
from dnnlib.cli import PATH
from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError, reason_of

if not ASKED_FOR_HELP:  # which does not wait for torch
    from edm2.report.document import render
    from edm2.report.record import read_run


@click.command()
@click.argument("run_dir", metavar="RUN_DIR", type=PATH)
@click.option("--out", metavar="FILE", type=PATH, help="Output file  [default: RUN_DIR/report.html]")
@click.option(
    "--sweep",
    "sweeps",
    metavar="FILE",
    type=PATH,
    multiple=True,
    help="Also show this record of sweep.py --json; those in RUN_DIR are always shown",
)
def cmdline(run_dir: Path, out: Path | None, sweeps: tuple[Path, ...]) -> None:
    """Write one HTML file about the training run in RUN_DIR, the --outdir of train_edm2.py.

    It shows options, curves, metrics, sample grids, sweeps, restarts, and commands for the next steps. The file is
    self-contained: it loads nothing and runs no script. It can be written while the run continues.

    \b
    python report.py training-runs/fashion
    """
    dest = run_dir / "report.html" if out is None else out
    record = read_run(run_dir, sweeps)
    require_folder(dest.parent)
    if dest.is_dir():
        raise ConfigError(f"--out={dest} cannot be written: it is a folder; name a file")
    page = render(record, now=datetime.now(UTC))
    make_folder(dest.parent)
    try:
        write_text(dest, page)
    except OSError as error:
        raise ConfigError(f"{dest} cannot be written: {reason_of(error)}") from None
    for note in record.notes:
        click.echo(note)
    click.echo(f"Wrote {dest} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
