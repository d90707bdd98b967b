"""Train a class-conditional or unconditional diffusion model with the EDM2 recipe (arXiv 2312.02696)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click
import tqdm
from click.core import ParameterSource

from dnnlib.cli import SectionedCommand, invocation, main, say_next
from dnnlib.errors import ConfigError
from dnnlib.text import format_elapsed, format_kimg
from edm2.options.training import SECTIONS, configure, training_options
from torch_utils.precision_names import AUTO
from training.config import PUBLISHED_VAE, TrainingConfig

if not ASKED_FOR_HELP:  # which does not wait for torch
    import torch

    from edm2.run_log import RunLog, describe_run, farewell, start_notes
    from torch_utils import distributed
    from torch_utils.distributed import World
    from torch_utils.loss_scale import check_loss_scale
    from torch_utils.precision import fastest_precision, precision_note
    from torch_utils.processes import failures, stopping
    from torch_utils.processes.together import on_main
    from training.dataset.contract import ImageDataset
    from training.presets import SMALL
    from training.run.known_data import data_facts
    from training.run.loggers import RunLoggers, check_loggers, log_in
    from training.run.run_data import check_dataset, network_shape, open_dataset
    from training.run.run_folder import RunFolder
    from training.run.run_network import check_network, check_own_loss
    from training.run.run_samples import check_samples, with_class_numbers
    from training.run.session import Cause, Ended, record_session
    from training.small_data.estimate import describe_estimate, estimate
    from training.small_data.plan import Plan, describe_plan, make_plan
    from training.small_data.suggest import rough_time, suggestion
    from training.training_loop import Iteration, Status, TrainingRun


@click.command(cls=SectionedCommand, sections=SECTIONS)
@training_options
def train_edm2(
    outdir: str,
    preset: str,
    device: str | None,
    log_names: tuple[str, ...],
    timeout: float,
    allow_changes: bool,
    dry_run: bool,
    **options: Any,
) -> int:
    """Train a diffusion model with the recipe of the paper "Analyzing and Improving the Training Dynamics of
    Diffusion Models".

    Options left out come from the preset. NIMG values are image counts, optionally with Ki, Mi or Gi.

    \b
    # The XS-sized model for ImageNet-512, on 8 GPUs
    torchrun --standalone --nproc_per_node=8 train_edm2.py --outdir=training-runs/00000-edm2-img512-xs \\
        --data=datasets/img512-sd.zip --preset=edm2-img512-xs

    \b
    # A small network on the shipped data, on whatever this machine has
    python train_edm2.py --outdir=training-runs/fashion --preset=fashion

    \b
    # Own images, with options chosen by the data and printed with their reasons
    python train_edm2.py --outdir=training-runs/mine --data=datasets/mine.zip --preset=small
    """
    check_loggers(log_names)
    by_default = click.get_current_context().get_parameter_source("preset") is ParameterSource.DEFAULT
    plan = _plan(preset, options)
    folder = RunFolder(outdir)
    settled = _settle_precision(options, folder, device)
    config = configure(preset, options, base=None if plan is None else plan.config)
    dataset = open_dataset(config) if plan is None else plan.dataset_for(config)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = _checked(config, dataset, num_ranks=num_ranks)
    facts = data_facts(config, dataset)
    notes = [*settled, *folder.check(config, facts, allow_changes=allow_changes)]
    if dry_run:
        click.echo(describe_run(config, folder.path, dataset, num_ranks=num_ranks))
        if by_default:
            click.echo(suggestion(preset, config, dataset))
        if by_default or plan is not None:
            click.echo("\n".join(_expected(config, dataset, plan, distributed.resolve_device(device), num_ranks)))
        click.echo("\n".join([*notes, "Dry run; exiting."]))
        return 0

    if folder.is_complete(config):
        click.echo(f"The run in {folder.path} is finished, and has no checkpoint to continue from.")
        return 0
    dataset.check_headers()
    with (
        distributed.joined(device, patience_hours=timeout / 60) as world,
        stopping.handled_signals(functools.partial(_on_signal, world)),
        contextlib.ExitStack() as stack,
    ):
        config = dataclasses.replace(config, network=on_main(world, lambda: config.network))
        check_loss_scale(config.ls, world.device)
        on_main(world, functools.partial(log_in, log_names))
        if options["workers"] is None and world.device.type == "cuda":
            config = dataclasses.replace(config, workers=2)
        stack.enter_context(folder.held(world, say=click.echo))
        run = stack.enter_context(contextlib.closing(TrainingRun(config, folder, world=world, dataset=dataset)))
        loggers = stack.enter_context(RunLoggers(log_names if world.is_main else (), folder.path, config))
        on_main(world, functools.partial(_begin, run, loggers, facts))
        patient = config.on_disk_full == "wait"
        log = RunLog(folder, is_main=world.is_main, patient=patient, loggers=loggers, write=tqdm.tqdm.write)
        _introduce(run, log, plan)
        if by_default and world.is_main and run.resumed_from is None:
            log.say(suggestion(preset, config, dataset))
            log.say(rough_time(config, dataset, world.device, world.size))
        for note in notes:
            log.say(note)
        return _train(run, log)


def _plan(preset: str, options: dict[str, Any]) -> Plan | None:
    if preset != SMALL:
        return None
    if options["network_class"] or options["dataset_class"]:
        raise ConfigError(f"--preset={SMALL} chooses our network for files; with an own part, give another preset")
    if not options["data"]:
        raise ConfigError(f"--data is missing; --preset={SMALL} chooses by the data set")
    vae = (options["model_url"] or PUBLISHED_VAE) if options["encode_on_the_fly"] else None
    names = ("data", "cond", "xflip", "balance", "duration", "snapshot", "batch", "data_cache", "data_cache_size")
    return make_plan(vae=vae, **{name: options[name] for name in names})


def _settle_precision(options: dict[str, Any], folder: RunFolder, device: str | None) -> list[str]:
    """Replace --precision=auto by the format of the run in `folder`, or the fastest on the device; return notes."""
    if options["precision"] != AUTO:
        return []
    recorded = folder.recorded_precision()
    fastest, reason = fastest_precision(distributed.resolve_device(device))
    options["precision"] = recorded or fastest
    return [f"--precision=auto: {options['precision']}, {'as the run began' if recorded else reason}."]


def _checked(config: TrainingConfig, dataset: ImageDataset, *, num_ranks: int) -> TrainingConfig:
    """Return the configuration with attention heads that fit the data. Raises ConfigError if it cannot work."""
    check_dataset(config, dataset)
    resolution, _ = network_shape(config, dataset)
    config = dataclasses.replace(config, network=config.network.fitted_to(resolution))
    config.share_of(num_ranks)
    config.group_of(num_ranks)
    check_network(config, dataset)
    check_own_loss(config, dataset)
    config = with_class_numbers(config, dataset)
    check_samples(config, dataset)
    return config


def _expected(
    config: TrainingConfig, dataset: ImageDataset, plan: Plan | None, device: torch.device, num_ranks: int
) -> Iterator[str]:
    """Yield what a run would take here, for a dry run."""
    if plan is None:
        yield rough_time(config, dataset, device, num_ranks)
    else:
        yield describe_plan(plan, config)
        yield describe_estimate(estimate(config, dataset, device, num_ranks))
    note = precision_note(config.network.precision, device)
    if note is not None:
        yield note


def _begin(run: TrainingRun, loggers: RunLoggers, facts: dict[str, Any]) -> None:
    nimg = run.state.nimg
    run.folder.start(run.config, facts, nimg=nimg)
    record_session(run.folder.path, nimg=nimg, command=invocation(), world=run.world)
    loggers.begin(nimg=nimg)


def _introduce(run: TrainingRun, log: RunLog, plan: Plan | None) -> None:
    config, world, nimg = run.config, run.world, run.state.nimg
    log.say(describe_run(config, run.folder.path, run.dataset, num_ranks=world.size))
    if plan is not None and world.is_main and nimg < config.duration:
        log.say(describe_plan(plan, config))
        log.say(describe_estimate(estimate(config, run.dataset, world.device, world.size), nimg=nimg))
    note = precision_note(config.network.precision, world.device)
    if note is not None:
        log.say(note)
    for text in start_notes(run):
        log.say(text)


def _train(run: TrainingRun, log: RunLog) -> int:
    if len(run) == 0:
        return 0
    batch, ended = run.config.batch, None
    compiling_since = time.monotonic() if run.config.compiles_on(run.world.device) else None
    with tqdm.tqdm(
        total=run.state.nimg + len(run) * batch,
        initial=run.state.nimg,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if log.is_main else True,
    ) as bar:
        for event in run:
            log.report(event)
            match event:
                case Iteration():
                    bar.update(batch)
                    if compiling_since is not None:
                        log.say(f"Compiled, with the first iteration, in {time.monotonic() - compiling_since:.1f} s.")
                        compiling_since = None
                case Status():
                    bar.set_postfix(loss=f"{event.stats['Loss/loss']:.4f}")
                case Ended():
                    ended = event
    if ended is not None:
        log.say(farewell(ended, invocation()))
        return 1 if ended.cause == Cause.NONFINITE else 130 if ended.signum == signal.SIGINT else 0
    path, elapsed = run.folder.path, format_elapsed(run.state.elapsed_sec)
    log.say(f"Done: {format_kimg(run.state.nimg)} kimg in {elapsed}. Results are in {path}.")
    if log.is_main:
        say_next("report.py", str(path))
    return 0


def _on_signal(world: World, signum: signal.Signals) -> None:
    """Say what a signal does as soon as it comes. Called in a thread of its own."""
    if failures.first_failure(world.store) is not None:
        os._exit(1)  # torchrun ends the others because one has failed: they have no iteration to finish
    if world.is_main:
        tqdm.tqdm.write(
            f"{signum.name}: ending after this iteration, with a checkpoint. A second signal ends at once.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(
        train_edm2,
        interrupted="The same command continues from the newest checkpoint in --outdir, if one was written.",
    )
