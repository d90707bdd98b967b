"""A session of a training run: its record, its clock, and why it ends before the run does."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib.errors import ConfigError, reason_of
from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.processes import stopping
from torch_utils.processes.together import DelayedMaximum
from training.config import TrainingConfig

SESSIONS_FILE = "sessions.jsonl"


class Cause(IntEnum):
    """Why a session ends; of two causes in the same iteration the larger number counts."""

    SLICE = 1  # --slice images were seen
    SIGNAL = 2  # SIGTERM, SIGINT or SIGUSR1 came
    SUSPEND = 3  # should_suspend
    STOP = 4  # should_stop
    NONFINITE = 5  # loss or gradients stayed infinite or NaN


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The session ends before the run does; a checkpoint was written if there was anything to save."""

    nimg: int
    cause: Cause
    signum: int | None = None  # of SIGNAL
    explanation: str = ""  # of NONFINITE

    @property
    def is_final(self) -> bool:
        """True if the run ends here, not only this session of it."""
        return self.cause == Cause.STOP


class Session:
    """Decides when a session that starts at `nimg` images ends, in the same iteration in all processes.

    A single process ends after the iteration in which it was asked to. Several processes learn of each other's requests
    one iteration late (`DelayedMaximum`), and all end after that one.
    """

    def __init__(self, config: TrainingConfig, world: World, *, nimg: int) -> None:
        self._config = config
        self._world = world
        self._end_nimg = None if config.slice is None else nimg + config.slice
        self._agreement = DelayedMaximum(world)
        self._bad_intervals: list[str] = []  # problems of consecutive status intervals, up to the last one

    def before_start(self, nimg: int) -> Ended | None:
        """Return the end if there is to be no iteration at all. Waits for all processes."""
        return self._ended(max(self._world.all_gather_objects(_request())), nimg)

    def after_iteration(self, nimg: int) -> Ended | None:
        """Return the end if the iteration just taken was the session's last. Call this once for each iteration."""
        request = self._agreement.exchange(_request())
        if request == 0 and self._end_nimg is not None and nimg >= self._end_nimg:
            return Ended(nimg=nimg, cause=Cause.SLICE)
        return self._ended(request, nimg)

    def after_status(self, nimg: int, loss: float, lost: Sequence[str]) -> Ended | None:
        """Return the end if loss or gradients stayed non-finite for --nonfinite-limit status intervals in a row.

        `loss` is the mean of the interval. `lost` names the parameters whose gradients had no finite element in its
        last iteration.
        """
        problem = "" if abs(loss) < float("inf") else f"the mean loss was {loss}"  # also for NaN
        if lost:
            more = f" and {len(lost) - 1} more parameters" if len(lost) > 1 else ""
            problem += f"{' and ' if problem else ''}the gradient of {lost[0]}{more} had no finite element"
        if not problem:
            self._bad_intervals.clear()
            return None
        self._bad_intervals.append(problem)
        if self._config.on_nonfinite != "stop" or len(self._bad_intervals) < self._config.nonfinite_limit:
            return None
        explanation = (
            f"In each of the last {len(self._bad_intervals)} status intervals something was not finite; in the last"
            f" one, {problem}."
        )
        return Ended(nimg=nimg, cause=Cause.NONFINITE, explanation=explanation)

    @property
    def in_doubt(self) -> bool:
        """True if something was not finite in the last status interval, which may stop the run later."""
        return self._config.on_nonfinite == "stop" and bool(self._bad_intervals)

    def close(self) -> None:
        """Wait for exchanges under way between the processes, and clear the request that was fulfilled."""
        self._agreement.settle()
        stopping.REQUEST.clear()

    def _ended(self, request: int, nimg: int) -> Ended | None:
        if request == 0:
            return None
        cause, signum = divmod(request, _SIGNALS_END)
        return Ended(nimg=nimg, cause=Cause(cause), signum=signum or None)


_SIGNALS_END = 256  # above the numbers of all signals


def _request() -> int:
    """Return this process's reason to end the session as one comparable number: cause and signal; 0 = none."""
    if distributed.should_stop():
        return Cause.STOP * _SIGNALS_END
    if not distributed.should_suspend():
        return 0
    signum = stopping.REQUEST.signum
    if signum is None:
        return Cause.SUSPEND * _SIGNALS_END
    return Cause.SIGNAL * _SIGNALS_END + signum


class Clock:
    """Training time of a run, over all its sessions, and of the status interval ("tick") that is under way.

    tick:  images and seconds of training at which the status interval began, as the checkpoint has them.
    """

    def __init__(self, tick: tuple[int, float]) -> None:
        self.maintenance_sec = 0.0  # of the tick: saving, sampling, measuring
        self._start = 0.0
        self._tick_nimg, self._tick_sec = tick

    def start(self, elapsed_sec: float) -> None:
        """Count time from now on, after `elapsed_sec` seconds of training before."""
        self._start = time.monotonic() - elapsed_sec  # as if the run had been one session

    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return time.monotonic() - self._start

    @property
    def tick(self) -> tuple[int, float]:
        """Images and seconds for the checkpoint. Maintenance within the tick counts as time before it."""
        return self._tick_nimg, self._tick_sec + self.maintenance_sec

    def end_tick(self, nimg: int, elapsed_sec: float, device: torch.device) -> dict[str, float]:
        """Begin a new tick; return the keys of stats.jsonl about progress, time and memory of the one that ends."""
        on_cuda = device.type == "cuda"
        tick_sec = elapsed_sec - self._tick_sec - self.maintenance_sec
        stats = {
            "Progress/kimg": nimg / 1e3,
            "Timing/total_sec": elapsed_sec,
            "Timing/sec_per_tick": tick_sec,
            "Timing/sec_per_kimg": tick_sec / (nimg - self._tick_nimg) * 1e3,
            "Timing/maintenance_sec": self.maintenance_sec,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
            "Resources/peak_gpu_mem_gb": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0,
            "Resources/peak_gpu_mem_reserved_gb": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else 0.0,
            "timestamp": time.time(),
        }
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._tick_nimg, self._tick_sec, self.maintenance_sec = nimg, elapsed_sec, 0.0
        return stats


def record_session(folder: Path, *, nimg: int, command: str, world: World) -> None:
    """Append a line to sessions.jsonl about the session that begins at `nimg` images, for the report."""
    device = world.device
    entry: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "nimg": nimg,
        "command": command,
        "processes": world.size,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        with open(folder / SESSIONS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder / SESSIONS_FILE} cannot be written: {reason_of(error)}") from None
