"""A web server for tests, on the loopback, that gives parts of files and can be told to misbehave."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.loopback import LoopbackServer, QuietHandler, running


class ShardServer(LoopbackServer):
    """Serves the files of `folder`. `requests` are those that it has had: method, name, first byte, bytes sent."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, int, int]] = []
        self.drops = 0  # of the next answers to GET, break off so many after half of the bytes
        self.busy = 0  # answer so many requests by 503
        self.ranges = True
        self.stall = False  # send half of the bytes and then nothing, as long as this holds
        self.stalled = threading.Event()


class _Handler(QuietHandler):
    server: ShardServer

    def answer(self) -> None:
        server, name = self.server, self.path.lstrip("/").partition("?")[0]
        path = server.folder / name
        if server.busy > 0:
            server.busy -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        begin, end = (int(span[1]), min(int(span[2]) + 1, len(data))) if span else (0, len(data))
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if self.command == "HEAD":
            server.requests.append(("HEAD", name, 0, 0))
            return
        if server.stall:
            self.wfile.write(data[begin : (begin + end) // 2])
            server.stalled.set()
            while server.stall:
                time.sleep(0.01)
            self.close_connection = True
            return
        if server.drops > 0 and end - begin > 1:
            server.drops -= 1
            end = (begin + end) // 2
            self.close_connection = True
        server.requests.append(("GET", name, begin, end - begin))
        self.wfile.write(data[begin:end])


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    """A server of `folder` while the block lasts."""
    with running(ShardServer(folder)) as server:
        try:
            yield server
        finally:
            server.stall = False
