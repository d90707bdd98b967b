"""Figure of the toy example: the effect of guidance on samples, densities and trajectories (Figures 1 and 2)."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import atomic_path
from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import unknown
from training.toy.mixture import Mixture, gt
from training.toy.model import ToyModel
from training.toy.sample import (
    CONTOUR_SHARE,
    TREE_SHARE,
    Density,
    Fidelity,
    density_threshold,
    do_sample,
    fidelity,
    thin,
)


@dataclass(frozen=True, kw_only=True)
class View:
    """A square part of the plane."""

    center: tuple[float, float]
    half_size: float

    def grid(self, num: int, device: torch.device) -> torch.Tensor:
        """Centers [num, num, 2] of the cells, rows from bottom to top."""
        steps = ((torch.arange(num, device=device) + 0.5) / num * 2 - 1) * self.half_size
        y, x = torch.meshgrid(steps + self.center[1], steps + self.center[0], indexing="ij")
        return torch.stack([x, y], dim=2)


WIDE = View(center=(0.30, 0.30), half_size=1.2)
CLOSE_UP = View(center=(0.45, 1.22), half_size=0.3)

_SIGMA_WIDE = 5.0  # initial noise level of the samples
_SIGMA_CLOSE = 0.03  # of the densities, and initial noise level of the trajectories, in the close-up
_NUM_WIDE = 16384
_NUM_CLOSE = 4096
_SPACING = 0.045  # between the starting points of trajectories
_NUM_CELLS = 200  # per side of a drawn density
_NUM_LEVELS = 16  # of its colors
_NUM_ARROWS = 20  # per side

_COLOR_A, _COLOR_B, _COLOR_PATH = "#c05010", "#808080", "#2040a0"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of sampling without and with guidance from the same starting points."""

    truth: Mixture
    net: Density
    gnet: Density
    guidance: float
    interval: tuple[float, float] | None
    samples: dict[str, torch.Tensor]  # [N, 2] each, by 'true', 'unguided' and 'guided'
    trajectories: dict[str, torch.Tensor]  # [S + 1, N, 2] each, by 'unguided' and 'guided', in the close-up
    fidelity: dict[str, Fidelity]  # of the samples, by the same names

    @property
    def titles(self) -> dict[str, str]:
        """Names of the samples for people, by the same names."""
        limits = "" if self.interval is None else " in ({:g}, {:g}]".format(*self.interval)
        return {
            "true": "True samples",
            "unguided": "Without guidance",
            "guided": f"Guidance {self.guidance:g}{limits}",
        }


def compare(
    net: Density,
    gnet: Density,
    guidance: float = 3,
    *,
    interval: tuple[float, float] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> Comparison:
    """Sample class A from the network alone and guided by `gnet`, in all steps or those of `interval`.

    `seed` draws the starting points.
    """
    truth = gt("A", device)
    generator = torch.Generator(truth.device).manual_seed(seed)
    wide = truth.sample(_NUM_WIDE, _SIGMA_WIDE, generator)
    close = thin(truth.sample(_NUM_CLOSE, _SIGMA_CLOSE, generator), _SPACING)
    samples = {"true": truth.sample(_NUM_WIDE, generator=generator)}
    trajectories = {}
    for name, strength in (("unguided", 1.0), ("guided", guidance)):
        options: dict[str, Any] = {"guidance": strength, "gnet": gnet, "interval": interval}
        samples[name] = do_sample(net, wide, sigma_max=_SIGMA_WIDE, **options)[-1]
        trajectories[name] = do_sample(net, close, sigma_max=_SIGMA_CLOSE, **options)
    thresholds = [density_threshold(truth, share) for share in (TREE_SHARE, CONTOUR_SHARE)]
    return Comparison(
        truth=truth,
        net=net,
        gnet=gnet,
        guidance=guidance,
        interval=interval,
        samples=samples,
        trajectories=trajectories,
        fidelity={name: fidelity(truth, points, *thresholds) for name, points in samples.items()},
    )


def draw_comparison(figure: Any, result: Comparison) -> None:
    """Draw the eight panels on `figure`, a matplotlib Figure of about 2:1."""
    axes = figure.subplots(2, 4)
    titles = result.titles
    for ax, (name, title) in zip(axes[0, :3], titles.items(), strict=True):
        share = f", {result.fidelity[name].off_tree:.1%} off the tree" if name != "true" else ""
        _prepare(ax, WIDE, f"{title}{share}")
        for classes, color in (("B", _COLOR_B), ("A", _COLOR_A)):
            _outline(ax, gt(classes, result.truth.device), WIDE, color)
        _points(ax, result.samples[name])
    for row, name in enumerate(("unguided", "guided")):
        ax = axes[row, 3]
        _prepare(ax, CLOSE_UP, f"Trajectories, {titles[name][0].lower()}{titles[name][1:]}")
        _outline(ax, result.truth, CLOSE_UP, _COLOR_A)
        _paths(ax, result.trajectories[name])
    for ax, density, title in ((axes[1, 0], result.net, "Main network"), (axes[1, 1], result.gnet, "Guiding network")):
        _prepare(ax, CLOSE_UP, f"{title}: density and score")
        _density(ax, density)
        _score_arrows(ax, density)
    _prepare(axes[1, 2], CLOSE_UP, "Their ratio and score difference")
    _ratio(axes[1, 2], result.net, result.gnet)
    _ratio_arrows(axes[1, 2], result.net, result.gnet)
    figure.tight_layout()


# What a panel can show, from back to front.
PANEL_ELEMENTS = (
    "density_net", "density_guide", "density_ratio", "gt_uncond", "gt_outline", "arrows_net", "arrows_guide",
    "arrows_ratio", "samples", "paths",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of the figure, with elements of the caller's choice."""

    truth: Mixture
    net: Density
    gnet: Density | None
    guidance: float
    interval: tuple[float, float] | None
    sigma: float  # initial noise level of the samples, and the one of densities and scores
    x_init: torch.Tensor  # [N, 2], initial points of the samples
    view: View
    num_cells: int  # per side of a drawn density
    arrow_len: float  # length of an arrow for a score of 1

    def draw(self, ax: Any, elems: Collection[str]) -> None:
        """Draw the elements of `PANEL_ELEMENTS`. Raises ConfigError for others, and for those that need a guide."""
        for name in elems:
            if name not in PANEL_ELEMENTS:
                raise ConfigError(unknown("element", name, PANEL_ELEMENTS))
        if self.gnet is None and any(name.endswith(("_guide", "_ratio")) for name in elems):
            raise ConfigError("densities and scores of a guide need one; add gnet")
        _prepare(ax, self.view)
        path = None
        if {"samples", "paths"} & set(elems):
            options: dict[str, Any] = {"guidance": self.guidance, "gnet": self.gnet, "interval": self.interval}
            path = do_sample(self.net, self.x_init, sigma_max=self.sigma, **options)
        for name in PANEL_ELEMENTS:
            if name in elems:
                self._draw(ax, name, path)

    def _draw(self, ax: Any, name: str, path: torch.Tensor | None) -> None:
        kind, _, whose = name.partition("_")
        if kind == "gt":
            classes = {"uncond": (("A", _COLOR_B), ("B", _COLOR_B)), "outline": (("A", _COLOR_A),)}[whose]
            for label, color in classes:
                _outline(ax, gt(label, self.truth.device), self.view, color, self.num_cells)
        elif path is not None and kind == "samples":
            _points(ax, path[-1])
        elif path is not None and kind == "paths":
            _paths(ax, path)
        elif whose == "ratio":
            self._draw_map(ax, kind, _ratio, _ratio_arrows, self.net, self.gnet)
        else:
            self._draw_map(ax, kind, _density, _score_arrows, self.net if whose == "net" else self.gnet)

    def _draw_map(self, ax: Any, kind: str, density: Any, arrows: Any, *nets: Density | None) -> None:
        if kind == "density":
            density(ax, *nets, self.view, self.sigma, self.num_cells)
        else:
            arrows(ax, *nets, self.view, self.sigma, self.arrow_len)


def draw_progress(figure: Any, truth: Mixture, net: ToyModel, title: str) -> None:
    """Draw the true density and score, and those that the network has learned so far."""
    figure.clear()
    shown: list[tuple[str, Density]] = [("True", truth), (title, net)]
    for ax, (name, density) in zip(figure.subplots(1, 2), shown, strict=True):
        _prepare(ax, WIDE, f"{name}: density and score")
        _density(ax, density, WIDE)
        _score_arrows(ax, density, WIDE)
    figure.tight_layout()


def _prepare(ax: Any, view: View, title: str = "") -> None:
    (x, y), half = view.center, view.half_size
    ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def _points(ax: Any, samples: torch.Tensor) -> None:
    ax.plot(*samples.cpu().numpy().T, ".", markersize=1, color="black", markeredgewidth=0)


def _outline(ax: Any, truth: Mixture, view: View, color: str, num: int | None = None) -> None:
    """Fill the smallest area with 99 % of the true distribution's mass, at the noise level that the view resolves."""
    sigma = view.half_size / 100
    generator = torch.Generator(truth.device).manual_seed(0)
    level = truth.logp(truth.sample(_NUM_CLOSE, sigma, generator), sigma).quantile(1 - CONTOUR_SHARE)
    points = view.grid(num or _NUM_CELLS, truth.device)
    x, y = points.cpu().unbind(2)
    excess = (truth.logp(points, sigma) - level).cpu()
    ax.contourf(x.numpy(), y.numpy(), excess.numpy(), levels=[0, math.inf], colors=[color], alpha=0.25)


def _paths(ax: Any, trajectories: torch.Tensor) -> None:
    paths = trajectories.cpu().numpy()
    ax.plot(paths[..., 0], paths[..., 1], linewidth=0.8, color=_COLOR_PATH)
    ax.plot(*paths[0].T, "o", markersize=2, color=_COLOR_PATH, markerfacecolor="none", markeredgewidth=0.5)
    ax.plot(*paths[-1].T, ".", markersize=4, color="black")


def _density(
    ax: Any, density: Density, view: View = CLOSE_UP, sigma: float = _SIGMA_CLOSE, num: int | None = None
) -> None:
    """Draw the density, relative to its largest value in the view."""
    with torch.no_grad():
        logp = density.logp(view.grid(num or _NUM_CELLS, _device_of(density)), sigma)
    _filled_contours(ax, (logp - logp.max()).exp(), view, "Oranges", (0, 1))


def _score_arrows(
    ax: Any, density: Density, view: View = CLOSE_UP, sigma: float = _SIGMA_CLOSE, length: float | None = None
) -> None:
    _arrows(ax, view, lambda points: density.score(points, sigma), _device_of(density), length)


def _ratio(
    ax: Any,
    net: Density,
    gnet: Density,
    view: View = CLOSE_UP,
    sigma: float = _SIGMA_CLOSE,
    num: int | None = None,
) -> None:
    """Draw the logarithm of the ratio of the two densities."""
    with torch.no_grad():
        points = view.grid(num or _NUM_CELLS, _device_of(net))
        ratio = net.logp(points, sigma) - gnet.logp(points, sigma)
    ratio = ratio - ratio.median()  # both densities are known up to a factor
    limit = max(float(ratio.abs().quantile(0.98)), 1e-6)  # above 0 also for a network and itself
    _filled_contours(ax, ratio, view, "RdBu_r", (-limit, limit))


def _ratio_arrows(
    ax: Any,
    net: Density,
    gnet: Density,
    view: View = CLOSE_UP,
    sigma: float = _SIGMA_CLOSE,
    length: float | None = None,
) -> None:
    _arrows(ax, view, lambda points: net.score(points, sigma) - gnet.score(points, sigma), _device_of(net), length)


def _filled_contours(ax: Any, values: torch.Tensor, view: View, colors: str, limits: tuple[float, float]) -> None:
    x, y = view.grid(len(values), torch.device("cpu")).unbind(2)
    levels = torch.linspace(*limits, _NUM_LEVELS + 1).tolist()
    ax.contourf(x.numpy(), y.numpy(), values.cpu().numpy(), levels=levels, cmap=colors, extend="both")


def _arrows(ax: Any, view: View, field: Any, device: torch.device, length: float | None = None) -> None:
    """Draw arrows along a field: `length` times its size, or shorter where it is weak and at most as long as a cell."""
    points = view.grid(_NUM_ARROWS, device)
    with torch.no_grad():
        vectors = field(points)
    if length is None:
        size = vectors.norm(dim=2, keepdim=True)
        vectors = vectors / (size + size.median()) * (2 * view.half_size / _NUM_ARROWS)
    else:
        vectors = vectors * length
    (x, y), (u, v) = (tensor.cpu().numpy().transpose(2, 0, 1) for tensor in (points, vectors))
    ax.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=1, width=0.003, color="black", alpha=0.6)


def _device_of(density: Any) -> torch.device:
    return density.device if isinstance(density, Mixture) else next(density.parameters()).device


class FigureOutput:
    """A matplotlib figure in a window or in `save`; without a display in `default`. Raises ConfigError if it fails."""

    def __init__(self, size: tuple[float, float], *, save: Path | None, default: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure: Any = Figure(figsize=size, dpi=100) if save else _pyplot_figure(size)
        # Only the canvas of a backend with windows names the event loop that it needs.
        self.in_window = getattr(self.figure.canvas, "required_interactive_framework", None) is not None
        self.path = None if self.in_window else save or default
        if self.path is not None:
            suffixes = FigureCanvasAgg.get_supported_filetypes()
            if self.path.suffix[1:].lower() not in suffixes:
                raise ConfigError(f"{self.path} lacks the suffix of an image; use one of {', '.join(sorted(suffixes))}")
            require_folder(self.path.parent)

    def update(self) -> None:
        """Show or write the figure as drawn so far."""
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
        """Wait until the user closes the window, if there is one."""
        from matplotlib import pyplot

        if self.in_window:
            pyplot.show()
        pyplot.close(self.figure)


def _pyplot_figure(size: tuple[float, float]) -> Any:
    from matplotlib import pyplot

    try:
        return pyplot.figure(figsize=size, dpi=100)
    except Exception as error:  # every backend raises its own kind
        raise ConfigError(
            f"matplotlib cannot open a window ({error}); unset MPLBACKEND or set it to Agg, which writes files"
        ) from error
