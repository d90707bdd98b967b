"""Work that goes on beside the page: one job at a time, the newest one of each visitor, which can be stopped."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import ConfigError

_MAX_VISITORS = 1024  # of whom is known when they last asked for something
_INTERVAL_SEC = 0.15  # between two records that a page is given; the last one does not wait


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Other visitors' work goes first."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The job has ended before its time: its visitor has stopped it or, where `replaced`, asked for something else."""

    replaced: bool


class Job:
    """Records that come into being in a thread; the newest one is at hand."""

    def __init__(self, visitor: str, make: Callable[[], Iterator[Any]]) -> None:
        self.visitor = visitor
        self._make = make
        self._changed = threading.Condition()
        self._newest: Any = Waiting()
        self._count = 1
        self._over = False
        self._stop: Stopped | None = None

    def stop(self, *, replaced: bool = False) -> None:
        """End it before its next record, or before it begins."""
        with self._changed:
            if self._stop is None and not self._over:
                self._stop = Stopped(replaced=replaced)
            self._changed.notify_all()

    def run(self) -> None:
        """Compute until it ends or is stopped. What goes wrong is for `follow`."""
        records = None
        try:
            if not self._is_stopped():
                records = self._make()
                for record in records:
                    if self._is_stopped():
                        break
                    self._tell(record)
        except BaseException as error:  # whatever it is, whoever follows must hear of it
            self._tell(error)
        finally:
            if records is not None and hasattr(records, "close"):
                records.close()
            with self._changed:
                if self._stop is not None:
                    self._tell(self._stop)
                self._over = True
                self._changed.notify_all()

    def follow(self) -> Iterator[Any]:
        """The newest record as often as there is a new one, but not more often than a page can show; then `Stopped`, or
        the last record. Raises what the job has raised. Leaving it stops the job.
        """
        seen = 0
        try:
            while True:
                with self._changed:
                    while self._count == seen and not self._over:
                        self._changed.wait()
                    record, over = self._newest, self._over
                    new, seen = self._count > seen, self._count
                if new:
                    if isinstance(record, BaseException):
                        raise record
                    yield record
                if over:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._over or self._stop is not None, timeout=_INTERVAL_SEC)
        finally:
            self.stop()

    def _is_stopped(self) -> bool:
        return self._stop is not None

    def _tell(self, record: Any) -> None:
        with self._changed:
            self._newest = record
            self._count += 1
            self._changed.notify_all()


class Jobs:
    """A thread that does the jobs of all visitors in the order in which they came."""

    def __init__(self, *, begin: Callable[[], None] = lambda: None, max_waiting: int = 16) -> None:
        self._begin = begin  # is called in the thread, first of all
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._asked: dict[str, float] = {}  # when each visitor last asked for something, the newest ones last
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="explorer", daemon=True)
        self._thread.start()

    def submit(self, visitor: str, make: Callable[[], Iterator[Any]]) -> Job:
        """A job that follows `make()`. The visitor's job before it ends. Raises ConfigError where too many wait."""
        job = Job(visitor, make)
        with self._changed:
            self._stop(visitor, replaced=True)
            if len(self._waiting) >= self._max_waiting:
                raise ConfigError(f"{len(self._waiting)} others are waiting already; try again in a while")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def make_way(self, visitor: str, asked: float) -> bool:
        """End the visitor's job for something that was asked for at the time `asked`, by the visitor's own clock.

        False, and nothing is done, where something newer was asked for already.
        """
        with self._changed:
            if asked < self._asked.get(visitor, asked):
                return False
            self._asked.pop(visitor, None)
            self._asked[visitor] = asked
            if len(self._asked) > _MAX_VISITORS:
                del self._asked[next(iter(self._asked))]
            self._stop(visitor, replaced=True)
            return True

    def stop(self, visitor: str, *, replaced: bool = False) -> None:
        """End the job of a visitor, if there is one."""
        with self._changed:
            self._stop(visitor, replaced=replaced)

    def close(self, *, patience_sec: float = 10) -> None:
        """End everything and wait for it."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([] if self._running is None else [self._running])):
                job.stop()
            self._changed.notify_all()
        self._thread.join(patience_sec)

    def _stop(self, visitor: str, *, replaced: bool) -> None:
        for job in (*self._waiting, *([] if self._running is None else [self._running])):
            if job.visitor == visitor:
                job.stop(replaced=replaced)
        for job in [job for job in self._waiting if job.visitor == visitor]:
            self._waiting.remove(job)
            job.run()  # it is stopped, and says so

    def _work(self) -> None:
        self._begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    remaining, self._waiting = self._waiting, []
                    break
                self._running = self._waiting.pop(0)
            self._running.run()
            with self._changed:
                self._running = None
        for job in remaining:
            job.run()
