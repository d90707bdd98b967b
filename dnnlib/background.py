"""Work by threads and processes while the program continues: files written, results in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dnnlib.disk import DiskFull, require_space, write_error

A = TypeVar("A")
B = TypeVar("B")

_POLL_SEC = 5.0  # between two attempts to write to a full disk


def map_in_order(pool: Executor, function: Callable[[A], B], items: Iterable[A], *, max_pending: int) -> Iterator[B]:
    """Yield the results of `function` in the order of `items`, at most `max_pending` of them ahead.

    The pool is shut down at the end, also where the caller stops early.
    """
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            if len(pending) >= max_pending:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Write:
    """A file to write."""

    path: Path
    num_bytes: int  # approximate size
    work: Callable[[Path], None]  # writes the file atomically; may raise OSError
    tag: Any = None  # for the caller


class BackgroundWriter:
    """Writes files one after the other, in a thread that ends when all are written.

    With `wait_for_space`, the thread waits until a full disk has room; otherwise a full disk is a failure like any
    other. After a failure nothing more is written. The interpreter does not exit before the thread ends. `before` is
    called before each file and may raise. `advice` is appended to the error about a full disk.
    """

    def __init__(
        self,
        *,
        wait_for_space: bool = False,
        advice: str = "",
        before: Callable[[], None] = lambda: None,
        poll_sec: float = _POLL_SEC,
    ) -> None:
        self._wait_for_space = wait_for_space
        self._advice = advice
        self._before = before
        self._poll_sec = poll_sec
        self._hurry = threading.Event()
        self._change = threading.Condition()
        self._waiting: list[Write] = []
        self._thread: threading.Thread | None = None
        self._finished: list[Write] = []
        self._notes: list[str] = []
        self._failure: BaseException | None = None

    def submit(self, write: Write) -> None:
        """Queue a file."""
        with self._change:
            if self._failure is not None:
                return
            self._waiting.append(write)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="background writer")
                self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything is written or has failed; return False after `timeout` seconds."""
        with self._change:
            return self._change.wait_for(lambda: self._thread is None, timeout)

    def give_up(self) -> None:
        """Stop waiting for room on a full disk, now and for files to come: it is a failure."""
        self._wait_for_space = False
        self._hurry.set()

    def news(self) -> tuple[list[str], list[Write]]:
        """Return the messages for the user and the files written since the last call."""
        with self._change:
            notes, self._notes = self._notes, []
            finished, self._finished = self._finished, []
        return notes, finished

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the work, if any."""
        with self._change:
            return self._failure

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._waiting:
                    self._thread = None
                    self._change.notify_all()
                    return
                write = self._waiting.pop(0)
            try:
                self._write(write)
            except BaseException as error:
                with self._change:
                    self._failure = error
                    self._waiting.clear()
            else:
                with self._change:
                    self._finished.append(write)

    def _write(self, write: Write) -> None:
        waited = False
        while True:
            try:
                self._before()
                require_space(write.path, write.num_bytes)
                try:
                    write.work(write.path)
                except OSError as error:
                    raise write_error(write.path, error) from error
            except DiskFull as error:
                if not self._wait_for_space:
                    raise DiskFull(f"{error}{self._advice}") from error
                if not waited:
                    self._note(f"{error}; waiting for room.")
                waited = True
                self._hurry.wait(self._poll_sec)
            else:
                if waited:
                    self._note(f"There is room again: wrote {write.path.name}.")
                return

    def _note(self, text: str) -> None:
        with self._change:
            self._notes.append(text)
