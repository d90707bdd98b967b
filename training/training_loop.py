"""The training run as a sequence of events; the caller prints, and owns the progress bar.

Source: Karras et al., arXiv 2312.02696, Section 2 and Appendix B.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib.atomic import write_text
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder
from torch_utils import distributed
from torch_utils.checkpoints.stored_checkpoint import read_whole
from torch_utils.cuda.transfer import on_device
from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.processes.stopping import prepare_worker, spared_children
from torch_utils.training_stats import RunningMeans
from training.config import TrainingConfig
from training.dataset.image_folder import BatchReader, ImageFolderDataset
from training.dataset.latents import PUBLISHED_VAE, encoder_entry, measured_encoder, read_encoder_file
from training.encoders import Encoder, StabilityVAEEncoder
from training.loss import EDM2Loss
from training.run.batch_condition import condition_of
from training.run.consistency import require_same
from training.run.label_dropout import check_labels, uses_labels
from training.run.resuming import find_resumption, tick_of
from training.run.run_folder import RunFolder
from training.run.run_metrics import TrainingMetrics
from training.run.run_samples import RunSamples
from training.run.saving import Notice, RunSaver, Saved
from training.run.session import Cause, Ended, Session
from training.run.state import TrainingState, make_encoder
from training.run.streams import BatchPositions, Order
from training.schedule import learning_rate_schedule
from training.streaming.streamed import StreamedDataset, data_order, is_remote

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

# Data sets whose decoded items take no more than this are kept in memory where this process reads them itself.
CACHE_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One optimizer step was taken; `nimg` images have been seen."""

    nimg: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """A status interval has passed, or the metrics were computed. `stats` and `texts` have the keys of stats.jsonl."""

    nimg: int
    stats: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A sample grid was drawn; every process sees the event, the main one wrote the file."""

    nimg: int
    path: Path


Event = Iteration | Status | Saved | Sampled | Notice | Ended


def open_dataset(config: TrainingConfig) -> ImageFolderDataset:
    """The run's data set. Raises ConfigError where it cannot be trained on as `config` says."""
    if is_remote(config.data):
        dataset: ImageFolderDataset = StreamedDataset(
            config.data,
            use_labels=uses_labels(config),
            xflip=config.xflip,
            buffer=config.shuffle_images,
            cache_dir=config.data_cache,
            cache_bytes=config.data_cache_size,
        )
    else:
        dataset = ImageFolderDataset(config.data, use_labels=uses_labels(config), xflip=config.xflip)
    check_labels(config, dataset)
    make_encoder(config, dataset)
    condition_of(config, dataset)
    item_bytes = dataset.num_channels * dataset.resolution**2 * (4 if dataset.holds_latents else 1)
    if config.workers == 0 and len(dataset) * item_bytes <= CACHE_BYTES:
        dataset.keep_items()
    return dataset


def load_vae_encoder(
    config: TrainingConfig, dataset: ImageFolderDataset, folder: RunFolder, world: World
) -> Encoder | None:
    """The encoder of a run that encodes its pixels itself, with the VAE loaded; None for another run.

    The statistics of a VAE other than the published one are measured when the run starts, and are kept in its folder.
    """
    if config.vae is None:
        return None
    encoder = make_encoder(config, dataset)
    assert isinstance(encoder, StabilityVAEEncoder)
    if config.vae != PUBLISHED_VAE:
        if world.is_main and not folder.encoder_file.is_file():
            make_folder(folder.path)
            write_text(folder.encoder_file, json.dumps(encoder_entry(measured_encoder(encoder, dataset, world.device))))
        world.barrier()
        encoder = read_encoder_file(folder.encoder_file)
    encoder.init(world.device)
    return encoder


class TrainingRun:
    """A run in a folder, from its newest checkpoint on: iterate over it to train. Its length is the iterations left."""

    def __init__(self, config: TrainingConfig, folder: RunFolder, *, world: World) -> None:
        self.config = config
        self.folder = folder
        self.world = world
        self.dataset = open_dataset(config)
        config.share_of(world.size)
        self.metrics = None
        if config.metrics is not None:
            self.metrics = TrainingMetrics(config.metrics, snapshot=config.snapshot, folder=folder, world=world)
        self.samples = None
        if config.samples is not None:
            self.samples = RunSamples(config.samples, ema_stds=config.ema_stds, folder=folder, world=world)
        resumption = find_resumption(folder, world)
        self.resumed_from, self.notes = resumption.path, resumption.notes
        found = "" if self.resumed_from is None else self.resumed_from.name
        require_same(world, config, self.dataset, resumed_from=found)
        resumed = self.resumed_from is not None
        encoder = load_vae_encoder(config, self.dataset, folder, world)
        self.state = TrainingState(config, self.dataset, world, resumed=resumed, encoder=encoder)
        self._means = RunningMeans(world)
        self._saver = RunSaver(config, folder, world)
        if self.resumed_from is not None:
            self.state.load_state_dict(resumption.data, source=str(self.resumed_from))
            self._means.load_state_dict(read_whole(resumption.data.get("stats", {})))
        self._tick = tick_of(resumption.data, nimg=self.state.nimg, elapsed_sec=self.state.elapsed_sec)
        if self.metrics is not None:
            self.metrics.prepare(self.state.encoder, self.state.nimg)
            self.metrics.condition_on(self.state.condition, self.dataset)
        if self.samples is not None:
            self.samples.prepare(self.state.encoder)
            self.samples.condition_on(self.state.condition, self.dataset)

    def close(self) -> None:
        """Wait for files on their way, and let go of the other processes. To be called before the World's `close`."""
        try:
            self._saver.close()
        finally:
            self.state.close()

    def __len__(self) -> int:
        return max(-(-(self.config.duration - self.state.nimg) // self.config.batch), 0)

    def __iter__(self) -> Iterator[Event]:
        session = Session(self.config, self.world, nimg=self.state.nimg)
        with numerics(cudnn_benchmark=self.config.bench, precision=self.config.network.precision):
            yield from self._events(session)
        session.close()

    def _events(self, session: Session) -> Iterator[Event]:
        config, state = self.config, self.state
        batches = self._batches()
        session_start = time.monotonic()
        elapsed_before, maintenance_sec = state.elapsed_sec, 0.0
        tick_nimg, tick_start = self._tick[0], session_start - (elapsed_before - self._tick[1])
        self._progress()
        if state.nimg < config.duration and (end := session.before_start(state.nimg)) is not None:
            yield end
            return
        prepared = False
        while state.nimg < config.duration:
            images, labels = next(batches)
            learning_rate = state.learning_rate
            watches = config.monitor or config.on_nonfinite == "stop"
            if watches and self._reports(state.nimg + config.batch):
                state.monitor.arm()
            self._means.add("Loss/loss", state.step(images, labels))
            self._means.add("Loss/learning_rate", torch.full([], learning_rate, device=self.world.device))
            yield Iteration(nimg=state.nimg)
            yield from self._saver.poll()
            if not prepared:  # the optimizer has all its tensors after a step
                self._saver.prepare(state, self._checkpoint())
                prepared = True

            end = session.after_iteration(state.nimg)
            finished = state.nimg >= config.duration
            end = None if finished else end
            measures = self.metrics is not None and self._due(self.metrics.every)
            reports = self._reports(state.nimg)
            if reports:
                self._saver.check()
                stats = self._means.collect()  # waits for the device, so that the time below is that of finished work
            now = time.monotonic()
            state.elapsed_sec = elapsed_before + now - session_start
            if reports:
                stats |= self._timing(now - tick_start - maintenance_sec, state.nimg - tick_nimg, maintenance_sec)
                tick_start, tick_nimg, maintenance_sec = now, state.nimg, 0.0
                if watches:
                    stats |= state.monitor.collect(state.loss_fn)
                    end = session.after_status(state.nimg, stats["Loss/loss"], state.monitor.lost) or end
                self._progress()
            # Who is told to go may have no time for pictures.
            hurries = end is not None and end.cause in (Cause.SIGNAL, Cause.SUSPEND)
            measures = measures and not hurries
            if self._due(config.snapshot) or measures or (end is not None and end.is_final and config.snapshot):
                yield from self._saver.save_snapshots(state)
                if self.samples is not None and not hurries:
                    yield self._draw(self.samples)
            if measures:
                yield from self._saver.settle()  # the best snapshot can be named only when it is there
            if reports:
                yield self._status(stats, measures=measures)
            # Also with --checkpoint=0: what the run went on from is not to remain as if it were the newest.
            wanted = self._due(config.checkpoint) or (finished and self.resumed_from is not None)
            if (wanted or end is not None) and self._worth_keeping(session):
                state.elapsed_sec = elapsed_before + time.monotonic() - session_start
                self._tick = tick_nimg, elapsed_before + tick_start + maintenance_sec - session_start
                yield from self._save_checkpoint()
            if end is not None:
                yield from self._saver.settle()
                yield end
                return
            maintenance_sec += time.monotonic() - now
        yield from self._saver.settle()

    def _draw(self, samples: RunSamples) -> Sampled | Notice:
        """A new sample grid. One that cannot be written, on a full disk, is no reason to end a run."""
        try:
            path = samples.draw(self.state.averages(), self.state.encoder, self.state.nimg)
        except ConfigError as error:
            return Notice(text=f"{error}; going on without this sample grid.")
        return Sampled(nimg=self.state.nimg, path=path)

    def _reports(self, nimg: int) -> bool:
        """Whether there is a line for stats.jsonl after the iteration that ends at `nimg`."""
        every = 0 if self.metrics is None else self.metrics.every
        return self._due(self.config.status, nimg) or self._due(every, nimg)

    def _progress(self) -> None:
        if self.world.is_main:
            distributed.update_progress(self.state.nimg, self.config.duration)

    def _worth_keeping(self, session: Session) -> bool:
        """Whether the run can go on from where it is: not from weights that are no numbers."""
        if not session.in_doubt:
            return True
        finite = torch.stack([param.detach().isfinite().all() for param in self.state.part.parameters()]).all()
        return all(self.world.all_gather_objects(bool(finite)))

    def _status(self, stats: dict[str, float], *, measures: bool) -> Status:
        """The event that reports `stats`, with metrics if it `measures`: of the snapshots that were just taken."""
        if self.metrics is None or not measures:
            return Status(nimg=self.state.nimg, stats=stats)
        found = self.metrics.measure(self.state.averages(), self.state.encoder, self.state.nimg)
        return Status(nimg=self.state.nimg, stats=stats | found.stats, texts=found.texts)

    def _due(self, interval: int, nimg: int | None = None) -> bool:
        """Whether the iteration that ended at `nimg`, by default the one just taken, crossed a multiple of `interval`
        images, or was the last one."""
        if interval == 0:
            return False
        nimg = self.state.nimg if nimg is None else nimg
        return nimg // interval > (nimg - self.config.batch) // interval or nimg >= self.config.duration

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of each batch, on the device, from the run's position on."""
        with data_order(self.dataset, self.config.seed, balance=self.config.balance) as order:
            yield from self._batches_in(order)

    def _batches_in(self, order: Order) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        world, device = self.world, self.world.device
        positions = BatchPositions(
            order,
            start=self.state.nimg,
            batch_size=self.config.batch,
            rank=world.rank,
            num_ranks=world.size,
        )
        workers = self.config.workers
        loader = torch.utils.data.DataLoader(
            BatchReader(self.dataset),
            batch_size=None,
            sampler=positions,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=2 if workers else None,
            worker_init_fn=prepare_worker,
        )
        try:
            with spared_children() if workers else contextlib.nullcontext():
                batches = iter(loader)
            yield from on_device(batches, device)
        except ConfigError as error:
            # A worker's exception arrives with the worker's traceback as its message, ending in the original.
            raise ConfigError(str(error).rpartition(f"{ConfigError.__name__}: ")[2].strip()) from None

    def _timing(self, tick_sec: float, tick_nimg: int, maintenance_sec: float) -> dict[str, float]:
        """The keys of stats.jsonl about progress, time and memory."""
        on_cuda = self.world.device.type == "cuda"
        stats = {
            "Progress/kimg": self.state.nimg / 1e3,
            "Timing/total_sec": self.state.elapsed_sec,
            "Timing/sec_per_tick": tick_sec,
            "Timing/sec_per_kimg": tick_sec / tick_nimg * 1e3,
            "Timing/maintenance_sec": maintenance_sec,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
            "Resources/peak_gpu_mem_gb": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0,
            "Resources/peak_gpu_mem_reserved_gb": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else 0.0,
            "timestamp": time.time(),
        }
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        return stats

    def _save_checkpoint(self) -> Iterator[Saved | Notice]:
        yield from self._saver.save_checkpoint(self.state.nimg, self._checkpoint())

    def _checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds. Every process calls this."""
        nimg, elapsed_sec = self._tick
        run = {"ranks": self.world.size, "tick": {"cur_nimg": nimg, "total_elapsed_time": elapsed_sec}}
        return self.state.state_dict() | {"stats": self._means.state_dict(), "run": run}
