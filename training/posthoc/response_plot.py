"""Figure of a reconstruction: stored averages, wanted and achieved responses (Figure 5 of arXiv 2312.02696)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError
from training import phema
from training.posthoc.inputs import Input

SUFFIXES = (".png", ".pdf", ".svg")

_POINTS = 2000  # of each curve
_COLUMNS = 4
_STORED, _ACHIEVED = ("tab:blue", "tab:orange", "tab:green", "tab:red"), "tab:purple"


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where `path` cannot become a figure."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} has none of the suffixes {', '.join(SUFFIXES)} of figures")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.absolute().parent} is no folder that can be written to")


def responses(inputs: Sequence[Input], nimg: int, stds: Sequence[float], num: int = _POINTS) -> tuple[np.ndarray, ...]:
    """Times [num] in images, and the responses, per image: stored [num, inputs], wanted and achieved [num, stds]."""
    in_nimg, in_std = np.array([file.nimg for file in inputs]), np.array([file.std for file in inputs])
    weights = phema.solve_posthoc_coefficients(in_nimg, in_std, nimg, stds)
    images = nimg / (num - 1)  # a step
    stored = phema.power_function_response(in_nimg / images, in_std, num) / images
    wanted = phema.power_function_response(num - 1, stds, num) / images
    return np.arange(num) * images, stored, wanted, stored @ weights


def plot_responses(path: str | os.PathLike[str], inputs: Sequence[Input], nimg: int, stds: Sequence[float]) -> None:
    """Draw how much each moment of the training counts: in the inputs, and in the networks of lengths `stds` at `nimg`.

    The first panel has the stored averages as areas, a colour for each length; every other panel one output, the
    wanted response dashed, the achieved one as an area. The file is written whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot_path(path)
    times, stored, wanted, achieved = responses(inputs, nimg, stds)
    profiles = ([file.nimg for file in inputs], [file.std for file in inputs])
    fits = phema.posthoc_fit(*profiles, nimg, stds, phema.solve_posthoc_coefficients(*profiles, nimg, stds))
    times = times / 1e6
    columns = min(_COLUMNS, len(stds))
    rows = -(-len(stds) // columns)
    figure = Figure(figsize=(3.2 * columns + (3.2 if columns == 1 else 0), 2.2 * (rows + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, columns)
    top = figure.add_subplot(grid[0, :])
    lengths = sorted({file.std for file in inputs})
    for length in reversed(lengths):  # narrow and high ones in front
        colour = _STORED[lengths.index(length) % len(_STORED)]
        for place, file in enumerate(inputs):
            if file.std == length:
                top.fill_between(times, stored[:, place], color=colour, alpha=0.25, lw=0)
                top.plot(times, stored[:, place], color=colour, lw=0.8)
        top.plot([], color=colour, label=f"stored, $\\sigma_{{rel}}$ = {length:.3f}")
    top.legend(loc="upper center", fontsize="small")
    top.set_title(f"{len(inputs)} stored averages", fontsize="medium")
    for place, std in enumerate(stds):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        axes.fill_between(times, achieved[:, place], color=_ACHIEVED, alpha=0.4, lw=0, label="achieved")
        axes.plot(times, wanted[:, place], color="black", ls="--", lw=1.2, label="wanted")
        axes.set_title(f"$\\sigma_{{rel}}$ = {std:.3f}, fit {fits[place]:.1e}", fontsize="medium")
        if place == 0:
            axes.legend(loc="upper left", fontsize="small")
    for axes in figure.axes:
        axes.set_xlim(0, times[-1])
        axes.set_yticks([])
        axes.set_ylabel("weight", fontsize="small")
        axes.tick_params(labelsize="small")
    figure.supxlabel("training time (million images)", fontsize="small")
    with atomic_path(path) as temp:
        figure.savefig(temp, format=Path(path).suffix[1:].lower(), dpi=150)
