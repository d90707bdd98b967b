"""Measure images or a network, or make reference statistics: command line, and the published functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
from tqdm import tqdm

import dnnlib.cli
from dnnlib.cli import PATH, say_next
from dnnlib.disk import make_folder, require_file_place
from dnnlib.errors import ConfigError
from edm2.options.metrics import (
    COUNT,
    Measuring,
    batch_option,
    detector_options,
    given_weights,
    list_metrics_option,
    measuring_options,
    metrics_option,
    skip_existing_option,
    workers_option,
)
from edm2.options.sampling import sampling_options, settled_precision
from training.metrics.metric_table import DEFAULT
from training.metrics.metric_table import parse_metrics as parse_metric_list

if not ASKED_FOR_HELP:  # which does not wait for torch
    import numpy as np

    from torch_utils import distributed
    from torch_utils.distributed import World
    from torch_utils.precision import numerics
    from training.dataset.image_set import ImageSet, ImageSetBatches, choose_images
    from training.metrics import results as report
    from training.metrics.available import plan_metrics, plan_reference
    from training.metrics.detectors import DINOv2Detector, InceptionV3Detector, get_detector
    from training.metrics.evaluate import (
        StatsPass,
        calculate_stats_for_files,
        calculate_stats_for_iterable,
        compute_possible_scores,
        shared_scores,
        stats_of,
    )
    from training.metrics.reference import Stats, load_stats, require_statistics, require_suffix, save_stats
    from training.metrics.reference_images import open_reference
    from training.sampling.request import resolve_sampling

# Names that people's scripts import from here.
__all__ = [
    "DINOv2Detector",
    "InceptionV3Detector",
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "get_detector",
    "load_stats",
    "parse_metric_list",
    "save_stats",
]


def calculate_metrics_from_stats(
    stats: Stats, ref: Stats | str | os.PathLike[str], metrics: Sequence[str] = DEFAULT, verbose: bool = True
) -> dict[str, float]:
    """Return those `metrics` that `ref`, statistics or a file, allows; `verbose` prints them and what is skipped."""
    reference = load_stats(ref) if isinstance(ref, str | os.PathLike) else ref
    scores, skipped = compute_possible_scores(stats, reference, metrics)
    if verbose:
        lines = {name: f"Skipped {name}: {reason}" for name, reason in skipped.items()}
        lines |= {name: f"{name}: {score.value:.4f}" for name, score in scores.items()}
        print("\n".join(lines[name] for name in parse_metric_list(metrics)))
    return {name: score.value for name, score in scores.items()}


@click.group()
@list_metrics_option
def cmdline() -> None:
    """Measure images or a network against reference statistics, or make such statistics.

    \b
    # FID and FD_DINOv2 of a random subset of 50000 images in out/
    python calculate_metrics.py calc --images=out \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl

    \b
    # The same for the images of a network, three times, without writing images
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen \\
        --preset=edm2-img512-s-guid-fid --repeat=3 --json=result.json \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl

    \b
    # The shipped network against the shipped data, without a download
    python calculate_metrics.py ref --data=data/fashion-mnist-32.zip \\
        --dest=out/fashion-ref.safetensors --metrics=fd_efflite0 --features=6000
    python calculate_metrics.py gen --preset=demo --num=1000 \\
        --ref=out/fashion-ref.safetensors --metrics=all
    """


@cmdline.command()
@click.option("--images", metavar="PATH", type=PATH, required=True, help="Folder, ZIP file or .npz batch of images")
@measuring_options
@skip_existing_option
@batch_option(64)
@workers_option
@click.option("--allow-fewer", is_flag=True, help="Measure fewer than --num if there are no more; marks the result")
@detector_options
def calc(images: Path, batch: int, workers: int, allow_fewer: bool, **options: Any) -> None:
    """Measure a random subset of the images in a folder, a ZIP file or an .npz batch."""
    given = Measuring.take(options)
    image_set = ImageSet(images)
    choices = choose_images(image_set, given.num, seed=given.seed, repeat=given.repeat, allow_fewer=allow_fewer)

    def sets(world: World) -> Iterator[Any]:
        return (ImageSetBatches(image_set, choice, batch=batch, workers=workers, world=world) for choice in choices)

    def facts() -> dict[str, Any]:
        choice = "successive parts of numpy.random.default_rng(seed).permutation, over the images by name"
        how = {"choice": choice, "seed": given.seed, "repeat": given.repeat, "batch": batch}
        return {"images": report.described_file(images), **how}

    _measure("calc", sets, facts, given, num_images=len(choices[0]), batch=batch, workers=workers)


@cmdline.command()
@sampling_options
@measuring_options
@skip_existing_option
@batch_option(32)
@detector_options
def gen(batch: int, **options: Any) -> None:
    """Measure images that a network generates on the fly, from the seeds --seed, --seed + 1, ..."""
    given = Measuring.take(options)
    options["precision"] = settled_precision(options["precision"], given.device)
    request = resolve_sampling(**options)
    num, starts = given.num, range(given.seed, given.seed + given.num * given.repeat, max(given.num, 1))
    if num < 2:
        raise ConfigError(f"--num={num} images cannot be measured; at least two are needed")

    def sets(world: World) -> Iterator[Any]:
        _say(request.notes_for(world.device), world)
        networks: dict[str, Any] = {}  # those of the first set, for the next ones
        for start in starts:
            seeds, announce = range(start, start + num), click.echo if world.is_main else None
            images = request.generate(**networks, announce=announce, seeds=seeds, max_batch_size=batch, world=world)
            networks = {"net": images.net, "gnets": images.guides, "encoder": images.encoder}
            if images.conditioning is not None:
                networks["condition"] = str(images.conditioning.condition)
            yield images

    def facts() -> dict[str, Any]:
        seeds = [f"{start}-{start + num - 1}" for start in starts]
        return {**report.described_sampling(request), "seeds": seeds, "batch": batch}

    _measure("gen", sets, facts, given, num_images=num, batch=batch, workers=2)


def _measure(
    command: str,
    sets: Callable[[World], Iterator[Any]],
    facts: Callable[[], dict[str, Any]],
    given: Measuring,
    *,
    num_images: int,
    batch: int,
    workers: int,
) -> None:
    path = given.json_path
    if path is not None:
        require_file_place(path)
    elif given.skip_existing:
        raise ConfigError("--skip-existing needs the results file: --json=result.json")
    source = None if given.ref is None else open_reference(given.ref)
    reference, num_reference = (None, 0) if source is None else (source.stats, source.num_images)
    with distributed.joined(given.device) as world:
        how: dict[str, Any] = {"device": world.device, "weights": given.weights, "reference_images": num_reference}
        plan = plan_metrics(given.metrics, reference, **how)
        _say(report.notes(plan.skipped, plan.detectors), world)
        request = report.Request(command=command, num_images=num_images, wanted=given.num, ref=given.ref, facts=facts)
        if given.skip_existing and path is not None:
            values = report.existing_results(world, path, request, plan)
            if values is not None:
                _say([f"{path} exists already", *(f"{name}: {v:.4f}" for name, v in values.items())], world)
                return
        runs = []
        with numerics(cudnn_benchmark=False):
            if source is not None and (work := source.work(plan, batch=batch, workers=workers, world=world)):
                _say([f"Measuring the {num_reference} images of {given.ref} first; `ref` keeps such statistics"], world)
                reference = source.with_computed(_stats(work, "Reference", world))
            for batches in sets(world):
                work = StatsPass(batches, metrics=plan.metrics, detectors=plan.detectors, world=world)
                runs.append(shared_scores(_stats(work, "Measuring", world), reference, plan.metrics, world))
        summaries = report.summarize(runs)
        _say(report.table(summaries, num_images=num_images, wanted=given.num), world)
        if path is not None and world.is_main:
            make_folder(path.parent)
            report.write_json(path, report.result_record(summaries, plan, world=world, request=request))
            _say([f"Wrote {path}"], world)
            if command == "gen":  # a model card with the results
                say_next("convert_snapshot.py", "NETWORK", "--out=MODEL", "--to=folder", f"--metrics={path}")
        elif world.is_main:
            click.echo("The same command with --json=FILE keeps the results in a file.", err=True)
        world.barrier()


@cmdline.command()
@click.option("--data", metavar="PATH", type=PATH, required=True, help="The data set: folder, ZIP file or .npz batch")
@click.option("--dest", metavar="FILE", type=PATH, required=True, help="File to write: .pkl or .safetensors")
@metrics_option
@click.option("--features", metavar="N", type=COUNT, help="Keep the features of N images, for KID, precision, ...")
@click.option("--skip-existing", is_flag=True, help="Stop at once if --dest has these very statistics")
@batch_option(64)
@workers_option
@detector_options
def ref(data: Path, dest: Path, features: int | None, skip_existing: bool, **options: Any) -> None:
    """Make reference statistics from all images of a data set."""
    require_suffix(dest, keep_features=features is not None)
    require_file_place(dest)
    image_set = ImageSet(data)
    (everything,) = choose_images(image_set, len(image_set), seed=0)
    with distributed.joined(options["device"]) as world:
        names, weights = options["metrics"], given_weights(options)
        plan = plan_reference(names, keep_features=features is not None, device=world.device, weights=weights)
        _say(report.notes(plan.skipped, plan.detectors), world)
        if skip_existing and dest.exists():
            require_statistics(dest, plan.metrics, num_images=len(image_set), num_features=features)
            _say([f"{dest} exists already"], world)
            return
        if world.is_main:
            make_folder(dest.parent)
        how = {"batch": options["batch"], "workers": options["workers"], "world": world}
        batches = ImageSetBatches(image_set, everything, **how)
        kept = None if features is None else np.arange(features)  # the first of a random order
        work = StatsPass(
            batches, metrics=plan.metrics, detectors=plan.detectors, world=world, keep_features=kept, dest=dest
        )
        stats = _stats(work, "Reading", world)
        _say([f"Wrote {dest}: {', '.join(stats.keys() - {'num_images'})} of {stats['num_images']} images"], world)
        if world.is_main:
            say_next("calculate_metrics.py", "calc", "--images=PATH", f"--ref={dest}")
        world.barrier()


def _stats(work: StatsPass, title: str, world: World) -> Stats:
    return stats_of(tqdm(work, desc=title, unit="batch", dynamic_ncols=True, disable=not world.is_main))


def _say(lines: Iterable[str], world: World) -> None:
    if world.is_main:
        for line in lines:
            click.echo(line)


if __name__ == "__main__":
    dnnlib.cli.main(cmdline, interrupted="No result was written; the same command starts again.")
