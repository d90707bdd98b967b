"""SIGINT in the children of a process that ignores it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heeded_interrupts() -> Iterator[None]:
    """Handle SIGINT as Python does by default, for the length of the block.

    A shell without job control starts background commands with SIGINT ignored. A process that ignores a signal passes
    that on to all that it starts; one that handles a signal does not.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
