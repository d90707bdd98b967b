"""The checkpoints and network files of a run: copied between two iterations, written while the next ones compute.

One generation of files is under way at a time: those copied after the same iteration. The next generation waits for it.
So the host's memory holds one copy of the training state, and a slow disk shows as maintenance time.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib.background import BackgroundWriter, Write
from dnnlib.disk import DiskFull, write_error
from torch_utils.checkpoints.checkpoint import checkpoint_bytes, remove_older, save_checkpoint
from torch_utils.checkpoints.host_copy import HostCopy, on_host
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.config import TrainingConfig
from training.loss import EDM2Loss
from training.run.run_folder import RunFolder
from training.run.state import TrainingState
from training.snapshot import Snapshot, save_snapshot

_HEARTBEAT_SEC = 2.0  # between signs of life while something is waited for
_ADVICE = "; earlier files are unchanged: make room and repeat the command, or give --on-disk-full=wait"
_SNAPSHOT_BYTES = 1 << 20  # upper bound for a network file without its tensors


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Files with the state at `nimg` images were written, perhaps some iterations later.

    Every process sees the event; the main one wrote them.
    """

    nimg: int
    paths: list[Path]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line for the user, in the main process."""

    text: str


class RunSaver:
    """Writes the files of a run.

    Every process calls the methods, in the same order. The generators yield what was saved since the last call. A file
    that cannot be written raises ConfigError: in a single process at the next call; with several, in all of them at the
    next call other than `poll`, which does not exchange anything.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, world: World) -> None:
        self._config = config
        self._folder = folder
        self._world = world
        self._writer = BackgroundWriter(
            wait_for_space=config.on_disk_full == "wait", advice=_ADVICE, before=folder.require_held
        )
        self._generation = -1  # images at which the files under way were copied
        self._expected: list[Saved] = []  # in other processes: what the main process is saving
        self._state_copy = HostCopy()
        self._net_copies = [HostCopy() for _ in config.ema_stds]

    def prepare(self, state: TrainingState, data: dict[str, Any]) -> None:
        """Allocate memory for copies of the networks and of the checkpoint's `data`, for the files that will come."""
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
                path = self._folder.snapshot_path(config, state.nimg, suffix, extension)
                work = partial(_write_snapshot, self._snapshot(state, net, std), tensors, copy)
                writes.append(Write(path=path, num_bytes=num_bytes, work=work))
        yield from self._submit(writes)

    def save_checkpoint(self, nimg: int, data: dict[str, Any]) -> Iterator[Saved | Notice]:
        """Write `data` as the checkpoint at `nimg` images, then delete those beyond --keep-checkpoints."""
        if self._config.shards_over(self._world.size):
            yield from self._save_sharded(nimg, data)
            return
        yield from self._begin(nimg)
        if self._world.is_main:
            data = self._on_host(data, self._state_copy, None)
        path = self._folder.checkpoint_path(self._config, nimg)
        work = partial(self._write_checkpoint, data)
        yield from self._submit([Write(path=path, num_bytes=checkpoint_bytes(data), work=work)])

    def _save_sharded(self, nimg: int, data: dict[str, Any]) -> Iterator[Saved | Notice]:
        """Let each process write its part of `data`, in the foreground."""
        from torch_utils.checkpoints.sharded import save_sharded  # slow to import

        yield from self.settle()
        path, is_announced = self._folder.checkpoint_path(self._config, nimg, sharded=True), False
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
                if self._world.is_main and not is_announced:
                    yield Notice(text=f"{failure}; waiting for room.")
                is_announced = True
                time.sleep(_HEARTBEAT_SEC)
        if self._world.is_main:
            self._remove_older(path)
        yield Saved(nimg=nimg, paths=[path])

    def poll(self) -> Iterator[Saved | Notice]:
        """Yield news of files under way, without waiting for them or for other processes."""
        notes, finished = self._writer.news()
        yield from (Notice(text=text) for text in notes)
        yield from (write.tag for write in finished if write.tag is not None)
        if self._world.size == 1 and self._writer.failure is not None:
            raise self._writer.failure

    def check(self) -> None:
        """Raise ConfigError in every process if something could not be written."""
        self._share(True)

    def settle(self) -> Iterator[Saved | Notice]:
        """Wait until everything is written."""
        settled = False
        while not settled:
            # Wait briefly and exchange: other processes time out, while a full disk may stay full for long.
            done = self._writer.wait(_HEARTBEAT_SEC)
            news = list(self.poll())
            settled = self._share(done)
            yield from news  # after the exchange, so that a caller who stops at an event is not ahead of the others
        expected, self._expected = self._expected, []
        yield from expected

    def close(self) -> None:
        """Wait until everything is written, without the other processes; while an exception ends the run, no longer
        than the disk has room."""
        failing = sys.exc_info()[0] is not None
        if failing:
            self._writer.give_up()
        self._writer.wait()
        if self._writer.failure is not None and not failing:
            raise self._writer.failure

    def _share(self, done: bool) -> bool:
        """Return the main process's `done` in every process, or raise its failure."""

        def state() -> bool:
            if self._writer.failure is not None:
                raise self._writer.failure
            return done

        return on_main(self._world, state, errors=BaseException)

    def _begin(self, nimg: int) -> Iterator[Saved | Notice]:
        """Wait for files that were copied at another time than after `nimg` images."""
        if nimg != self._generation:
            yield from self.settle()
        self._generation = nimg

    def _submit(self, writes: list[Write]) -> Iterator[Saved | Notice]:
        """Start writing the files of one event."""
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
        """Return `data` to be written. In the foreground nothing changes it meanwhile: CPU tensors are not copied."""
        return copy.take(data, dtype=dtype) if self._config.background_saves else on_host(data, dtype=dtype)

    def _write_checkpoint(self, data: dict[str, Any], path: Path) -> None:
        self._state_copy.wait()
        save_checkpoint(path, data)
        self._remove_older(path)

    def _remove_older(self, path: Path) -> None:
        if self._config.keep_checkpoints:
            paths = self._folder.checkpoints()
            if path in paths:  # or the folder has vanished, as the next write will tell
                remove_older(paths[: paths.index(path) + 1], keep=self._config.keep_checkpoints)

    def _snapshot(self, state: TrainingState, net: Any, std: float) -> Snapshot:
        own_loss = self._config.loss_class
        loss = {"class": own_loss, "arguments": self._config.loss_args or {}}
        return Snapshot(
            net=net,
            encoder=state.encoder,
            dataset_kwargs={
                "class_name": self._config.dataset_class or "training.dataset.ImageFolderDataset",
                "path": self._config.data,
                "use_labels": self._config.cond,
                "xflip": self._config.xflip,
                **({} if self._config.dataset_args is None else {"args": self._config.dataset_args}),
            },
            loss_fn=cast(EDM2Loss, state.loss_fn) if own_loss is None else None,
            nimg=state.nimg,
            ema_std=std,
            info={
                "batch": self._config.batch,
                "seed": self._config.seed,
                # Tools learn from these that a network takes a conditioning image, or also works without labels.
                **({} if own_loss is None else {"loss": loss}),
                **({} if state.condition is None else {"condition": str(state.condition)}),
                **({} if state.class_names is None else {"classes": state.class_names}),
                **{name: value for name in ("balance", "label_dropout") if (value := getattr(self._config, name))},
            },
        )


def _write_snapshot(snapshot: Snapshot, tensors: dict[str, torch.Tensor], copy: HostCopy, path: Path) -> None:
    copy.wait()
    save_snapshot(snapshot, path, tensors=tensors)
