"""The processes of one run: the number and device of this one, and communication with the others.

One process on a CPU is the normal case. Under torchrun, or any launcher that sets its environment variables, the same
code runs over NCCL on GPUs and over gloo elsewhere.
"""

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from dnnlib.errors import ConfigError
from dnnlib.orphans import end_with_launcher
from torch_utils.processes import failures, stopping
from torch_utils.processes.data_workers import worker_errors

T = TypeVar("T")

# Training calls the four functions below by their names in this module, so that a cluster with its own protocol can
# replace them: `distributed.should_suspend = mine` before the run starts, or by editing them here. docs/clusters.md has
# an example.


def should_stop() -> bool:
    """Return True to end the run for good, as if --duration were reached: with last snapshots and a checkpoint.

    Every process calls this after every iteration, so it should take microseconds. If one returns True, all end after
    the same iteration. Always False unless the function is replaced.
    """
    return False


def should_suspend() -> bool:
    """Return True to suspend the run: it saves a checkpoint and ends, and the same command continues it.

    Called like `should_stop`. True after `request_suspend` or, under `stopping.handled_signals`, after a signal.
    """
    return stopping.REQUEST.asked


def request_suspend() -> None:
    """Ask to suspend the run after the current iteration; any thread of one process may call this."""
    stopping.REQUEST.ask()


def update_progress(cur: int, total: int) -> None:
    """Report the progress of the run: `cur` of `total` images. Does nothing unless it is replaced.

    The main process calls this at the start, at every status interval and at the end.
    """


# Names of the published code, for scripts that import them.


def get_rank() -> int:
    """Return the number of this process among all of the run, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes of the run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def print0(*args: Any, **kwargs: Any) -> None:
    """Print in the main process only."""
    if get_rank() == 0:
        print(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Key-value store of all processes, if `init` made the group.
    store: torch.distributed.Store | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            torch.distributed.barrier()

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place, and return it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        """Leave the process group, together with all others: gloo may abort a process whose peer has left.

        Call this only if no process has failed.
        """
        if self.size > 1 and torch.distributed.is_initialized():
            self.barrier()  # what was sent has arrived
            self._meet("leaves", range(self.size))
            torch.distributed.destroy_process_group()
            self._meet("left", range(self.size) if self.is_main else ())  # the main process may hold the store

    def _meet(self, event: str, ranks: Iterable[int]) -> None:
        """Tell all processes of an event, and wait until those of `ranks` have told of theirs."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the process that held the store is gone
                self.store.set(f"{event}/{self.rank}", "")
                self.store.wait([f"{event}/{rank}" for rank in ranks])


def resolve_device(name: str | None = None) -> torch.device:
    """Return the device `name` (cpu, cuda, cuda:1, mps); by default the best of this machine: CUDA, MPS, CPU.

    Under torchrun, 'cuda' is this process's own GPU. Raises ConfigError if the device does not exist.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device={name} is not a device; use cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device={name} is not supported; use cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device={name} was asked for, but PyTorch sees no Apple GPU here")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= count:
            raise ConfigError(f"--device={name} needs GPU {index}, but PyTorch sees {count} here")
        device = torch.device("cuda", index)
    return device


def init(device: str | None = None, *, patience_hours: float = 0.5) -> World:
    """Join the run that torchrun's environment variables describe; without them, be the only process.

    `device` as in `resolve_device`. A process that waits for the others longer than `patience_hours` gives up. Call
    `close` on the result before the program ends. Raises ConfigError if the processes don't find each other, or are on
    different kinds of devices.
    """
    resolved = resolve_device(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    _refuse_lone_srun()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=resolved)
    store = None
    if not torch.distributed.is_initialized():
        store = _join(resolved, datetime.timedelta(hours=patience_hours))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank=rank, size=size, device=resolved, store=store)


def _refuse_lone_srun() -> None:
    """Raise ConfigError in a process that srun started next to others, without torchrun to connect them.

    SLURM_NTASKS does not tell: it is also set in the batch script, which is one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise ConfigError(
            f"srun started {tasks} processes that do not know of each other: start one torchrun on each machine"
            " (docs/clusters.md), or set WORLD_SIZE=1 if each is to work alone"
        )


@contextmanager
def joined(device: str | None = None, *, patience_hours: float = 0.5) -> Iterator[World]:
    """Yield the World of `init`, closed after the block; if one process fails in it, all end (see `failures.fail`).

    A process whose torchrun was killed gets SIGTERM. Data workers that were killed are one line.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher("torchrun, which started this process, is gone; this process ends, too.")
    world = init(device, patience_hours=patience_hours)
    try:
        with worker_errors():
            yield world
        world.close()
    except BaseException as error:
        if world.size > 1:
            failures.fail(error, world.rank, world.store)
        raise


def _join(device: torch.device, timeout: datetime.timedelta) -> torch.distributed.Store:
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        # Without these, the others would wait for a process that failed. The first ends a process whose communication
        # fails or times out, the second takes down the communicators of the others.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        os.environ.setdefault("TORCH_NCCL_PROPAGATE_ERROR", "1")
    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    try:
        shared, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        shared.set_timeout(timeout)
        store = _private_store(shared, rank, size, timeout)
        store.set(f"device/{rank}", device.type)
        first = store.get("device/0").decode()
        if first != device.type:
            raise ConfigError(
                f"this process would compute on a device of type {device.type}, the first one of the run on {first};"
                f" give --device={'cpu' if 'cpu' in (first, device.type) else first}"
            )
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (torch.distributed.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the processes of this run do not find each other at {where} within {timeout}: {reason}"
        ) from None
    return store


def _private_store(
    store: torch.distributed.Store, rank: int, size: int, timeout: datetime.timedelta
) -> torch.distributed.Store:
    """Agree on a prefix of `store` that only these processes use.

    torchrun keeps its store when it restarts the processes (seen with PyTorch 2.13). The new ones would read what the
    killed ones left there, such as their addresses, and fail to connect or wait forever. So every process sends a
    unique word, and gets the prefix under that word.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        prefix = store.get(f"welcome/{word}").decode()
        store.set(f"{prefix}/here/{rank}", "")
        return torch.distributed.PrefixStore(prefix, store)
    prefix, missing = word, set(range(1, size))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/here/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):  # of a killed process, perhaps: it does no harm
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", prefix)
        if time.monotonic() > end:
            raise RuntimeError(f"no word from process {', '.join(map(str, sorted(missing)))} of {size}")
        time.sleep(0.01 if missing else 0)
    return torch.distributed.PrefixStore(prefix, store)
