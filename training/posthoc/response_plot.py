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
    """Raise ConfigError if no figure can be written to `path`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} has none of the suffixes {', '.join(SUFFIXES)} of figures")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.absolute().parent} is not a writable folder")


def responses(inputs: Sequence[Input], nimg: int, stds: Sequence[float], num: int = _POINTS) -> tuple[np.ndarray, ...]:
    """Return times [num] in images, and responses per image: stored [num, inputs], wanted and achieved [num, stds]."""
    in_nimg, in_std = np.array([file.nimg for file in inputs]), np.array([file.std for file in inputs])
    weights = phema.solve_posthoc_coefficients(in_nimg, in_std, nimg, stds)
    images = nimg / (num - 1)  # a step
    stored = phema.power_function_response(in_nimg / images, in_std, num) / images
    wanted = phema.power_function_response(num - 1, stds, num) / images
    return np.arange(num) * images, stored, wanted, stored @ weights


def plot_responses(path: str | os.PathLike[str], inputs: Sequence[Input], nimg: int, stds: Sequence[float]) -> None:
    """Draw how much each moment of training counts, in the inputs and in the networks of lengths `stds` at `nimg`.

    The first panel has the stored averages as areas, with a color per length. Every other panel has one output: the
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
        color = _STORED[lengths.index(length) % len(_STORED)]
        for index, file in enumerate(inputs):
            if file.std == length:
                top.fill_between(times, stored[:, index], color=color, alpha=0.25, lw=0)
                top.plot(times, stored[:, index], color=color, lw=0.8)
        top.plot([], color=color, label=f"stored, $\\sigma_{{rel}}$ = {length:.3f}")
    top.legend(loc="upper center", fontsize="small")
    top.set_title(f"{len(inputs)} stored averages", fontsize="medium")
    for index, std in enumerate(stds):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns])
        axes.fill_between(times, achieved[:, index], color=_ACHIEVED, alpha=0.4, lw=0, label="achieved")
        axes.plot(times, wanted[:, index], color="black", ls="--", lw=1.2, label="wanted")
        axes.set_title(f"$\\sigma_{{rel}}$ = {std:.3f}, fit {fits[index]:.1e}", fontsize="medium")
        if index == 0:
            axes.legend(loc="upper left", fontsize="small")
    for axes in figure.axes:
        axes.set_xlim(0, times[-1])
        axes.set_yticks([])
        axes.set_ylabel("weight", fontsize="small")
        axes.tick_params(labelsize="small")
    figure.supxlabel("training time (million images)", fontsize="small")
    with atomic_path(path) as temp:
        figure.savefig(temp, format=Path(path).suffix[1:].lower(), dpi=150)
