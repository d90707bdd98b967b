"""The worker processes of a DataLoader: apart from the terminal's signals, and ended on every way out."""

import atexit
import contextlib
import functools
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch.utils.data

from dnnlib.errors import ConfigError
from dnnlib.orphans import end_children, end_with_parent
from torch_utils.processes.stopping import SIGNALS, spared_children

T = TypeVar("T")

# A worker is killed by this signal if its memory is less than promised, or PyTorch asks for it in vain.
_SIGNS_OF_LITTLE_SHARED_MEMORY = ("killed by signal: Bus error", "unable to allocate shared memory")
# PyTorch's own texts for a worker that is gone.
_DEATH = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is (killed by signal: [^.]*)|exited unexpectedly)"
)


@contextlib.contextmanager
def worker_batches(loader: torch.utils.data.DataLoader[T]) -> Iterator[Iterator[T]]:
    """Iterate over `loader`, made with `worker_init_fn=prepare_worker`, inside the block.

    Its workers end with the block, else with this program, also if they hang or this process is killed. Left to itself
    DataLoader asks them to end, and waits without limit if they do not.
    """
    others = multiprocessing.active_children()
    workers: list[BaseProcess] = []
    items: Any = None
    end = functools.partial(_end_workers, workers)
    atexit.register(end)  # if the block is in a generator that nobody closes
    try:
        try:
            with spared_children() if loader.num_workers else contextlib.nullcontext():
                items = iter(loader)
        finally:
            workers += [child for child in multiprocessing.active_children() if child not in others]
        with worker_errors(workers):
            yield items
    finally:
        end()
        atexit.unregister(end)
        if workers and items is not None:
            items._shutdown_workers()  # the rest of the loader: its thread, its watch over the workers


def _end_workers(workers: list[BaseProcess]) -> None:
    """Kill the workers, without DataLoader's handler of SIGCHLD, which would raise an error about that."""
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if handled else None
    try:
        end_children(workers)
    finally:
        if previous is not None:
            signal.signal(signal.SIGCHLD, previous)


def prepare_worker(worker_id: int) -> None:
    """Let the main process decide when this worker ends: for DataLoader's `worker_init_fn`.

    Signals that go to the whole process group are ignored: the main process needs the worker until the end of its
    iteration, and kills it then.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    end_with_parent()


@contextlib.contextmanager
def worker_errors(workers: Sequence[BaseProcess] = ()) -> Iterator[None]:
    """Restore the message of a ConfigError from a DataLoader's worker, and explain the end of a killed one.

    DataLoader raises the former with the worker's traceback as its message, which ends with the original one. The
    latter it raises anywhere in the main thread, as soon as a worker is gone. If the main process is just then
    fetching a tensor from one of `workers`, the connection breaks first.
    """
    try:
        yield
    except ConfigError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise ConfigError(str(error).rpartition(f"{ConfigError.__name__}: ")[2].strip()) from None
    except RuntimeError as error:
        text = f"{error.__cause__} {error}"
        death = _DEATH.search(text)
        if any(sign in text for sign in _SIGNS_OF_LITTLE_SHARED_MEMORY):
            reason = (
                "a loader process ran out of shared memory (/dev/shm); start a container with --ipc=host or"
                " --shm-size=8g, or use --workers=0"
            )
        elif death:
            reason = _death_text(death[1], death[2] or "ended from outside")
        else:
            raise
        raise _only_here(reason) from None
    except (ConnectionError, EOFError, FileNotFoundError):
        for worker in workers:
            worker.join(1)  # the end of a process is seen a little later than that of its connections
            if worker.exitcode:
                raise _only_here(_death_text(worker.pid, f"killed by signal {-worker.exitcode}")) from None
        raise


def _death_text(pid: Any, end: str) -> str:
    return f"loader process {pid} was {end}, which happens where memory runs out; free some, or use fewer --workers"


def _only_here(reason: str) -> ConfigError:
    error = ConfigError(reason)
    error.only_here = True
    return error
