"""Measure images, a network, or make reference statistics: command line, and the published functions."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

import dnnlib.cli
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from edm2.options.metrics import (
    COUNT,
    batch_option,
    detector_options,
    given_weights,
    measuring_options,
    metrics_option,
    skip_existing_option,
    workers_option,
)
from edm2.options.sampling import sampling_options
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.processes.together import on_main
from training.dataset.image_set import PictureBatches, PictureSet, choose_pictures
from training.metrics import results as report
from training.metrics.available import plan_metrics, plan_reference
from training.metrics.detectors import DINOv2Detector, InceptionV3Detector, make_detector
from training.metrics.evaluate import StatsPass
from training.metrics.metric_table import DEFAULT, METRICS, parse_metrics
from training.metrics.reference import Stats, load_stats, require_statistics, require_suffix, save_stats
from training.metrics.scores import compute_scores, lacking, shared_scores
from training.sampling.generation import generate_images
from training.sampling.request import resolve_sampling

# Names that people's scripts import from here.
__all__ = [
    "DINOv2Detector",
    "InceptionV3Detector",
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "load_stats",
    "save_stats",
]


def calculate_stats_for_iterable(
    image_iter: Iterable[Any],
    metrics: Sequence[str] = DEFAULT,
    verbose: bool = True,
    dest_path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> StatsPass:
    """The pass of `image_iter`'s batches (uint8 [N, C, H, W]) of this process through what `metrics` need.

    Iterate over the result; the last item's `stats` are the statistics of all processes' images. `dest_path` gets
    them, too. `verbose` is accepted and prints nothing: progress is the caller's.
    """
    world = distributed.init(None if device is None else str(device))
    names = parse_metrics(metrics)
    detectors = {name: make_detector(name, world.device) for name in {METRICS[name].detector for name in names}}
    dest = None if dest_path is None else Path(dest_path)
    return StatsPass(image_iter, metrics=names, detectors=detectors, world=world, dest=dest)


def calculate_stats_for_files(
    image_path: str | os.PathLike[str],
    num_images: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] = DEFAULT,
    max_batch_size: int = 64,
    num_workers: int = 2,
    verbose: bool = True,
    dest_path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> StatsPass:
    """The same for the pictures in a folder or ZIP file: `num_images` of them, which the seed chooses, or all."""
    pictures = PictureSet(image_path)
    (choice,) = choose_pictures(pictures, len(pictures) if num_images is None else num_images, seed=seed)
    world = distributed.init(None if device is None else str(device))
    batches = PictureBatches(pictures, choice, batch=max_batch_size, workers=num_workers, world=world)
    return calculate_stats_for_iterable(batches, metrics, verbose, dest_path, world.device)


def calculate_metrics_from_stats(
    stats: Stats, ref: Stats | str | os.PathLike[str], metrics: Sequence[str] = DEFAULT, verbose: bool = True
) -> dict[str, float]:
    """The value of each of `metrics` that the reference `ref` (statistics, or their file) allows; prints if verbose."""
    ref = load_stats(ref) if isinstance(ref, str | os.PathLike) else ref
    reasons = {name: lacking(METRICS[name], ref) for name in parse_metrics(metrics)}
    found = compute_scores(stats, ref, [name for name, reason in reasons.items() if reason is None])
    if not found:
        raise ConfigError(f"none of the metrics can be computed: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")
    if verbose:
        for name, reason in reasons.items():
            print(f"{name}: {found[name].value:.4f}" if reason is None else f"Skipped {name}: {reason}")
    return {name: score.value for name, score in found.items()}


_PATH = click.Path(path_type=Path)


def _list_metrics(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo("\n".join(f"{name:<22}{metric.description}" for name, metric in METRICS.items()))
        ctx.exit()


@click.group()
@click.option(
    "--list-metrics", is_flag=True, is_eager=True, expose_value=False, callback=_list_metrics, help="Show them and stop"
)
def cmdline() -> None:
    """Measure images or a network against reference statistics, or make such statistics.

    \b
    # FID and FD_DINOv2 of a random subset of 50000 images in out/
    python calculate_metrics.py calc --images=out \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl

    \b
    # The same for a network, without writing images, three times over
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen \\
        --preset=edm2-img512-s-guid-fid --repeat=3 --json=result.json \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl

    \b
    # With nothing to download: the shipped network against the shipped data
    python calculate_metrics.py ref --data=data/fashion-mnist-32.zip \\
        --dest=out/fashion-ref.safetensors --metrics=fd_efflite0 --features=6000
    python calculate_metrics.py gen --preset=demo --num=1000 \\
        --ref=out/fashion-ref.safetensors --metrics=all
    """


@cmdline.command()
@click.option("--images", metavar="PATH", type=_PATH, required=True, help="Folder or ZIP file with the images")
@measuring_options
@skip_existing_option
@batch_option(64)
@workers_option
@click.option("--allow-fewer", is_flag=True, help="Measure what is there if it is less than --num; marked as such")
@detector_options
def calc(
    images: Path, num: int, seed: int, repeat: int, batch: int, workers: int, allow_fewer: bool, **rest: Any
) -> None:
    """Measure a random subset of the images in a folder or ZIP file."""
    pictures = PictureSet(images)
    choices = choose_pictures(pictures, num, seed=seed, repeat=repeat, allow_fewer=allow_fewer)

    def sets(world: World) -> Iterator[Any]:
        return (PictureBatches(pictures, choice, batch=batch, workers=workers, world=world) for choice in choices)

    def facts() -> dict[str, Any]:
        choice = "successive parts of numpy.random.default_rng(seed).permutation, over the images by name"
        return {
            "images": report.described_file(images),
            "choice": choice,
            "seed": seed,
            "repeat": repeat,
            "batch": batch,
        }

    _measure("calc", sets, facts, num_images=len(choices[0]), wanted=num, **rest)


@cmdline.command()
@sampling_options
@measuring_options
@skip_existing_option
@batch_option(32)
@detector_options
def gen(num: int, seed: int, repeat: int, batch: int, **options: Any) -> None:
    """Measure images that a network generates on the fly, from the seeds --seed, --seed + 1, ..."""
    rest = {name: options.pop(name) for name in _OF_MEASURE}
    request = resolve_sampling(**options)
    if num < 2:
        raise ConfigError(f"--num={num} images cannot be measured; two are the least")

    def sets(world: World) -> Iterator[Any]:
        _say(request.notes_for(world.device), world)
        networks: dict[str, Any] = {"net": request.net, "gnet": request.gnets}
        for start in range(seed, seed + num * repeat, num):
            seeds = range(start, start + num)
            images = generate_images(
                **networks, seeds=seeds, max_batch_size=batch, world=world,
                prepare=request.prepare(click.echo if world.is_main else None), decoder=request.decoder,
                **request.pictures(), **request.sampler_kwargs(),
            )  # fmt: skip
            networks = {"net": images.net, "gnet": images.gnet, "encoder": images.encoder}
            if images.conditioning is not None:
                networks["condition"] = str(images.conditioning.condition)
            yield images

    def facts() -> dict[str, Any]:
        files = {"net": report.described_file(request.net), "gnets": [report.described_file(g) for g in request.gnets]}
        seeds = [f"{start}-{start + num - 1}" for start in range(seed, seed + num * repeat, num)]
        pictures = {name: report.described_file(path) for name, path in request.pictures().items() if path is not None}
        return files | {
            **pictures,
            "sampler": request.sampler_kwargs(),
            **request.prepare().settings,
            **request.decoder.settings,
            "seeds": seeds,
            "batch": batch,
        }

    _measure("gen", sets, facts, num_images=num, wanted=num, **rest)


# The options that `_measure` takes as they are.
_OF_MEASURE = (
    "ref",
    "metrics",
    "json_path",
    "device",
    "inception_weights",
    "dinov2_weights",
    "efflite0_weights",
    "skip_existing",
)


def _measure(
    command: str,
    sets: Callable[[World], Iterator[Any]],
    facts: Callable[[], dict[str, Any]],
    *,
    ref: str | None,
    metrics: str,
    json_path: Path | None,
    num_images: int,
    wanted: int,
    device: str | None,
    skip_existing: bool,
    **weights: str | None,
) -> None:
    """Score each set of batches; the main process prints a table and writes the record, for which `facts` are."""
    if json_path is not None:
        _require_place(json_path)
    elif skip_existing:
        raise ConfigError("--skip-existing needs the file that would be there: --json=result.json")
    reference = None if ref is None else load_stats(ref)
    with distributed.joined(device) as world:
        plan = plan_metrics(metrics, reference, device=world.device, weights=given_weights(weights))
        _say(report.notes(plan.skipped, plan.detectors), world)
        if skip_existing and json_path is not None:
            described = None if ref is None else report.described_file(ref)
            request = {"command": command, "num_images": num_images, "num_images_wanted": wanted, **facts()}
            request |= {"reference": described, "detectors": report.described_detectors(plan)}
            found = _from_main(world, json_path, request, plan.metrics)
            if found is not None:
                _say([f"{json_path} is there already", *(f"{name}: {v:.4f}" for name, v in found.items())], world)
                return
        runs = []
        with numerics(cudnn_benchmark=False):
            for batches in sets(world):
                work = StatsPass(batches, metrics=plan.metrics, detectors=plan.detectors, world=world)
                runs.append(shared_scores(_finish(work, "Measuring", world), reference, plan.metrics, world))
        summaries = report.summarize(runs)
        _say(report.table(summaries, num_images=num_images, wanted=wanted), world)
        if json_path is not None and world.is_main:
            described = None if ref is None else report.described_file(ref)
            record = report.result_record(summaries, plan, world=world, num_images=num_images, wanted=wanted)
            make_folder(json_path.parent)
            report.write_json(json_path, {**record, "command": command, "reference": described, **facts()})
        world.barrier()


@cmdline.command()
@click.option("--data", metavar="PATH", type=_PATH, required=True, help="Folder or ZIP file with the data set")
@click.option("--dest", metavar="FILE", type=_PATH, required=True, help="Where to write: .pkl or .safetensors")
@metrics_option
@click.option("--features", metavar="N", type=COUNT, help="Keep the features of N images, for KID, precision, ...")
@click.option("--skip-existing", is_flag=True, help="End at once where --dest has just these statistics")
@batch_option(64)
@workers_option
@detector_options
def ref(
    data: Path,
    dest: Path,
    metrics: str,
    features: int | None,
    skip_existing: bool,
    batch: int,
    workers: int,
    device: str | None,
    **weights: str | None,
) -> None:
    """Make reference statistics from all images of a data set."""
    require_suffix(dest)
    _require_place(dest)
    if features is not None and dest.suffix == ".pkl":
        raise ConfigError(
            f"--features={features} needs a --dest that ends in .safetensors; the .pkl layout has no place"
        )
    pictures = PictureSet(data)
    (everything,) = choose_pictures(pictures, len(pictures), seed=0)
    with distributed.joined(device) as world:
        plan = plan_reference(
            metrics, keep_features=features is not None, device=world.device, weights=given_weights(weights)
        )
        _say(report.notes(plan.skipped, plan.detectors), world)
        if skip_existing and dest.exists():
            require_statistics(dest, plan.metrics, num_images=len(pictures), num_features=features)
            _say([f"{dest} is there already"], world)
            return
        if world.is_main:
            make_folder(dest.parent)
        batches = PictureBatches(pictures, everything, batch=batch, workers=workers, world=world)
        kept = None if features is None else np.arange(features)  # the first of a random order
        work = StatsPass(
            batches, metrics=plan.metrics, detectors=plan.detectors, world=world, keep_features=kept, dest=dest
        )
        stats = _finish(work, "Reading", world)
        _say([f"Wrote {dest}: {', '.join(stats.keys() - {'num_images'})} of {stats['num_images']} images"], world)
        world.barrier()


def _from_main(world: World, path: Path, request: dict[str, Any], metrics: Sequence[str]) -> dict[str, float] | None:
    """The results at `path` as the main process reads them, in every process; None where there are none yet."""

    def read() -> dict[str, float] | None:
        found = report.read_results(path, request)
        if found is not None and set(found) != set(metrics):
            raise ConfigError(
                f"{path} holds {', '.join(found)}, not {', '.join(metrics)}; name another file, or delete it"
            )
        return found

    return on_main(world, read)


def _finish(work: StatsPass, what: str, world: World) -> Stats:
    stats = None
    for step in tqdm(work, desc=what, unit="batch", dynamic_ncols=True, disable=not world.is_main):
        stats = step.stats
    assert stats is not None
    return stats


def _require_place(path: Path) -> None:
    """Raise ConfigError, before anything is computed, if no file can be written to `path`."""
    require_folder(path.parent)
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder; name a file")


def _say(lines: Iterable[str], world: World) -> None:
    if world.is_main:
        for line in lines:
            click.echo(line)


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
