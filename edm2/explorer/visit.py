"""The requests of one page: the latest wins, even if requests overtake each other on their way to the server."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

_INTERVAL_SEC = 0.15  # between two records: a page cannot show more


@dataclass(frozen=True)
class Stopped:
    """The last record of a request that was ended early: by its page's user, or by a newer request."""

    replaced: bool


@dataclass(eq=False)
class Visit:
    """Requests of one page, by the times at which it made them (its own clock).

    Gradio's queue runs the requests of all pages one at a time, in order of arrival. Its `cancels` misses a request
    that is still on its way to the server, and cannot tell older requests from newer ones; this class does both.
    """

    newest: float = 0.0  # time of the newest request
    waits: bool = False  # the newest request has not started
    cancelled: bool = False

    def announce(self, asked: float) -> None:
        """End older requests, waiting or running, before their next record."""
        if asked > self.newest:
            self.newest, self.waits, self.cancelled = asked, True, False

    def begin(self, asked: float) -> bool:
        """Start the request made at `asked`. Return False, and change nothing, if it is not the newest."""
        if asked < self.newest:
            return False
        self.newest, self.waits, self.cancelled = asked, False, False
        return True

    def cancel(self, asked: float) -> bool:
        """End all requests made before `asked`. Return True if the newest one has not started."""
        waited, self.waits = self.waits, False
        self.newest, self.cancelled = max(asked, self.newest), True
        return waited

    def follow(self, asked: float, records: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Yield the first and last record and others at intervals; `Stopped` if something newer than `asked` comes."""
        due, skipped = 0.0, None
        with closing(records):
            for record in records:
                if asked < self.newest:
                    yield Stopped(replaced=not self.cancelled)
                    return
                skipped = record
                if time.monotonic() >= due:
                    yield record
                    due, skipped = time.monotonic() + _INTERVAL_SEC, None
        if skipped is not None:
            yield skipped
