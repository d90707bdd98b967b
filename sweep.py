"""Measure a training run over EMA lengths and guidance weights, without writing networks or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
import tqdm

import dnnlib.cli
from dnnlib.cli import PATH, SOURCE
from dnnlib.disk import make_folder, require_file_place
from dnnlib.errors import ConfigError
from edm2.options.metrics import COUNT, KIMG, STD_LIST, Measuring, batch_option, detector_options, measuring_options
from edm2.options.sampling import NUMBERS, sampling_options_without, settled_precision

if not ASKED_FOR_HELP:  # which does not wait for torch
    from torch_utils import distributed
    from torch_utils.distributed import World
    from torch_utils.precision import numerics
    from torch_utils.processes.together import on_main
    from training.metrics import results
    from training.metrics.available import Plan, plan_metrics
    from training.metrics.reference import load_stats
    from training.posthoc.inputs import Input, choose_inputs, kimg_text, list_input_pickles
    from training.posthoc.response_plot import SUFFIXES
    from training.sampling.request import SamplingRequest, resolve_sampling
    from training.sweep import ema_sweep
    from training.sweep.ema_sweep import Point, Sweep
    from training.sweep.sweep_plot import plot_sweep


@click.command()
@click.option("--indir", metavar="DIR", type=SOURCE, required=True, help="Folder with the snapshots of a training run")
@click.option("--inprefix", metavar="STR", help="Take only inputs named {this}-{kimg}-{std}")
@click.option("--instd", metavar="LIST", type=STD_LIST, help="Take only inputs with these EMA lengths")
@click.option("--outkimg", metavar="KIMG", type=KIMG, help="Training time of the networks [default: newest input]")
@click.option(
    "--outstd", metavar="LIST", type=STD_LIST, required=True, help="EMA lengths to measure: 0.05 or 0.01,0.02,...,0.25"
)
@click.option("--guidance", metavar="LIST", type=NUMBERS, default="1", help="Guidance weights to measure [default: 1]")
@sampling_options_without("preset", "net", "guidance", "compile")
@measuring_options
@click.option("--plot", metavar="FILE", type=PATH, help="Draw the curves (png, pdf, svg)")
@batch_option(32)
@click.option("--build", type=COUNT, default=8, show_default=True, help="Networks to reconstruct at a time")
@detector_options
def cmdline(
    indir: str,
    inprefix: str | None,
    instd: list[float] | None,
    outkimg: int | None,
    outstd: list[float],
    guidance: tuple[float, ...],
    plot: Path | None,
    batch: int,
    build: int,
    **options: Any,
) -> None:
    """Measure a training run over EMA lengths, guidance weights, or pairs of them.

    Networks are reconstructed in memory from the run's snapshots. With --json, the same command continues an
    interrupted sweep, and one with further lengths or weights adds them to the curve.

    \b
    # The shipped data, with nothing to download
    python calculate_metrics.py ref --data=data/fashion-mnist-32.zip \\
        --dest=out/ref.safetensors --metrics=fd_efflite0
    python sweep.py --indir=training-runs/fashion --outstd=0.02,0.04,...,0.24 \\
        --metrics=fd_efflite0 --ref=out/ref.safetensors --num=1000 \\
        --json=out/sweep.json --plot=out/sweep.png

    \b
    # EMA length and guidance weight together, on 8 GPUs
    torchrun --standalone --nproc_per_node=8 sweep.py \\
        --indir=raw-snapshots/edm2-img512-xs --outstd=0.02,0.04,...,0.20 \\
        --gnet=guide.pkl --guidance=1,1.2,1.4,1.6 --json=sweep.json --plot=sweep.png \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl
    """
    given = Measuring.take(options)
    _require_paths(given.json_path, plot)
    inputs = list_input_pickles(indir, in_prefix=inprefix, in_std=instd)
    nimg, inputs = choose_inputs(inputs, outkimg)
    options["precision"] = settled_precision(options["precision"], given.device)
    requests = [resolve_sampling(net="", guidance=weight, **options) for weight in sorted(set(guidance))]
    lists = None if instd is None else ",".join(f"{std:g}" for std in instd)
    origin = {"indir": indir, "inprefix": inprefix, "instd": lists, "outkimg": outkimg and kimg_text(nimg)}
    _sweep(inputs, nimg, outstd, requests, origin, given, plot=plot, batch=batch, build=build)


def _require_paths(json_path: Path | None, plot: Path | None) -> None:
    for path in (json_path, plot):
        if path is not None:
            require_file_place(path)
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{plot} must end in one of {', '.join(SUFFIXES)}")


def _sweep(
    inputs: list[Input],
    nimg: int,
    stds: list[float],
    requests: list[SamplingRequest],
    origin: dict[str, Any],
    given: Measuring,
    *,
    plot: Path | None,
    batch: int,
    build: int,
) -> None:
    num, json_path = given.num, given.json_path
    images = {"num": num, "seed": given.seed, "repeat": given.repeat}
    if num < 2:
        raise ConfigError(f"--num={num} must be 2 or more")
    ema_sweep.check_guides(inputs, requests)
    reference = None if given.ref is None else load_stats(given.ref)
    with distributed.joined(given.device) as world:
        plan = plan_metrics(given.metrics, reference, device=world.device, weights=given.weights)
        settings = ema_sweep.settings_of(inputs, nimg, requests, plan, ref=given.ref, **images)
        points: list[Point] = []
        if json_path is not None:  # the main process reads the file, since it is the one that writes it
            points = on_main(world, lambda: ema_sweep.read_points(json_path, settings))
        work = Sweep(
            inputs, stds, requests, out_nimg=nimg, plan=plan, reference=reference, world=world,
            **images, batch=batch, build=build, done=frozenset(point.key for point in points),
        )  # fmt: skip
        if world.is_main:
            for line in results.notes(plan.skipped, plan.detectors):
                click.echo(line)
            if points:
                click.echo(f"{json_path} has {len(points)} points already")
            for path in (json_path, plot):
                if path is not None:
                    make_folder(path.parent)
        _measure(work, points, settings, plan, json_path, world)
        if world.is_main:
            _report(points, requests, plan, origin, nimg, range(given.seed, given.seed + num))
            if plot is not None:
                plot_sweep(plot, points, plan.metrics, title=f"{len(inputs)} snapshots, {num} images a point")
            written = [str(path) for path in (json_path, plot) if path is not None]
            click.echo(f"Wrote {' and '.join(written)}" if written else "--json=FILE keeps the points", err=not written)
        world.barrier()


def _measure(
    work: Sweep, points: list[Point], settings: dict[str, Any], plan: Plan, json_path: Path | None, world: World
) -> None:
    extra = {"device": str(world.device), "processes": world.size}
    bar = tqdm.tqdm(total=len(work), unit="batch", dynamic_ncols=True, disable=not world.is_main or not len(work))
    with bar, numerics(cudnn_benchmark=False):
        for step in work:
            bar.set_description(f"{step.std:.3f} x {step.guidance:g}", refresh=False)
            bar.update()
            if step.point is None:
                continue
            points.append(step.point)
            if world.is_main:
                scores = ", ".join(f"{name} {step.point.mean(name):.4f}" for name in plan.metrics)
                bar.write(f"EMA length {step.std:.3f}, guidance {step.guidance:g}: {scores}, fit {step.point.fit:.2e}")
                if json_path is not None:
                    results.write_json(json_path, ema_sweep.sweep_record(points, settings, plan, extra))


def _report(
    points: list[Point], requests: list[SamplingRequest], plan: Plan, origin: dict[str, Any], nimg: int, seeds: range
) -> None:
    for metric in plan.metrics:
        best = ema_sweep.best_point(points, metric)
        if best is None:
            click.echo(f"No {metric} is finite.")
            continue
        click.echo(f"Best {metric}: {best.mean(metric):.4f} at EMA length {best.std:.3f}, guidance {best.guidance:g}")
        if not best.is_near:
            click.echo(
                f"  Its network is not close to that length (fit {best.fit:.2f}): the snapshots are too far apart."
            )
        for setting in ema_sweep.at_the_edge(points, best):
            click.echo(f"  It is at the edge of the {setting}; a wider range may hold a better one.")
        request = next((r for r in requests if abs(r.weight - best.guidance) < 1e-6), None)
        if request is not None:
            for line in ema_sweep.commands_for(best, request, reconstruct=origin, nimg=nimg, seeds=seeds):
                click.echo(f"  {line}")


if __name__ == "__main__":
    dnnlib.cli.main(
        cmdline,
        interrupted="The points printed above are in --json, if given; the same command continues after them.",
    )
