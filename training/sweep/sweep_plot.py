"""Figure of a sweep: the score over the EMA length, as in Figure 5 of arXiv 2312.02696, or over the guidance weight."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.atomic import atomic_path
from training.metrics.metric_table import METRICS
from training.posthoc import MAX_FIT
from training.posthoc.response_plot import check_plot_path
from training.sweep.ema_sweep import Point, best_point


def plot_sweep(path: Path, points: Sequence[Point], metrics: Sequence[str], *, title: str = "") -> None:
    """Write `sweep_figure` to `path`, whole or not at all."""
    check_plot_path(path)
    figure = sweep_figure(points, metrics, title=title)
    with atomic_path(path) as temp:
        figure.savefig(temp, format=path.suffix[1:].lower(), dpi=120)


def sweep_figure(points: Sequence[Point], metrics: Sequence[str], *, title: str = "") -> Any:
    """Return a matplotlib figure with a panel for each metric: a curve over the EMA length for each guidance weight.

    With a single EMA length there is one curve over the guidance weight. Curves are means over the sets of seeds, dots
    single values. A ring marks the best mean, and points of poor reconstructions are hollow.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    over_guidance = len({point.std for point in points}) == 1 and len(points) > 1
    curves: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.key):
        curves.setdefault(point.std if over_guidance else point.guidance, []).append(point)
    figure = Figure(figsize=(6, 3.6 * len(metrics) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    colors = colormaps["viridis"].resampled(len(curves) + 1)  # without the last one, which is too bright
    for row, metric in enumerate(metrics):
        axes = figure.add_subplot(len(metrics), 1, row + 1)
        for index, (value, curve) in enumerate(curves.items()):
            label = f"EMA length {value:g}" if over_guidance else f"guidance {value:g}"
            xs, ys = [_x_of(p, over_guidance) for p in curve], [p.mean(metric) for p in curve]
            axes.plot(xs, ys, color=colors(index), marker="o", ms=4, label=label)
            for x, y, point in zip(xs, ys, curve, strict=True):
                if not point.is_near:
                    axes.plot(x, y, color=colors(index), marker="o", ms=4, mfc="white")
                if len(point.values[metric]) > 1:
                    axes.plot([x] * len(point.values[metric]), point.values[metric], ".", color=colors(index), ms=3)
        if not all(point.is_near for point in points):
            axes.plot([], [], "o", color="gray", ms=4, mfc="white", label=f"poor reconstruction, fit > {MAX_FIT:g}")
        _mark_best(axes, points, metric, over_guidance)
        axes.set_xlabel("guidance weight" if over_guidance else "EMA length, relative to training time")
        axes.set_ylabel(f"{metric} ({'lower' if METRICS[metric].lower_is_better else 'higher'} is better)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def _mark_best(axes: Any, points: Sequence[Point], metric: str, over_guidance: bool) -> None:
    best = best_point(points, metric)
    if best is not None:
        weight = f", guidance {best.guidance:g}" if len({point.guidance for point in points}) > 1 else ""
        label = f"best {best.mean(metric):.4g}: EMA length {best.std:.3f}{weight}"
        x, y = _x_of(best, over_guidance), best.mean(metric)
        axes.plot([x], [y], marker="o", ms=11, mfc="none", mec="tab:red", ls="none", label=label)


def _x_of(point: Point, over_guidance: bool) -> float:
    return point.guidance if over_guidance else point.std
