"""The training run as a sequence of events; the caller prints, and owns the progress bar.

Source: Karras et al., arXiv 2312.02696, Section 2 and Appendix B.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils import distributed
from torch_utils.checkpoints import read_whole
from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.training_stats import RunningMeans
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.loss import EDM2Loss
from training.run.resuming import find_resumption, require_same, tick_of
from training.run.run_data import batches, check_dataset, load_encoder, open_dataset
from training.run.run_folder import RunFolder
from training.run.run_metrics import TrainingMetrics
from training.run.run_samples import RunSamples
from training.run.saving import Notice, RunSaver, Saved
from training.run.session import Cause, Clock, Ended, Session
from training.run.state import TrainingState
from training.run.update import learning_rate_schedule

__all__ = [
    "Cause",
    "EDM2Loss",
    "Ended",
    "Iteration",
    "Notice",
    "Sampled",
    "Saved",
    "Status",
    "TrainingRun",
    "learning_rate_schedule",
    "open_dataset",
]


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One optimizer step was taken; `nimg` images have been seen."""

    nimg: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """A status interval has ended, or the metrics were computed. `stats` and `texts` have the keys of stats.jsonl."""

    nimg: int
    stats: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A sample grid was drawn. Every process sees the event; the main one wrote the file."""

    nimg: int
    path: Path


Event = Iteration | Status | Saved | Sampled | Notice | Ended


@dataclass(frozen=True, kw_only=True)
class Due:
    """Work that follows an iteration."""

    status: bool  # a line of stats.jsonl
    snapshot: bool
    samples: bool
    metrics: bool
    checkpoint: bool
    end: Ended | None  # of the session


class TrainingRun:
    """A run in a folder, from its newest checkpoint on: iterate over it to train. Its length is the iterations left.

    `dataset` is the opened data set, checked by `check_dataset`; None opens and checks that of `config`.
    """

    def __init__(
        self, config: TrainingConfig, folder: RunFolder, *, world: World, dataset: ImageDataset | None = None
    ) -> None:
        self.config = config
        self.folder = folder
        self.world = world
        if dataset is None:
            dataset = open_dataset(config)
            check_dataset(config, dataset)
        self.dataset = dataset
        config.share_of(world.size)
        resumption = find_resumption(folder, world)
        self.resumed_from, self.notes = resumption.path, resumption.notes
        resumed = self.resumed_from is not None
        require_same(world, config, dataset, resumed_from=self.resumed_from.name if self.resumed_from else "")
        encoder = load_encoder(config, dataset, folder, world, resumed=resumed)
        self.state = TrainingState(config, dataset, world, resumed=resumed, encoder=encoder)
        self._means = RunningMeans(world)
        self._saver = RunSaver(config, folder, world)
        if resumed:
            self.state.load_state_dict(resumption.data, source=str(self.resumed_from))
            self._means.load_state_dict(read_whole(resumption.data.get("stats", {})))
        self._clock = Clock(tick_of(resumption.data, nimg=self.state.nimg, elapsed_sec=self.state.elapsed_sec))
        self.metrics = self.samples = None
        if config.metrics is not None:
            self.metrics = TrainingMetrics(config.metrics, self.state, dataset, folder)
        if config.samples is not None:
            self.samples = RunSamples(config.samples, self.state, dataset, folder)
        self._data = ExitStack()  # what reads the data, while it does
        self._watches = config.monitor or config.on_nonfinite == "stop"

    def close(self) -> None:
        """End the data workers, wait for files under way, and release the other processes.

        Call this before the `close` of the World, also after an exception.
        """
        with closing(self.state), closing(self._saver), self._data:
            pass

    def __len__(self) -> int:
        return max(-(-(self.config.duration - self.state.nimg) // self.config.batch), 0)

    def __iter__(self) -> Iterator[Event]:
        session = Session(self.config, self.world, nimg=self.state.nimg)
        self._clock.start(self.state.elapsed_sec)
        self._report_progress()
        with self._data, numerics(cudnn_benchmark=self.config.bench, precision=self.config.network.precision):
            end = session.before_start(self.state.nimg) if len(self) else None
            if end is None:
                yield from self._events(session)
            else:
                yield end
        session.close()

    def _events(self, session: Session) -> Iterator[Event]:
        state, saver = self.state, self._saver
        data = self._data.enter_context(closing(batches(self.config, self.dataset, self.world, start=state.nimg)))
        for index in range(len(self)):
            self._step(*next(data))
            yield Iteration(nimg=state.nimg)
            yield from saver.poll()
            if index == 0:  # the optimizer has all its tensors after a step
                saver.prepare(state, self._checkpoint())
            end, stats = self._collect(session)
            working_since = self._clock.elapsed()
            due = self._due(end)
            if due.snapshot:
                yield from saver.save_snapshots(state)
            if due.samples:
                yield self._draw()
            if due.metrics:
                yield from saver.settle()  # the best snapshot can be named only once it is written
            if due.status:
                yield self._status(stats, measure=due.metrics)
            if due.checkpoint and self._worth_keeping(session):
                yield from self._save_checkpoint()
            if due.end is not None:
                yield from saver.settle()
                yield due.end
                return
            self._clock.maintenance_sec += self._clock.elapsed() - working_since
        yield from saver.settle()

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Train on a batch, and watch gradients and activations if a status line follows."""
        state = self.state
        if self._watches and self._reports(state.nimg + self.config.batch):
            state.monitor.arm()
        learning_rate = state.learning_rate
        self._means.add("Loss/loss", state.step(images, labels))
        self._means.add("Loss/learning_rate", torch.full([], learning_rate, device=self.world.device))

    def _collect(self, session: Session) -> tuple[Ended | None, dict[str, float]]:
        """Return why the session ends after this iteration, and the statistics if a status line is due.

        The order matters: all processes exchange their requests to end first, since several learn of them an iteration
        late; then they learn of files that could not be written, before anybody waits for the device. `collect` of the
        means waits for it, so the time taken afterwards is that of finished work.
        """
        state = self.state
        end, stats = session.after_iteration(state.nimg), {}
        if state.nimg >= self.config.duration:
            end = None
        reports = self._reports(state.nimg)
        if reports:
            self._saver.check()
            stats = self._means.collect()
        state.elapsed_sec = self._clock.elapsed()
        if reports:
            stats |= self._clock.end_tick(state.nimg, state.elapsed_sec, self.world.device)
            if self._watches:
                stats |= state.monitor.collect(state.loss_fn)
                end = session.after_status(state.nimg, stats["Loss/loss"], state.monitor.lost) or end
            self._report_progress()
        return end, stats

    def _due(self, end: Ended | None) -> Due:
        """Return what follows the iteration just taken, which is the session's last if there is an `end`."""
        config, nimg = self.config, self.state.nimg
        # After a signal the scheduler may kill us soon: skip metrics and sample grids.
        hurry = end is not None and end.cause in (Cause.SIGNAL, Cause.SUSPEND)
        metrics = self.metrics is not None and self._crosses(self.metrics.every, nimg) and not hurry
        is_final = end is not None and end.is_final and config.snapshot > 0
        snapshot = self._crosses(config.snapshot, nimg) or metrics or is_final
        # Save a final checkpoint even with --checkpoint=0, or the one we resumed from would look like the newest.
        replaces = nimg >= config.duration and self.resumed_from is not None
        return Due(
            status=self._reports(nimg),
            snapshot=snapshot,
            samples=snapshot and self.samples is not None and not hurry,
            metrics=metrics,
            checkpoint=self._crosses(config.checkpoint, nimg) or replaces or end is not None,
            end=end,
        )

    def _reports(self, nimg: int) -> bool:
        """Return whether a line of stats.jsonl follows the iteration that ends at `nimg`."""
        every = 0 if self.metrics is None else self.metrics.every
        return self._crosses(self.config.status, nimg) or self._crosses(every, nimg)

    def _crosses(self, interval: int, nimg: int) -> bool:
        """Return whether the iteration that ends at `nimg` crosses a multiple of `interval` images, or is the last."""
        return interval > 0 and (self.config.crosses(interval, nimg) or nimg >= self.config.duration)

    def _draw(self) -> Sampled | Notice:
        """Draw a sample grid. One that cannot be written, on a full disk, does not end the run."""
        assert self.samples is not None
        try:
            path = self.samples.draw(self.state.averages(), self.state.nimg)
        except ConfigError as error:
            return Notice(text=f"{error}; continuing without this sample grid.")
        return Sampled(nimg=self.state.nimg, path=path)

    def _status(self, stats: dict[str, float], *, measure: bool) -> Status:
        """Return the event that reports `stats`; with `measure`, also the metrics of the snapshots just taken."""
        if self.metrics is None or not measure:
            return Status(nimg=self.state.nimg, stats=stats)
        measured = self.metrics.measure(self.state.averages(), self.state.nimg)
        return Status(nimg=self.state.nimg, stats=stats | measured.stats, texts=measured.texts)

    def _worth_keeping(self, session: Session) -> bool:
        """Return whether the run can continue from its weights: not if some are infinite or NaN."""
        if not session.in_doubt:
            return True
        finite = torch.stack([param.detach().isfinite().all() for param in self.state.local.parameters()]).all()
        return all(self.world.all_gather_objects(bool(finite)))

    def _report_progress(self) -> None:
        if self.world.is_main:
            distributed.update_progress(self.state.nimg, self.config.duration)

    def _save_checkpoint(self) -> Iterator[Saved | Notice]:
        self.state.elapsed_sec = self._clock.elapsed()
        yield from self._saver.save_checkpoint(self.state.nimg, self._checkpoint())

    def _checkpoint(self) -> dict[str, Any]:
        """Return the contents of a checkpoint. Every process calls this."""
        nimg, elapsed_sec = self._clock.tick
        run = {"ranks": self.world.size, "tick": {"cur_nimg": nimg, "total_elapsed_time": elapsed_sec}}
        return self.state.state_dict() | {"stats": self._means.state_dict(), "run": run}
