"""The 2-D toy example of autoguidance (arXiv 2406.02507): train its networks, and draw what guidance does."""

import os
from pathlib import Path
from typing import Any

import click
import torch
import tqdm

from dnnlib.atomic import atomic_path
from dnnlib.cli import main
from dnnlib.errors import ConfigError, reason_of
from dnnlib.folders import make_folder, require_folder
from torch_utils.distributed import resolve_device
from torch_utils.precision import numerics
from training.presets import locate
from training.toy.mixture import gt
from training.toy.model import ToyModel
from training.toy.sample import do_sample
from training.toy.toy_files import load_toy_model
from training.toy.toy_plot import Comparison, compare, draw_comparison, draw_progress
from training.toy.train import ToyConfig, ToyRun, ToyStep

# Names that people's scripts import from here.
__all__ = ["ToyModel", "do_plot", "do_sample", "do_train", "gt"]

# The shipped networks (models/README.md), trained as the published ones that the toy example downloads.
NET = "models/toy-clsA-layers04-dim64.safetensors"
GNET = "models/toy-clsA-layers04-dim32.safetensors"

_DEFAULT_FILE = "toy-example.png"


class Picture:
    """A matplotlib figure in a window where there is a display, else in a file. With `save` it is a file anyway.

    Raises ConfigError where neither can be had.
    """

    def __init__(self, size: tuple[float, float], *, save: Path | None, default: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure: Any = Figure(figsize=size, dpi=100) if save else _pyplot_figure(size)
        # Only the canvas of a backend with windows names the kind of event loop that it needs.
        self.in_window = getattr(self.figure.canvas, "required_interactive_framework", None) is not None
        self.path = None if self.in_window else save or default
        if self.path is not None:
            known = FigureCanvasAgg.get_supported_filetypes()
            if self.path.suffix[1:].lower() not in known:
                raise ConfigError(f"{self.path} has no suffix of a picture; use one of {', '.join(sorted(known))}")
            require_folder(self.path.parent)

    def update(self) -> None:
        """Show or write what is drawn so far."""
        if self.path is None:
            self.figure.canvas.draw()
            self.figure.show()
            self.figure.canvas.flush_events()
            return
        make_folder(self.path.parent)
        try:
            with atomic_path(self.path) as temp:
                self.figure.savefig(temp, format=self.path.suffix[1:].lower())
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {reason_of(error)}") from error

    def finish(self) -> None:
        """Keep a window open until it is closed."""
        from matplotlib import pyplot

        if self.in_window:
            pyplot.show()
        pyplot.close(self.figure)


def _pyplot_figure(size: tuple[float, float]) -> Any:
    from matplotlib import pyplot

    try:
        return pyplot.figure(figsize=size, dpi=100)
    except Exception as error:  # each kind of window has errors of its own
        raise ConfigError(
            f"matplotlib cannot open a window ({error}); unset MPLBACKEND or set it to Agg, which writes files"
        ) from error


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

    With `outdir`, files iter{0256,0512,...}.pkl are written there. `viz` shows the learned density every 256
    iterations, in a window or as outdir/training.png.
    """
    config = ToyConfig(classes=classes, num_layers=num_layers, hidden_dim=hidden_dim, num_iters=num_iters, seed=seed)
    folder = None if outdir is None else Path(outdir)
    run = ToyRun(config, folder, device=device, suffix=f".{file_format}")
    picture = Picture((10, 5.2), save=None, default=(folder or Path()) / "training.png") if viz else None
    with numerics(), tqdm.tqdm(run, unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            if step.net is not None:
                _report(step, progress, picture, run)
                net = step.net
    if picture is not None:
        picture.finish()
    return net


def _report(step: ToyStep, progress: Any, picture: Picture | None, run: ToyRun) -> None:
    saved = f"saved {step.path}" if step.path is not None else ""
    progress.write(f"Iteration {step.iteration}: loss {float(step.loss):.5f} {saved}".rstrip())
    if picture is not None and step.net is not None:
        draw_progress(picture.figure, run.truth, step.net, f"Learned in {step.iteration} iterations")
        picture.update()


def do_plot(
    net: ToyModel | str | os.PathLike[str] | None = None,
    gnet: ToyModel | str | os.PathLike[str] | None = None,
    guidance: float = 3,
    save: str | os.PathLike[str] | None = None,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Draw samples without and with guidance, and return what was drawn, with its measures (`.fidelity`).

    Networks are objects, paths or URLs; None takes the shipped ones. The figure goes to `save`, or to a window, or,
    where there is no display, to toy-example.png.
    """
    picture = Picture((16, 8.4), save=None if save is None else Path(save), default=Path(_DEFAULT_FILE))
    main_net, guide = (
        choice.to(device).eval() if isinstance(choice, ToyModel) else load_toy_model(choice, device=device)
        for choice in (net or locate(NET), gnet or locate(GNET))
    )
    with numerics():
        result = compare(main_net, guide, guidance, device=device, seed=seed)
    draw_comparison(picture.figure, result)
    click.echo(describe(result))
    picture.update()
    if picture.path is not None:
        click.echo(f"Wrote {picture.path}")
    picture.finish()
    return result


def describe(result: Comparison) -> str:
    """The measures as a table."""
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
    # The figure, from the networks that come with the code
    python toy_example.py plot

    \b
    # Train both networks, and draw the figure from them; two or three minutes on a CPU
    python toy_example.py train --outdir=out/main
    python toy_example.py train --outdir=out/guide --dim=32 --iters=512
    python toy_example.py plot --net=out/main/iter4096.pkl --gnet=out/guide/iter0512.pkl
    """


@cmdline.command()
@click.option("--outdir", metavar="DIR", required=True, help="Where to write iter0256.pkl, iter0512.pkl, ...")
@click.option("--cls", "classes", type=click.Choice(["A", "B", "AB"]), default="A", show_default=True, help="Classes")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Hidden layers")
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Width of the hidden layers")
@click.option(
    "--viz", metavar="BOOL", type=bool, default=True, show_default=True, help="Show the progress, or write training.png"
)
@click.option("--iters", type=click.IntRange(min=1), default=4096, show_default=True, help="Iterations")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed")
@click.option("--format", "file_format", type=click.Choice(["pkl", "safetensors"]), default="pkl", show_default=True)
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps")
def train(outdir: str, layers: int, dim: int, iters: int, device: str, **options: Any) -> None:
    """Train a network on the true score of the distribution."""
    place = resolve_device(device)
    do_train(outdir=outdir, num_layers=layers, hidden_dim=dim, num_iters=iters, device=place, **options)


@cmdline.command()
@click.option("--net", metavar="PATH|URL", help="Main network  [default: the one that comes with the code]")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network  [default: likewise]")
@click.option("--guidance", metavar="FLOAT", type=float, default=3, show_default=True, help="Guidance strength")
@click.option("--save", metavar="FILE", help=f"Write the figure  [default: show it; without a display {_DEFAULT_FILE}]")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps")
def plot(net: str | None, gnet: str | None, guidance: float, save: str | None, device: str) -> None:
    """Draw samples, densities and trajectories without and with guidance, and print how well samples keep to the tree.

    A sample is off the tree where the true density is lower than 99.9 percent of the true samples have. The others hit
    the mixture's components and the tree's branches; as many true samples miss a few components too.

    \b
    # The published networks: downloaded once and cached
    python toy_example.py plot \\
        --net=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim64/iter4096.pkl \\
        --gnet=https://nvlabs-fi-cdn.nvidia.com/edm2/toy-example/clsA-layers04-dim32/iter0512.pkl
    """
    do_plot(net, gnet, guidance, save, device=resolve_device(device))


if __name__ == "__main__":
    main(cmdline)
