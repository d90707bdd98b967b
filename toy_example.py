"""The 2-D toy example of autoguidance (arXiv 2406.02507): train its networks and draw the effect of guidance."""

import os
from pathlib import Path
from typing import Any

import click
import torch
import tqdm

from dnnlib.cli import main
from torch_utils.distributed import resolve_device
from torch_utils.precision import numerics
from training.presets import locate
from training.toy.mixture import gt
from training.toy.model import ToyModel
from training.toy.sample import do_sample
from training.toy.toy_files import load_toy_model
from training.toy.toy_plot import Comparison, FigureOutput, compare, draw_comparison, draw_progress
from training.toy.train import ToyConfig, ToyRun

# Users' scripts import these names from here.
__all__ = ["ToyModel", "do_plot", "do_sample", "do_train", "gt"]

# The shipped networks (models/README.md), trained like the published ones.
NET = "models/toy-clsA-layers04-dim64.safetensors"
GNET = "models/toy-clsA-layers04-dim32.safetensors"

_DEFAULT_FILE = "toy-example.png"


def do_train(
    classes: str = "A",
    num_layers: int = 4,
    hidden_dim: int = 64,
    outdir: str | os.PathLike[str] | None = None,
    viz: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    num_iters: int = 4096,
    file_format: str = "pkl",
) -> ToyModel:
    """Train a toy network on the true score and return its average over the last iterations.

    With `outdir`, write iter{0256,0512,...}.pkl there. `viz` shows the learned density every 256
    iterations, in a window or as outdir/training.png.
    """
    config = ToyConfig(classes=classes, num_layers=num_layers, hidden_dim=hidden_dim, num_iters=num_iters, seed=seed)
    folder = None if outdir is None else Path(outdir)
    run = ToyRun(config, folder, device=device, suffix=f".{file_format}")
    output = FigureOutput((10, 5.2), save=None, default=(folder or Path()) / "training.png") if viz else None
    with numerics(), tqdm.tqdm(run, unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            if step.net is not None:
                net = step.net
                saved = f" saved {step.path}" if step.path is not None else ""
                progress.write(f"Iteration {step.iteration}: loss {float(step.loss):.5f}{saved}")
                if output is not None:
                    draw_progress(output.figure, run.truth, net, f"Learned in {step.iteration} iterations")
                    output.update()
    if output is not None:
        output.finish()
    return net


def do_plot(
    net: ToyModel | str | os.PathLike[str] | None = None,
    gnet: ToyModel | str | os.PathLike[str] | None = None,
    guidance: float = 3,
    save: str | os.PathLike[str] | None = None,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Draw samples without and with guidance, and return the data of the figure, with its measures (`.fidelity`).

    Networks are objects, paths or URLs; None means the shipped ones. The figure goes to `save` or a window; without a
    display, to toy-example.png.
    """
    output = FigureOutput((16, 8.4), save=None if save is None else Path(save), default=Path(_DEFAULT_FILE))
    main_net, guide = (
        choice.to(device).eval() if isinstance(choice, ToyModel) else load_toy_model(choice, device=device)
        for choice in (net or locate(NET), gnet or locate(GNET))
    )
    with numerics():
        result = compare(main_net, guide, guidance, device=device, seed=seed)
    draw_comparison(output.figure, result)
    click.echo(describe(result))
    output.update()
    if output.path is not None:
        click.echo(f"Wrote {output.path}")
    output.finish()
    return result


def describe(result: Comparison) -> str:
    """The measures as a table of text."""
    names = {"true": "true samples", "unguided": "without guidance", "guided": f"guidance {result.guidance:g}"}
    lines = [f"{'':<18}{'off the tree':>14}{'components hit':>16}{'branches hit':>14}"]
    for name, title in names.items():
        row = result.fidelity[name]
        lines.append(f"{title:<18}{row.off_tree:>14.2%}{row.components:>16.1%}{row.branches:>14.1%}")
    return "\n".join(lines)


@click.group()
def cmdline() -> None:
    """The 2-D toy example of the paper "Guiding a Diffusion Model with a Bad Version of Itself".

    \b
    # Draw the figure with the shipped networks
    python toy_example.py plot

    \b
    # Train both networks and draw the figure with them; two or three minutes on a CPU
    python toy_example.py train --outdir=out/main
    python toy_example.py train --outdir=out/guide --dim=32 --iters=512
    python toy_example.py plot --net=out/main/iter4096.pkl --gnet=out/guide/iter0512.pkl
    """


@cmdline.command()
@click.option("--outdir", metavar="DIR", required=True, help="Folder for iter0256.pkl, iter0512.pkl, ...")
@click.option("--cls", "classes", type=click.Choice(["A", "B", "AB"]), default="A", show_default=True, help="Classes")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Hidden layers")
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Width of the hidden layers")
@click.option(
    "--viz", metavar="BOOL", type=bool, default=True, show_default=True, help="Show progress, or write training.png"
)
@click.option("--iters", type=click.IntRange(min=1), default=4096, show_default=True, help="Iterations")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed")
@click.option("--format", "file_format", type=click.Choice(["pkl", "safetensors"]), default="pkl", show_default=True)
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps")
def train(outdir: str, layers: int, dim: int, iters: int, device: str, **options: Any) -> None:
    """Train a network on the true score of the distribution."""
    do_train(
        outdir=outdir, num_layers=layers, hidden_dim=dim, num_iters=iters, device=resolve_device(device), **options
    )


@cmdline.command()
@click.option("--net", metavar="PATH|URL", help="Main network  [default: the shipped one]")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network  [default: the shipped one]")
@click.option("--guidance", metavar="FLOAT", type=float, default=3, show_default=True, help="Guidance strength")
@click.option("--save", metavar="FILE", help=f"Write the figure  [default: show it; without a display {_DEFAULT_FILE}]")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps")
def plot(net: str | None, gnet: str | None, guidance: float, save: str | None, device: str) -> None:
    """Draw samples, densities and trajectories without and with guidance, and print how well samples keep to the tree.

    A sample is off the tree if its true density is lower than that of 99.9 percent of the true samples. The others hit
    components of the mixture and branches of the tree. The same number of true samples also misses a few components.

    \b
    # With the published networks, downloaded once and cached
    python toy_example.py plot \\
        --net=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim64/iter4096.pkl \\
        --gnet=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim32/iter0512.pkl
    """
    do_plot(net, gnet, guidance, save, device=resolve_device(device))


if __name__ == "__main__":
    main(cmdline)
