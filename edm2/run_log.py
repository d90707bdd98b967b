"""The messages of a training run to its user: log.txt, stats.jsonl, and lines that the caller prints."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dnnlib.atomic import LineFile
from dnnlib.parse import format_nimg
from dnnlib.text import format_elapsed, format_kimg
from torch_utils.compiling import compiled_code_dir, missing_compiler
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.run.loggers import RunLoggers
from training.run.run_data import describe_labels, network_shape
from training.run.run_folder import RunFolder
from training.run.session import Cause, Ended
from training.training_loop import Event, Notice, Sampled, Saved, Status, TrainingRun

_METRICS = "Metrics/"
_COMPILE_SEC = 10.0  # for a block, forward and backward, in the one Python thread that generates code


class RunLog:
    """Messages of the main process, to `write` and log.txt. If `patient`, lines wait for room on a full disk."""

    def __init__(
        self, folder: RunFolder, *, is_main: bool, patient: bool, loggers: RunLoggers, write: Callable[[str], None]
    ) -> None:
        self.is_main = is_main
        self._log = LineFile(folder.log_file, patient=patient)
        self._stats = LineFile(folder.stats_file, patient=patient)
        self._loggers = loggers
        self._write = write

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        if self.is_main:
            self._write(text)
            self._log.append(text)

    def report(self, event: Event) -> None:
        """Log an event of the run, in stats.jsonl and the loggers too if it has statistics or a sample grid."""
        match event:
            case Status():
                if self.is_main:
                    self._stats.append(json.dumps(event.stats | event.texts))
                self.say(status_line(event.stats, event.texts))
                self._loggers.scalars(event.stats, event.texts, event.nimg)
            case Sampled():
                self.say(f"Drew {event.path.name}")
                self._loggers.image(event.path, event.nimg)
            case Notice():
                self.say(event.text)
            case Saved():
                self.say(f"Saved {', '.join(path.name for path in event.paths)}")
        while self._loggers.notes:
            self.say(self._loggers.notes.pop(0))


def describe_run(config: TrainingConfig, path: Path, dataset: ImageDataset, *, num_ranks: int) -> str:
    """Return the options and the data of the run in the folder `path`, to be read before a long run."""
    share, rounds = config.share_of(num_ranks)
    size, channels = network_shape(config, dataset)
    stored = dataset.resolution
    return "\n".join(
        [
            "Training options:",
            config.to_json().rstrip(),
            "",
            f"Output directory:      {path}",
            f"Data set:              {dataset.name if config.dataset_class else config.data}",
            *([f"Network:               {config.network_class}"] if config.network_class else []),
            f"Images:                {len(dataset)} of {stored}x{stored}, {dataset.num_channels} channels",
            f"Network sees:          {size}x{size}, {channels} channels" + (f" by {config.vae}" if config.vae else ""),
            *([f"Conditioned on:        {config.condition}"] if config.condition else []),
            f"Classes:               {describe_labels(config, dataset)}",
            f"Duration:              {format_nimg(config.duration)} images",
            f"Batch:                 {config.batch} images, {share} per process in {rounds} round(s)",
            "",
        ]
    )


def start_notes(run: TrainingRun) -> Iterator[str]:
    """Yield what the user should know about the start of a run."""
    yield from run.notes
    if run.resumed_from is not None:
        yield f"Continuing from {run.resumed_from} at {format_kimg(run.state.nimg)} kimg."
    if run.state.uninitialized:
        yield f"Left as initialized, since --init has no fitting tensor: {', '.join(run.state.uninitialized)}."
    if run.state.has_new_condition_input:
        yield (
            "--init was trained without a conditioning image; the weights of that input start at zero, so the network"
            " starts out identical to the snapshot."
        )
    if len(run) == 0:
        yield f"The run is finished: {format_kimg(run.state.nimg)} kimg. A larger --duration continues it."
        return
    yield from run.metrics.notes if run.metrics is not None else ()
    yield f"Training for {len(run)} iterations on {run.world.size} process(es), {run.world.device.type}."
    yield from _compile_notes(run)


def _compile_notes(run: TrainingRun) -> Iterator[str]:
    """Yield what compiling will take, or why there is none although the options ask for it."""
    config, device = run.config, run.world.device
    if not config.asks_to_compile_on(device):
        return
    missing = missing_compiler(device)
    if missing is not None:
        yield f"The network is not compiled, and several times slower: {missing}."
        return
    if config.network_class is not None:
        yield f"Compiling {config.network_class} in the first iteration, less with code in {compiled_code_dir()}."
        return
    unet: Any = run.state.net.unet
    blocks = len(unet.enc) + len(unet.dec)
    minutes = -(-blocks * _COMPILE_SEC // 60)
    yield (
        f"Compiling {blocks} blocks in the first iteration: about {minutes:.0f} min (a rough estimate), less with code"
        f" of an earlier run in {compiled_code_dir()}."
    )


def farewell(ended: Ended, command: str) -> str:
    """Return why a session ended before its run, and how to continue: with `command`."""
    at = f"at {format_kimg(ended.nimg)} kimg"
    again = f"To continue: {command}"
    match ended.cause:
        case Cause.NONFINITE:
            return (
                f"Stopped {at}. {ended.explanation}\nSettings that help: a lower --lr or --ls, --fp16=False, a longer"
                " --rampup. If the newest training-state has bad weights, remove it to continue from the one before.\n"
                "--on-nonfinite=continue trains on in any case."
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


def status_line(stats: dict[str, float], texts: dict[str, str]) -> str:
    """Return a record of stats.jsonl as one line, with scores and the names of the best snapshots."""
    scores = [f"{key.removeprefix(_METRICS)} {value:.4g}" for key, value in stats.items() if key.startswith(_METRICS)]
    best = [
        f"{key.removeprefix(_METRICS).replace('_', ' ', 1)}: {name}"
        for key, name in texts.items()
        if key.startswith(f"{_METRICS}best_")
    ]
    # Short enough for a terminal of 110 columns on a CPU.
    return " ".join(
        [
            f"kimg {format_kimg(round(stats['Progress/kimg'] * 1e3)):<5s}",
            f"time {' '.join(format_elapsed(stats['Timing/total_sec']).split()[:2]):<6s}",
            f"sec/tick {_digits(stats['Timing/sec_per_tick']):<4s}",
            f"sec/kimg {_digits(stats['Timing/sec_per_kimg']):<4s}",
            f"maintenance {stats['Timing/maintenance_sec']:.1f}",
            f"cpumem {stats['Resources/cpu_mem_gb']:.1f}",
            f"gpumem {stats['Resources/peak_gpu_mem_gb'] or 0:.3g}",
            f"reserved {stats['Resources/peak_gpu_mem_reserved_gb'] or 0:.3g}",
            f"loss {stats['Loss/loss']:.4f}",
            *scores,
            *best,
        ]
    )


def _digits(seconds: float) -> str:
    """Three digits: 0.05, 1.25, 12.5, 125."""
    return f"{seconds:.{2 if seconds < 9.995 else 1 if seconds < 99.95 else 0}f}"
