"""The 2-D toy example of autoguidance (arXiv 2406.02507): train its networks and draw the effect of guidance."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
import tqdm

from dnnlib.cli import SOURCE, main
from edm2.options.sampling import Numbers
from training.presets import locate

if not ASKED_FOR_HELP:  # which does not wait for torch
    import torch

    from torch_utils.distributed import resolve_device
    from torch_utils.precision import numerics
    from training.toy.mixture import gt
    from training.toy.model import ToyModel
    from training.toy.sample import do_sample, thin
    from training.toy.toy_files import load_toy_model
    from training.toy.toy_plot import Comparison, FigureOutput, Panel, View, compare, draw_comparison, draw_progress
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
    batch_size: int = 4 << 10,
    total_iter: int = 4 << 10,
    seed: int = 0,
    P_mean: float = -2.3,
    P_std: float = 1.5,
    sigma_data: float = 0.5,
    lr_ref: float = 1e-2,
    lr_iter: int = 512,
    ema_std: float = 0.010,
    pkl_pattern: str | os.PathLike[str] | None = None,
    pkl_iter: int = 256,
    viz_iter: int | None = 32,
    device: torch.device | str = "cpu",
) -> ToyModel:
    """Train a toy network on the true score and return its average over the last iterations.

    `pkl_pattern`, such as out/iter%04d.pkl, names a file every `pkl_iter` iterations and at the end. Every `viz_iter`
    iterations the learned density is drawn in a window; without a display, as training.png in the folder of the files.
    """
    config = ToyConfig(
        classes=classes, num_layers=num_layers, hidden_dim=hidden_dim, sigma_data=sigma_data, num_iters=total_iter,
        batch=batch_size, lr=lr_ref, lr_decay=lr_iter, P_mean=P_mean, P_std=P_std, ema_std=ema_std, snapshot=pkl_iter,
        seed=seed,
    )  # fmt: skip
    run = ToyRun(config, pkl_pattern, device=device, show_every=viz_iter)
    output = None
    if viz_iter:
        output = FigureOutput((10, 5.2), save=None, default=(run.folder or Path()) / "training.png")
        if run.folder is None and not output.in_window:
            output = None  # neither a window nor a place for files
    with numerics(), tqdm.tqdm(run, unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            if step.net is not None:
                net = step.net
                if step.path is not None or run.folder is None:
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
    guidance: float = 1,
    gnet: ToyModel | str | os.PathLike[str] | None = None,
    elems: Collection[str] = frozenset({"gt_uncond", "gt_outline", "samples"}),
    view_x: float = 0,
    view_y: float = 0,
    view_size: float = 1.6,
    grid_resolution: int = 400,
    arrow_len: float = 0.002,
    num_samples: int = 1 << 13,
    seed: int = 1,
    sample_distance: float = 0,
    sigma_max: float = 5,
    device: torch.device | str = "cpu",
    *,
    interval: tuple[float, float] | None = None,
    ax: Any = None,
) -> None:
    """Draw a panel of the toy figure on `ax`, or on pyplot's current axes; nothing is shown or written.

    `net` and `gnet` are objects, paths or URLs; without `net` the true distribution of class A takes its place. `elems`
    are names of PANEL_ELEMENTS. The view is a square of half size `view_size` around (`view_x`, `view_y`). Samples
    start at noise level `sigma_max`, where the elements of networks are drawn, too, from `num_samples` true points,
    thinned to a spacing of `sample_distance`. `arrow_len`: length of an arrow for a score of 1. Raises ConfigError for
    unknown elements.
    """
    truth = gt("A", torch.device(device))
    main_net, guide = (
        choice if choice is None or isinstance(choice, ToyModel) else load_toy_model(choice, device=device)
        for choice in (net, gnet)
    )
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.gca()
    with numerics():
        x_init = truth.sample(num_samples, sigma_max, torch.Generator(truth.device).manual_seed(seed))
        panel = Panel(
            truth=truth,
            net=main_net or truth,
            gnet=guide,
            guidance=guidance,
            interval=interval,
            sigma=sigma_max,
            x_init=thin(x_init, sample_distance) if sample_distance > 0 else x_init,
            view=View(center=(view_x, view_y), half_size=view_size),
            num_cells=grid_resolution,
            arrow_len=arrow_len,
        )
        panel.draw(ax, elems)


def plot_comparison(
    net: str | None,
    gnet: str | None,
    guidance: float,
    save: str | None,
    *,
    interval: tuple[float, float] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Draw the whole figure in `save` or a window, or without a display in toy-example.png, and print its measures.

    Networks are paths or URLs; None means the shipped ones.
    """
    output = FigureOutput((16, 8.4), save=None if save is None else Path(save), default=Path(_DEFAULT_FILE))
    main_net, guide = (load_toy_model(name, device=device) for name in (net or locate(NET), gnet or locate(GNET)))
    with numerics():
        result = compare(main_net, guide, guidance, interval=interval, device=device)
    draw_comparison(output.figure, result)
    click.echo(describe(result))
    output.update()
    if output.path is not None:
        click.echo(f"Wrote {output.path}")
    output.finish()


def describe(result: Comparison) -> str:
    """The measures as a table of text."""
    titles = {name: title[0].lower() + title[1:] for name, title in result.titles.items()}
    width = max(map(len, titles.values())) + 2
    columns = ("off the tree", "outside 99 %", "components hit", "branches hit")
    lines = [" " * width + "".join(f"{column:>16}" for column in columns)]
    for name, title in titles.items():
        row = result.fidelity[name]
        shares = f"{row.off_tree:>16.2%}{row.outside:>16.2%}{row.components:>16.1%}{row.branches:>16.1%}"
        lines.append(f"{title:<{width}}{shares}")
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
@click.option("--outdir", metavar="DIR", type=SOURCE, required=True, help="Folder for iter0256.pkl, iter0512.pkl, ...")
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
def train(
    outdir: str, layers: int, dim: int, iters: int, viz: bool, file_format: str, device: str, **options: Any
) -> None:
    """Train a network on the true score of the distribution."""
    do_train(
        num_layers=layers,
        hidden_dim=dim,
        total_iter=iters,
        # "%%" stands for a "%" in the name of the folder.
        pkl_pattern=f"{os.path.join(outdir, '').replace('%', '%%')}iter%04d.{file_format}",
        viz_iter=256 if viz else None,
        device=resolve_device(device),
        **options,
    )


@cmdline.command()
@click.option("--net", metavar="PATH|URL", type=SOURCE, help="Main network  [default: the shipped one]")
@click.option("--gnet", metavar="PATH|URL", type=SOURCE, help="Guiding network  [default: the shipped one]")
@click.option("--guidance", metavar="FLOAT", type=float, default=3, show_default=True, help="Guidance strength")
@click.option(
    "--interval",
    metavar="LO,HI",
    type=Numbers("0,0.1", count=2),
    help="Guide only the steps that start at noise levels in (LO, HI]  [default: all]",
)
@click.option(
    "--save",
    metavar="FILE",
    type=SOURCE,
    help=f"Write the figure  [default: show it; without a display {_DEFAULT_FILE}]",
)
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps")
def plot(net: str | None, gnet: str | None, guidance: float, save: str | None, device: str, **options: Any) -> None:
    """Draw samples, densities and trajectories without and with guidance, and print how well samples keep to the tree.

    A sample is off the tree if its true density is lower than that of 99.9 percent of the true samples, and outside of
    the paper's contour if it is lower than that of 99 percent. Samples on the tree hit components of the mixture and
    branches of the tree. The same number of true samples also misses a few components.

    \b
    # Guidance at low noise levels only: fewer samples far from the tree, and more branches are kept
    python toy_example.py plot --interval=0,0.1

    \b
    # With the published networks, downloaded once and cached
    python toy_example.py plot \\
        --net=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim64/iter4096.pkl \\
        --gnet=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim32/iter0512.pkl
    """
    plot_comparison(net, gnet, guidance, save, device=resolve_device(device), **options)


if __name__ == "__main__":
    main(
        cmdline,
        interrupted="Networks that were printed as saved are complete; the same command starts again.",
    )
