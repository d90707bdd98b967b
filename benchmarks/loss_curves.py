"""Compare the loss of runs in different number formats: draw their curves, and print the differences.

    for precision in fp32 bf16; do python train_edm2.py --preset=fashion --duration=64Ki --status=1Ki --snapshot=0 \\
        --precision=$precision --outdir=runs/$precision; done
    python train_edm2.py --preset=fashion --duration=64Ki --status=1Ki --snapshot=0 \\
        --precision=fp32 --seed=1 --outdir=runs/fp32-seed1
    python -m benchmarks.loss_curves runs/fp32 runs/bf16 runs/fp32-seed1 --out=docs/loss-curves.png

The other runs are compared with the first one. A run of another seed, with other images and other noise, shows how far
apart two runs lie that differ in nothing that matters.
"""

import json
import statistics
from pathlib import Path

import click
import matplotlib.figure

from dnnlib.cli import PATH, PathType, main


def losses_of(folder: Path) -> tuple[list[float], list[float]]:
    """Return the thousands of images at each status line, and the mean loss of the interval that ended there."""
    records = [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["Progress/kimg"] for record in records], [record["Loss/loss"] for record in records]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=PathType(exists=True))
@click.option("--out", required=True, type=PATH, help="Plot to write, .png")
def loss_curves(folders: tuple[Path, ...], out: Path) -> None:
    """Compare the losses of runs with those of the first."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    reference = losses_of(folders[0])[1]
    for folder in folders:
        kimg, losses = losses_of(folder)
        curves.plot(kimg, losses, label=folder.name, linewidth=1)
        if folder != folders[0]:
            apart = [a - b for a, b in zip(losses, reference, strict=True)]
            differences.plot(kimg, apart, label=f"{folder.name} − {folders[0].name}", linewidth=1)
            late = apart[len(apart) // 2 :]
            click.echo(
                f"{folder.name} − {folders[0].name}, second half of the run: mean {statistics.mean(late):+.4f},"
                f" standard deviation of an interval {statistics.stdev(late):.4f}"
            )
    curves.set(xlabel="images, thousands", ylabel="loss", yscale="symlog", title="Loss")
    differences.set(xlabel="images, thousands", ylim=(-0.1, 0.1), title="Difference")
    for axes in (curves, differences):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(loss_curves)
