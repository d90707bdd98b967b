"""Requests to end the session of a training run early: by signal, or from within the program.

Schedulers and cloud providers send SIGTERM before they take a machine away, SLURM can send SIGUSR1 some minutes before
that, and SIGINT is ^C. All three ask the run to finish the current iteration, save and end. A second signal means that
there is no time for that.
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
# torchrun forwards the signals that it gets, and a scheduler may signal every process of a job, so one order may arrive
# twice. A signal within this time of the first one belongs to the same order.
_ECHO_SEC = 5.0


class StopRequest:
    """A request to this process to end its session. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.signum: int | None = None  # the first signal that arrived
        self._asked = threading.Event()

    def ask(self, signum: int | None = None) -> None:
        """Make the request; `signum` is the signal that caused it."""
        if not self._asked.is_set():
            self.signum = signum
            self._asked.set()

    @property
    def asked(self) -> bool:
        """True if `ask` was called since the last `clear`."""
        return self._asked.is_set()

    def clear(self) -> None:
        """Forget a request that was fulfilled."""
        self.signum = None
        self._asked.clear()


# Module state, because signals belong to the process.
REQUEST = StopRequest()


@contextlib.contextmanager
def handled_signals(on_first: Callable[[signal.Signals], None], request: StopRequest = REQUEST) -> Iterator[None]:
    """Let the first signal of SIGNALS during the block ask for the end of the session; a second one ends the process.

    `on_first(signal)` is called in another thread when the first one arrives. The second one ends the process at once,
    with exit code 128 + signal and without cleaning up, even if the main thread hangs inside a library that waits for a
    lost process or a disk. Does nothing outside the main thread, where Python cannot install signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python's C handler writes the number of each signal to this pair of sockets, so that the thread at the other end
    # gets it even while the main thread is blocked.
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    previous_fd = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS if not _ignored(signum)}
    for signum in previous:
        signal.signal(signum, _do_nothing)
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
    """Return True if the parent process wants this process to ignore the signal.

    A shell without job control starts background commands with SIGINT ignored, so that ^C is for the foreground.
    SIGUSR1 is always handled: it is ignored only to keep torchrun, which does not handle it, alive.
    """
    return signum == signal.SIGINT and signal.getsignal(signum) is signal.SIG_IGN


def _do_nothing(signum: int, frame: Any) -> None:
    """Python reports signals to the wakeup socket only if they have a handler."""


def _watch(receiving: socket.socket, on_first: Callable[[signal.Signals], None], request: StopRequest) -> None:
    first_at: float | None = None
    patience = _ECHO_SEC if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    while data := receiving.recv(64):
        for signum in data:
            if signum not in SIGNALS:  # another signal with a Python handler, such as PyTorch's for SIGCHLD
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
    """Block SIGNALS in processes that are started in the block, until they unblock them.

    Otherwise a signal to the process group, such as ^C, would end a worker during its imports, with a traceback on the
    screen. Signals to this process are handled after the block. No effect on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    # Otherwise the first worker would start the tracker, which unblocks the signals again.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
