"""Asking a training run to end its session early: by signal, or from within the program.

SIGTERM is what schedulers and cloud providers send before they take a machine away, SIGUSR1 what SLURM can send some
minutes ahead of that, SIGINT is ^C. All three ask for the same: finish what is running, save, end. A second one means
that there is no time for that.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# SIGUSR1 does not exist on Windows.
SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
# torchrun passes on what it gets itself, and a scheduler may signal every process of a job: the same order arrives
# twice. What comes so soon after the first signal is no second order.
_ECHO_SEC = 5.0


class StopRequest:
    """Whether this process was asked to end its session; may be used from any thread."""

    def __init__(self) -> None:
        self.signum: int | None = None  # the first signal that came
        self._asked = threading.Event()

    def ask(self, signum: int | None = None) -> None:
        """Ask for it; `signum` is the signal that brought the wish."""
        if not self._asked.is_set():
            self.signum = signum
            self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether someone asked since the last `clear`."""
        return self._asked.is_set()

    def clear(self) -> None:
        """Forget the wish, since it was fulfilled."""
        self.signum = None
        self._asked.clear()


# Signals belong to the process, and so does what they ask for.
REQUEST = StopRequest()


@contextlib.contextmanager
def handled_signals(on_first: Callable[[signal.Signals], None], request: StopRequest = REQUEST) -> Iterator[None]:
    """While the block runs, a signal of SIGNALS asks for an end of the session, and another one ends the process.

    `on_first(signal)` is called in a thread of its own when the first one arrives. The second one ends the process at
    once, with the exit code 128 + signal and without cleaning up: also where the main thread waits inside of a library,
    for a process that is gone or for a disk. Outside of the main thread, there is no handling signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python writes the number of each signal to this pair of sockets from within the C handler, so that the thread at
    # the other end learns of it whatever the main thread does.
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    previous_fd = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS if not _ignored(signum)}
    for signum in previous:
        signal.signal(signum, _to_the_watcher)
    watcher = threading.Thread(target=_watch, args=(receiving, on_first, request), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(previous_fd)
        sending.close()
        watcher.join()
        receiving.close()


def _ignored(signum: int) -> bool:
    """Whether whoever started this process wants it to live through this signal.

    A shell without job control starts background commands like this, so that ^C is for those in the foreground. Of
    SIGUSR1 it says nothing: ignoring it is how to keep torchrun, which knows no SIGUSR1, alive.
    """
    return signum == signal.SIGINT and signal.getsignal(signum) is signal.SIG_IGN


def _to_the_watcher(signum: int, frame: Any) -> None:
    """A handler must be there for the signal to be announced at all; there is nothing to do in it."""


def _watch(receiving: socket.socket, on_first: Callable[[signal.Signals], None], request: StopRequest) -> None:
    first_at: float | None = None
    patience = _ECHO_SEC if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    while data := receiving.recv(64):
        for signum in data:
            if signum not in SIGNALS:  # other signals that have a handler in Python, such as PyTorch's for SIGCHLD
                continue
            if first_at is None:
                first_at = time.monotonic()
                request.ask(signum)
                on_first(signal.Signals(signum))
            elif time.monotonic() - first_at >= patience:
                sys.stdout.flush()
                os._exit(128 + signum)


@contextlib.contextmanager
def spared_children() -> Iterator[None]:
    """Processes started in the block get none of SIGNALS until they call `prepare_worker`, or ever if they don't.

    A signal to the group of processes, such as ^C, would end a worker while it still imports, with a traceback on the
    screen. What arrives here meanwhile is handled after the block. No effect on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    # Starting it, which the first worker would do, unblocks signals.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def prepare_worker(worker_id: int) -> None:
    """Let the process that started this one decide when to end: for DataLoader's `worker_init_fn`.

    Of several SIGTERMs the first is ignored: it is the group's, and the main process needs the worker until the end of
    its iteration. The next is for a worker that does not end by itself.
    """
    terminations: list[int] = []

    def terminate(signum: int, frame: Any) -> None:
        if terminations:
            os._exit(0)
        terminations.append(signum)

    for signum in SIGNALS:
        signal.signal(signum, terminate if signum == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
