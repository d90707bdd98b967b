"""Train a class-conditional or unconditional diffusion model with the EDM2 recipe (arXiv 2312.02696)."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import tqdm

from dnnlib.appending import LineFile
from dnnlib.cli import INT_LIST, LOSS_SCALE, NIMG, STD_LIST, main
from dnnlib.errors import ConfigError
from dnnlib.invocation import invocation
from dnnlib.parse import format_nimg
from edm2.options.condition import condition_option
from edm2.options.metrics import given_metrics, training_metrics_options
from edm2.options.training_labels import label_options
from edm2.options.training_saving import saving_options
from edm2.options.training_session import session_options
from edm2.options.training_speed import take_fp16, training_speed_options
from edm2.options.training_streaming import streaming_options
from edm2.options.training_watching import given_samples, watching_options
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.precision import precision_note
from torch_utils.processes import failures, stopping
from torch_utils.processes.together import on_main
from training.condition.spec import parse_condition
from training.config import MetricsConfig, TrainingConfig
from training.dataset.latents import PUBLISHED_VAE
from training.presets import locate, training_preset
from training.run.label_dropout import describe_labels
from training.run.loggers import RunLoggers, check_loggers
from training.run.run_folder import RunFolder
from training.run.run_metrics import check_metrics
from training.run.run_samples import check_samples, preferred_std
from training.run.samples_config import SamplesConfig
from training.run.sessions import record_session
from training.run.state import check_network, network_shape
from training.small_data.estimate import estimate
from training.small_data.plan import PRESET as SMALL
from training.small_data.plan import Plan, make_plan
from training.small_data.plan_text import describe_estimate, describe_plan
from training.streaming.remote import is_remote
from training.training_loop import (
    Cause,
    Ended,
    Iteration,
    Notice,
    Sampled,
    Saved,
    Status,
    TrainingRun,
    open_dataset,
)

# Options that are fields of TrainingConfig.network under another name or their own.
_NETWORK_FIELDS = {
    "channels": "channels",
    "dropout": "dropout",
    "precision": "precision",
    "channel_mult": "channel_mult",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions",
}


class Log:
    """What the main process tells: on the screen, past the progress bar, and in the run's log.txt."""

    def __init__(self, folder: RunFolder, *, is_main: bool, patient: bool, loggers: RunLoggers) -> None:
        self._log = LineFile(folder.log_file, patient=patient)
        self._stats = LineFile(folder.stats_file, patient=patient)
        self.is_main = is_main
        self._loggers = loggers

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        if self.is_main:
            tqdm.tqdm.write(text)
            self._log.append(text)

    def record(self, stats: dict[str, float], texts: dict[str, str], nimg: int) -> None:
        """Append a line to stats.jsonl and say the same in short."""
        if self.is_main:
            self._stats.append(json.dumps(stats | texts))
            self.say(_status_line(stats, texts))
        self._loggers.scalars(stats, texts, nimg)
        self._say_notes()

    def drew(self, path: Path, nimg: int) -> None:
        """Say that there is a new sample grid."""
        self.say(f"Drew {path.name}")
        self._loggers.image(path, nimg)
        self._say_notes()

    def _say_notes(self) -> None:
        while self._loggers.notes:
            self.say(self._loggers.notes.pop(0))


@click.command()
@click.option(
    "--outdir", metavar="DIR", required=True, help="Where to save the results; a run found there is continued"
)
@click.option("--data", metavar="ZIP|DIR|URL", help="The data set  [required, unless the preset brings one]")
@click.option("--cond", metavar="BOOL", type=bool, help="Train a class-conditional model  [default: True]")
@click.option(
    "--preset",
    metavar="STR",
    default="edm2-img512-s",
    show_default=True,
    help="Configuration to start from; small = by the data",
)
@click.option("--duration", metavar="NIMG", type=NIMG, help="Training duration")
@click.option("--batch", metavar="NIMG", type=NIMG, help="Total batch size, over all processes")
@click.option("--channels", metavar="INT", type=int, help="Width of the network's first level")
@click.option("--channel-mult", metavar="LIST", type=INT_LIST, help="Width of each level, in units of --channels")
@click.option("--num-blocks", metavar="INT", type=int, help="Residual blocks in each level")
@click.option("--attn-resolutions", metavar="LIST", type=INT_LIST, help="Resolutions of the levels with self-attention")
@click.option("--dropout", metavar="FLOAT", type=float, help="Dropout probability")
@click.option("--P_mean", "P_mean", metavar="FLOAT", type=float, help="Mean of ln(sigma)")
@click.option("--P_std", "P_std", metavar="FLOAT", type=float, help="Standard deviation of ln(sigma)")
@click.option("--lr", metavar="FLOAT", type=float, help="Reference learning rate")
@click.option("--decay", metavar="BATCHES", type=float, help="Batches before the learning rate decays; 0 = never")
@click.option("--rampup", metavar="MIMG", type=float, help="Learning rate ramp-up, millions of images; 0 = none")
@click.option("--ema-stds", metavar="LIST", type=STD_LIST, help="EMA lengths to track, relative to training time")
@click.option("--xflip", metavar="BOOL", type=bool, help="Also train on mirrored images  [default: False]")
@label_options
@condition_option
@click.option("--encode-on-the-fly", is_flag=True, help="Train on latents of pixels, encoded as they are needed")
@click.option(
    "--model-url", metavar="NAME|DIR", help=f"VAE for that: hub name or diffusers folder  [default: {PUBLISHED_VAE}]"
)
@click.option("--init", metavar="PKL|URL", help="Start from this snapshot's weights")
@click.option("--init-partial", is_flag=True, default=None, help="Leave tensors fresh that --init has in another shape")
@click.option(
    "--batch-gpu", metavar="NIMG", type=NIMG, help="Limit of the batch size on one GPU (gradient accumulation)"
)
@training_speed_options
@click.option("--ls", metavar="FLOAT|auto", type=LOSS_SCALE, help="Loss scaling; auto adapts it  [default: 1]")
@click.option("--bench", metavar="BOOL", type=bool, help="Let cuDNN time its algorithms  [default: True]")
@click.option("--device", metavar="STR", help="cpu, cuda, cuda:N or mps  [default: the best there is]")
@click.option("--workers", metavar="INT", type=int, help="Data-loading processes  [default: 2 with a GPU, else 0]")
@click.option("--status", metavar="NIMG", type=NIMG, help="Interval of status lines; 0 = none  [default: 128Ki]")
@click.option("--snapshot", metavar="NIMG", type=NIMG, help="Interval of network snapshots; 0 = none  [default: 8Mi]")
@click.option("--checkpoint", metavar="NIMG", type=NIMG, help="Interval of checkpoints; 0 = none  [default: 128Mi]")
@click.option("--format", "snapshot_format", type=click.Choice(["pkl", "safetensors", "both"]), help="Of snapshots")
@saving_options
@training_metrics_options
@streaming_options
@watching_options
@session_options
@click.option("--seed", metavar="INT", type=int, help="Random seed  [default: 0]")
@click.option("--allow-changes", is_flag=True, help="Continue a run even where options differ that change its result")
@click.option("-n", "--dry-run", is_flag=True, help="Print the training options and exit")
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
        --data=datasets/img512-sd.zip --preset=edm2-img512-xs --batch-gpu=32

    \b
    # A small network on the shipped data, on whatever this machine has
    python train_edm2.py --outdir=training-runs/fashion --preset=fashion

    \b
    # Own pictures, with options chosen by the data and printed with their reasons
    python train_edm2.py --outdir=training-runs/mine --data=datasets/mine.zip --preset=small
    """
    check_loggers(log_names)
    plan = plan_for(preset, options)
    config = configure(preset, options, base=None if plan is None else plan.config)
    dataset = open_dataset(config)
    resolution, _ = network_shape(config, dataset)
    config = dataclasses.replace(config, network=config.network.fitted_to(resolution))
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config.share_of(num_ranks)
    config.group_of(num_ranks)
    check_network(config, dataset)
    check_metrics(config, dataset)
    check_samples(config, dataset)
    folder = RunFolder(outdir)
    folder.check(config, allow_changes=allow_changes)
    if dry_run:
        click.echo(_describe(config, folder, dataset))
        if plan is not None:
            click.echo(describe_plan(plan, config))
            measured = estimate(config, dataset, distributed.resolve_device(device), num_ranks)
            click.echo(describe_estimate(measured))
        click.echo("Dry run; exiting.")
        return 0

    if folder.is_complete(config):
        click.echo(f"The run in {folder.path} is finished, and has no checkpoint to continue from.")
        return 0
    dataset.check_headers()
    with (
        distributed.joined(device, patience_hours=timeout / 60) as world,
        stopping.handled_signals(functools.partial(_on_signal, world)),
    ):
        if options["workers"] is None and world.device.type == "cuda":
            config = dataclasses.replace(config, workers=2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder.held(world, say=click.echo))
            run = stack.enter_context(contextlib.closing(TrainingRun(config, folder, world=world)))
            nimg = run.state.nimg
            on_main(world, functools.partial(folder.start, config, nimg=nimg))
            begin = functools.partial(record_session, folder.path, nimg=nimg, command=invocation(), world=world)
            on_main(world, begin)
            loggers = stack.enter_context(RunLoggers(log_names if world.is_main else (), folder.path, config))
            on_main(world, functools.partial(loggers.begin, nimg=nimg))
            log = Log(folder, is_main=world.is_main, patient=config.on_disk_full == "wait", loggers=loggers)
            log.say(_describe(config, folder, dataset))
            if plan is not None and world.is_main and nimg < config.duration:
                log.say(describe_plan(plan, config))
                log.say(describe_estimate(estimate(config, dataset, world.device, world.size), nimg=nimg))
            note = precision_note(config.network.precision, world.device)
            if note is not None:
                log.say(note)
            return _train(run, log)


def plan_for(preset: str, options: dict[str, Any]) -> Plan | None:
    """What --preset=small chooses for the data set; None for another preset, which is a row. Raises ConfigError."""
    if preset != SMALL:
        return None
    if not options["data"]:
        raise ConfigError(f"--data is missing; --preset={SMALL} chooses by the data set")
    vae = (options["model_url"] or PUBLISHED_VAE) if options["encode_on_the_fly"] else None
    given = {name: options[name] for name in ("data", "cond", "xflip", "duration", "data_cache", "data_cache_size")}
    return make_plan(vae=vae, **given)


def configure(preset: str, options: dict[str, Any], base: TrainingConfig | None = None) -> TrainingConfig:
    """The preset with every option that was given put in its place. Raises ConfigError for values that cannot work.

    `base` stands for the preset where it is no row of the table.
    """
    base = training_preset(preset) if base is None else base
    metrics, samples = given_metrics(options), given_samples(options)
    take_fp16(options)
    encode, vae = options.pop("encode_on_the_fly"), options.pop("model_url")
    if vae is not None and not encode:
        raise ConfigError(f"--model-url={vae} needs --encode-on-the-fly; latents that are stored need no VAE")
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if v is not None
    }
    network: dict[str, Any] = {
        _NETWORK_FIELDS[name]: given.pop(name) for name in list(given) if name in _NETWORK_FIELDS
    }
    if "condition" in given:
        given["condition"] = str(parse_condition(given["condition"]))  # with all that was left out
    if metrics is not None:
        given["metrics"] = MetricsConfig(**metrics)
    if samples is not None:
        best = preferred_std(preset, given.get("ema_stds", base.ema_stds))
        given["samples"] = SamplesConfig(**{"std": best, **samples})
    config = dataclasses.replace(base, network=dataclasses.replace(base.network, **network), **given)
    if not config.data:
        raise ConfigError(f"--data is missing; --preset={preset} brings no data set of its own")
    data = options["data"] or locate(config.data)  # a preset's own data set is in the repository
    buffer = config.shuffle_images if is_remote(data) else None
    return dataclasses.replace(config, data=data, shuffle_buffer=buffer, vae=(vae or PUBLISHED_VAE) if encode else None)


def _train(run: TrainingRun, log: Log) -> int:
    """Carry the run to its end or to that of the session, telling how it goes; the exit code."""
    for note in run.notes:
        log.say(note)
    if run.resumed_from is not None:
        log.say(f"Continuing from {run.resumed_from} at {run.state.nimg / 1e3:.1f} kimg.")
    if run.state.left_fresh:
        log.say(f"Left as initialized, since --init has no fitting tensor: {', '.join(run.state.left_fresh)}.")
    if run.state.widened:
        log.say("--init knows no conditioning image: the weights for it begin at zero, and the network as that one.")
    if len(run) == 0:
        log.say(f"The run is finished: {run.state.nimg / 1e3:.1f} kimg. A larger --duration continues it.")
        return 0
    for note in run.metrics.notes if run.metrics is not None else ():
        log.say(note)
    log.say(f"Training for {len(run)} iterations on {run.world.size} process(es), {run.world.device.type}.")
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
            match event:
                case Iteration():
                    bar.update(batch)
                    if compiling_since is not None:
                        log.say(f"Compiled, with the first iteration, in {time.monotonic() - compiling_since:.1f} s.")
                        compiling_since = None
                case Status():
                    log.record(event.stats, event.texts, event.nimg)
                    bar.set_postfix(loss=f"{event.stats['Loss/loss']:.4f}")
                case Notice():
                    log.say(event.text)
                case Saved():
                    log.say(f"Saved {', '.join(path.name for path in event.paths)}")
                case Sampled():
                    log.drew(event.path, event.nimg)
                case Ended():
                    ended = event
    if ended is not None:
        log.say(_farewell(ended))
        return 1 if ended.cause == Cause.NONFINITE else 130 if ended.signum == signal.SIGINT else 0
    log.say(f"Done: {run.state.nimg / 1e3:.1f} kimg in {_duration(run.state.elapsed_sec)}.")
    return 0


def _on_signal(world: World, signum: signal.Signals) -> None:
    """What a signal means, said as soon as it comes; called in a thread of its own."""
    if failures.first_failure(world.store) is not None:
        os._exit(1)  # torchrun ends the others since one has failed: there is no iteration to finish
    if world.is_main:
        tqdm.tqdm.write(
            f"{signum.name}: ending after this iteration, with a checkpoint. A second signal ends at once.",
            file=sys.stderr,
        )


def _farewell(ended: Ended) -> str:
    """Why a session ended before its run, and how to go on."""
    at = f"at {ended.nimg / 1e3:.1f} kimg"
    again = f"To continue: {invocation()}"
    match ended.cause:
        case Cause.NONFINITE:
            return (
                f"Stopped {at}. {ended.explanation}\nSettings that help: a lower --lr or --ls, --fp16=False, a longer"
                " --rampup. If the newest training-state is spoilt, remove it to continue from the one before.\n"
                "--on-nonfinite=continue goes on regardless."
            )
        case Cause.STOP:
            return f"Stopped {at}, as should_stop asked. {again}"
        case Cause.SLICE:
            return f"Suspended {at}: the end of this slice. {again}"
        case Cause.SIGNAL:
            name = "a signal" if ended.signum is None else signal.Signals(ended.signum).name
            return f"Suspended {at}: {name}. {again}"
        case Cause.SUSPEND:
            return f"Suspended {at}, as was requested. {again}"


def _describe(config: TrainingConfig, folder: RunFolder, dataset: Any) -> str:
    """The options and the data in a form to read before a long run."""
    share, rounds = config.share_of(int(os.environ.get("WORLD_SIZE", "1")))
    res = dataset.resolution
    seen, channels = network_shape(config, dataset)
    return "\n".join(
        [
            "Training options:",
            config.to_json().rstrip(),
            "",
            f"Output directory:      {folder.path}",
            f"Data set:              {config.data}",
            f"Images:                {len(dataset)} of {res}x{res}, {dataset.num_channels} channels",
            f"Network sees:          {seen}x{seen}, {channels} channels" + (f" by {config.vae}" if config.vae else ""),
            *([f"And beside it:         {config.condition}"] if config.condition else []),
            f"Classes:               {describe_labels(config, dataset)}",
            f"Duration:              {format_nimg(config.duration)} images",
            f"Batch:                 {config.batch} images, {share} a process in {rounds} round(s)",
            "",
        ]
    )


def _status_line(stats: dict[str, float], texts: dict[str, str]) -> str:
    prefix = "Metrics/"
    scores = [f"{key.removeprefix(prefix)} {value:.4g}" for key, value in stats.items() if key.startswith(prefix)]
    best = [
        f"{key.removeprefix(prefix).replace('_', ' ', 1)}: {name}"
        for key, name in texts.items()
        if key.startswith(f"{prefix}best_")
    ]
    return "  ".join(
        [
            f"kimg {stats['Progress/kimg']:<9.1f}",
            f"time {_duration(stats['Timing/total_sec']):<12s}",
            f"sec/tick {stats['Timing/sec_per_tick']:<8.2f}",
            f"sec/kimg {stats['Timing/sec_per_kimg']:<7.3f}",
            f"maintenance {stats['Timing/maintenance_sec']:<7.2f}",
            f"cpumem {stats['Resources/cpu_mem_gb']:<6.2f}",
            f"gpumem {stats['Resources/peak_gpu_mem_gb']:<6.2f}",
            f"reserved {stats['Resources/peak_gpu_mem_reserved_gb']:<6.2f}",
            f"loss {stats['Loss/loss']:.4f}",
            *scores,
            *best,
        ]
    )


def _duration(seconds: float) -> str:
    """Seconds as days, hours, minutes and seconds: 3d 04h 05m 06s."""
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (sec, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{value:02d}{unit}" if index else f"{value}{unit}" for index, (value, unit) in enumerate(parts))


if __name__ == "__main__":
    main(train_edm2)
