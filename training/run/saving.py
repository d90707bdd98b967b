"""The checkpoints and network files of a run: taken between two iterations, written while the next ones compute.

One generation of files is on its way at a time: what was taken after one iteration. The next one waits for it. So there
is one copy of the training state in the host's memory, and a disk that is too slow shows as maintenance time.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib.background import BackgroundWriter, Write
from dnnlib.disk import DiskFull, write_error
from dnnlib.errors import ConfigError
from torch_utils.checkpoints.checkpoint import checkpoint_bytes, remove_older, save_checkpoint
from torch_utils.checkpoints.host_copy import HostCopy, on_host
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.config import TrainingConfig
from training.run.batch_condition import recorded_condition
from training.run.label_dropout import recorded_labels
from training.run.run_folder import RunFolder
from training.run.state import TrainingState
from training.snapshot import Snapshot, save_snapshot

_HEARTBEAT_SEC = 2.0  # between signs of life while something is waited for
_ADVICE = "; earlier files are as they were: make room and repeat the command, or give --on-disk-full=wait"
_SNAPSHOT_BYTES = 1 << 20  # what a network file has beside its tensors, at most


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Files were written; every process sees the event, the main one wrote them.

    Training may have gone on since, from `nimg`, where they were taken.
    """

    nimg: int
    paths: list[Path]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line that the user should see; in the main process."""

    text: str


class RunSaver:
    """Writes the files of a run.

    Every process calls the methods, in the same order. The generators wait, where they do, and yield what was saved
    since the last call. A file that cannot be written raises ConfigError: in a single process at the next call, in
    several at the next one that all of them make together, which are all but `poll`.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, world: World) -> None:
        self._config = config
        self._folder = folder
        self._world = world
        self._writer = BackgroundWriter(
            wait_for_space=config.on_disk_full == "wait", advice=_ADVICE, before=folder.require_held
        )
        self._generation = -1  # images at which the files on their way were taken
        self._expected: list[Saved] = []  # what the main process is about to save, in the others
        self._state_copy = HostCopy()
        self._net_copies = [HostCopy() for _ in config.ema_stds]

    def prepare(self, state: TrainingState, data: dict[str, Any]) -> None:
        """Get the memory for copies of the networks and of the checkpoint's `data`, as far as files are to come."""
        config = self._config
        if not (config.background_saves and self._world.is_main):
            return
        if config.checkpoint:
            self._state_copy.reserve(data)
        if config.snapshot:
            for (net, _), copy in zip(state.ema.get(), self._net_copies, strict=True):
                copy.reserve(net.state_dict(), dtype=torch.float16)

    def save_snapshots(self, state: TrainingState) -> Iterator[Saved | Notice]:
        """Write one network file for each tracked EMA length and format."""
        yield from self._begin(state.nimg)
        config = self._config
        extensions = [name for name in ("pkl", "safetensors") if config.snapshot_format in (name, "both")]
        writes = []
        for (net, suffix), std, copy in zip(
            state.averages(main_only=True), config.ema_stds, self._net_copies, strict=True
        ):
            tensors = net.state_dict()
            if self._world.is_main:
                tensors = self._on_host(tensors, copy, torch.float16)
            num_bytes = sum(value.numel() * 2 for value in tensors.values()) + _SNAPSHOT_BYTES
            for extension in extensions:
                path = self._folder.snapshot_path(state.nimg, suffix, extension)
                work = partial(_write_snapshot, self._snapshot(state, net, std), tensors, copy)
                writes.append(Write(path=path, num_bytes=num_bytes, work=work))
        yield from self._submit(writes)

    def save_checkpoint(self, nimg: int, data: dict[str, Any]) -> Iterator[Saved | Notice]:
        """Write `data` as the checkpoint at `nimg` images, and remove those that are too old then."""
        if self._config.shards_over(self._world.size):
            yield from self._save_in_parts(nimg, data)
            return
        yield from self._begin(nimg)
        if self._world.is_main:
            data = self._on_host(data, self._state_copy, None)
        path = self._folder.checkpoint_path(nimg)
        work = partial(self._write_checkpoint, data)
        yield from self._submit([Write(path=path, num_bytes=checkpoint_bytes(data), work=work)])

    def _save_in_parts(self, nimg: int, data: dict[str, Any]) -> Iterator[Saved | Notice]:
        """Have each process write its part of `data`, while nothing else goes on."""
        from torch_utils.checkpoints.sharded import save_sharded  # slow to import

        yield from self.settle()
        path, told = self._folder.checkpoint_path(nimg, sharded=True), False
        while True:
            on_main(self._world, self._folder.require_held)
            try:
                save_sharded(path, data, self._world)
                break
            except OSError as error:  # the same in every process
                failure = write_error(path, error)
                full = isinstance(failure, DiskFull)
                if not full or self._config.on_disk_full != "wait":
                    raise type(failure)(f"{failure}{_ADVICE if full else ''}") from error
                if self._world.is_main and not told:
                    yield Notice(text=f"{failure}; waiting for room.")
                told = True
                time.sleep(_HEARTBEAT_SEC)
        if self._world.is_main:
            self._remove_older(path)
        yield Saved(nimg=nimg, paths=[path])

    def poll(self) -> Iterator[Saved | Notice]:
        """What has happened meanwhile, without waiting for anything or anyone."""
        notes, finished = self._writer.news()
        yield from (Notice(text=text) for text in notes)
        yield from (write.tag for write in finished if write.tag is not None)
        if self._world.size == 1 and self._writer.failure is not None:
            raise self._writer.failure

    def check(self) -> None:
        """Raise in every process if something could not be written."""
        self._share(True)

    def settle(self) -> Iterator[Saved | Notice]:
        """Wait until everything is written."""
        settled = False
        while not settled:
            # Not for longer at a time: the other processes' patience is bounded, a full disk's emptying is not.
            done = self._writer.wait(_HEARTBEAT_SEC)
            news = list(self.poll())
            settled = self._share(done)
            yield from news  # after the exchange, so that a caller who leaves at an event is not ahead of the others
        expected, self._expected = self._expected, []
        yield from expected

    def close(self) -> None:
        """Wait until everything is written, whatever the other processes do."""
        self._writer.wait()
        if self._writer.failure is not None and sys.exc_info()[0] is None:
            raise self._writer.failure

    def _share(self, done: bool) -> bool:
        """The main process's `done`, in every process, or its failure."""
        failure = self._writer.failure
        done, text = self._world.all_gather_objects((done, None if failure is None else str(failure)))[0]
        if failure is not None:
            raise failure
        if text is not None:
            raise ConfigError(text)
        return done

    def _begin(self, nimg: int) -> Iterator[Saved | Notice]:
        """Wait for files that were taken at another time than after `nimg` images."""
        if nimg != self._generation:
            yield from self.settle()
        self._generation = nimg

    def _submit(self, writes: list[Write]) -> Iterator[Saved | Notice]:
        """Have the files written that are one event."""
        saved = Saved(nimg=self._generation, paths=[write.path for write in writes])
        if self._world.is_main:
            for write in writes[:-1]:
                self._writer.submit(write)
            last = writes[-1]
            self._writer.submit(Write(path=last.path, num_bytes=last.num_bytes, work=last.work, tag=saved))
        else:
            self._expected.append(saved)
        if not self._config.background_saves:
            yield from self.settle()

    def _on_host(self, data: Any, copy: HostCopy, dtype: torch.dtype | None) -> Any:
        """What is to be written. In the foreground nothing changes it meanwhile, so that the CPU's needs no copy."""
        return copy.take(data, dtype=dtype) if self._config.background_saves else on_host(data, dtype=dtype)

    def _write_checkpoint(self, data: dict[str, Any], path: Path) -> None:
        self._state_copy.wait()
        save_checkpoint(path, data)
        self._remove_older(path)

    def _remove_older(self, path: Path) -> None:
        if self._config.keep_checkpoints:
            paths = self._folder.checkpoints()
            remove_older(paths[: paths.index(path) + 1], keep=self._config.keep_checkpoints)

    def _snapshot(self, state: TrainingState, net: Any, std: float) -> Snapshot:
        return Snapshot(
            net=net,
            encoder=state.encoder,
            dataset_kwargs={
                "class_name": "training.dataset.ImageFolderDataset",
                "path": self._config.data,
                "use_labels": self._config.cond,
                "xflip": self._config.xflip,
            },
            loss_fn=state.loss_fn,
            nimg=state.nimg,
            ema_std=std,
            info={
                "batch": self._config.batch,
                "seed": self._config.seed,
                **recorded_condition(self._config),
                **recorded_labels(self._config),
            },
        )


def _write_snapshot(snapshot: Snapshot, tensors: dict[str, torch.Tensor], copy: HostCopy, path: Path) -> None:
    copy.wait()
    save_snapshot(snapshot, path, tensors=tensors)
