"""The end of processes whose parent is gone, and of those that would outlive it."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

_POLL_SEC = 1.0
_JOIN_SEC = 10.0  # a killed process is gone at once, unless the kernel waits for a disk in its name


def end_with_parent() -> None:
    """In a process of `multiprocessing`: end, in whatever it does, when the parent process has ended."""
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def end_with_launcher(say: str) -> None:
    """In a program: send SIGTERM to this process, after the line `say`, when the process that started it has ended.

    No effect on Windows, where a process does not learn of that.
    """
    if os.name != "nt":
        threading.Thread(target=_await_launcher, args=(os.getppid(), say), daemon=True).start()


def _await_launcher(launcher: int, say: str) -> None:
    while os.getppid() == launcher:
        threading.Event().wait(_POLL_SEC)
    with contextlib.suppress(OSError):  # the terminal may be gone, too
        print(say, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def end_children(children: Iterable[BaseProcess]) -> None:
    """Kill those of the `children` that are alive, and wait until they are gone."""
    alive = [child for child in children if child.is_alive()]
    for child in alive:
        child.kill()
    for child in alive:
        child.join(_JOIN_SEC)
