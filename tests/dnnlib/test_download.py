"""Downloads from a real server on loopback that drops, stalls, lies and changes its mind."""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dnnlib import download, fetch
from dnnlib.download import cached_path
from dnnlib.errors import ConfigError
from dnnlib.util import open_url

BODY = bytes(range(256)) * (12 << 10)
HALF = len(BODY) // 2
assert HALF % fetch._CHUNK_BYTES == 0  # a piece that is not complete is lost when a connection breaks


class Server(ThreadingHTTPServer):
    """Answers every GET by calling `script(handler, number of the request)`; keeps the headers it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.script: Callable[[Handler, int], None] = lambda handler, number: handler.whole()
        self.requests: list[dict[str, str]] = []
        self.bodies_sent = 0
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path: str = "/net.pkl") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    """The actions of a script."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers.items()))
        with contextlib.suppress(OSError):
            self.server.script(self, len(self.server.requests))

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def whole(self, tag: str = '"1"', body: bytes = BODY) -> None:
        """As a sound server: the whole file, or the part of this version that is asked for."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.bodies_sent += 1
        if match and self.headers.get("If-Range") == tag:
            start = int(match[1])
            content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], Content_Range=content_range, ETag=tag)
        else:
            self.answer(200, body, ETag=tag)

    def drop(self, after: int = HALF, tag: str | None = '"1"', body: bytes = BODY) -> None:
        """Announce everything, send `after` bytes, and hang up."""
        headers = {} if tag is None else {"ETag": tag}
        self.answer(200, body[:after], length=len(body), **headers)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_FIRST_WAIT_SEC", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def read(url: str, **options: int) -> bytes:
    with open_url(url, **options) as file:
        content: bytes = file.read()
    return content


def refused(url: str, **options: int) -> str:
    with pytest.raises(ConfigError) as caught:
        open_url(url, **options)
    message = str(caught.value)
    assert url in message and "\n" not in message
    assert not cached_path(url).exists()
    return message


def part_of(url: str) -> Path:
    path = cached_path(url)
    return path.with_name(f".{path.name}.part")


def test_a_dropped_download_goes_on_where_it_stopped(server: Server) -> None:
    server.script = lambda handler, number: handler.drop() if number == 1 else handler.whole()
    assert read(server.url()) == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"]
    assert server.requests[1]["If-Range"] == '"1"' and server.requests[0]["Accept-Encoding"] == "identity"


def test_it_goes_on_in_a_later_program(server: Server) -> None:
    server.script = lambda handler, number: handler.drop() if number == 1 else handler.answer(500)
    assert f"{len(BODY)}" in refused(server.url(), num_attempts=1)
    assert part_of(server.url()).read_bytes() == BODY[:HALF]
    server.script = lambda handler, number: handler.whole()
    assert read(server.url()) == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"]
    assert not part_of(server.url()).exists()


def test_a_part_that_is_whole_needs_no_request(server: Server) -> None:
    server.script = lambda handler, number: handler.drop()
    refused(server.url(), num_attempts=1)
    part_of(server.url()).write_bytes(BODY)  # as if the program had been killed before the file got its name
    assert read(server.url()) == BODY and len(server.requests) == 1


def test_the_date_of_change_will_do_where_there_is_no_tag(server: Server) -> None:
    date = "Sun, 01 Nov 2026 00:00:00 GMT"

    def script(handler: Handler, number: int) -> None:
        if number == 1:
            handler.answer(200, BODY[:HALF], length=len(BODY), Last_Modified=date, ETag='W/"weak"')
        else:
            assert handler.headers["If-Range"] == date
            handler.answer(206, BODY[HALF:], Content_Range=f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}")

    server.script = script
    assert read(server.url()) == BODY


def test_without_a_version_it_starts_over(server: Server) -> None:
    server.script = lambda handler, number: handler.drop(tag=None) if number < 3 else handler.whole()
    assert read(server.url()) == BODY
    assert server.ranges() == [None, None, None]


def test_a_file_that_changed_starts_over(server: Server) -> None:
    new = BODY[::-1]
    server.script = lambda handler, number: handler.drop() if number == 1 else handler.whole('"2"', new)
    assert read(server.url()) == new


def test_a_server_that_ignores_ranges_sends_all_again(server: Server) -> None:
    server.script = lambda handler, number: handler.drop() if number == 1 else handler.answer(200, BODY, ETag='"1"')
    assert read(server.url()) == BODY


@pytest.mark.parametrize("name", ["ETag", "Last_Modified"])
def test_a_rest_of_another_version_is_not_taken(server: Server, name: str) -> None:
    new = BODY[::-1]
    old_version, new_version = (
        ({name: '"1"'}, {name: '"2"'})
        if name == "ETag"
        else ({name: "Sun, 01 Nov 2026 00:00:00 GMT"}, {name: "Mon, 02 Nov 2026 00:00:00 GMT"})
    )

    def script(handler: Handler, number: int) -> None:
        if number == 1:
            handler.answer(200, BODY[:HALF], length=len(BODY), **old_version)
        elif "Range" in handler.headers:  # and If-Range is ignored
            content_range = f"bytes {HALF}-{len(new) - 1}/{len(new)}"
            handler.answer(206, new[HALF:], Content_Range=content_range, **new_version)
        else:
            handler.answer(200, new, **new_version)

    server.script = script
    assert read(server.url()) == new
    assert server.ranges() == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize("content_range", [f"bytes 0-{HALF - 1}/{len(BODY)}", f"bytes {HALF}-9/7", "half", ""])
def test_another_part_than_was_asked_for_is_not_taken(server: Server, content_range: str) -> None:
    def script(handler: Handler, number: int) -> None:
        match number:
            case 1:
                handler.drop()
            case 2:
                handler.answer(206, BODY[:HALF], Content_Range=content_range, ETag='"1"')
            case _:
                handler.whole()

    server.script = script
    assert read(server.url()) == BODY
    assert server.ranges() == [None, f"bytes={HALF}-", None]


def test_a_range_that_cannot_be_had_starts_over(server: Server) -> None:
    def script(handler: Handler, number: int) -> None:
        [handler.drop, lambda: handler.answer(416), handler.whole][number - 1]()

    server.script = script
    assert read(server.url()) == BODY
    assert server.ranges()[2] is None


def test_a_stalling_server_is_given_up_and_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT_SEC", 0.2)
    over = threading.Event()

    def script(handler: Handler, number: int) -> None:
        if number == 1:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(BODY)))
            handler.send_header("ETag", '"1"')
            handler.end_headers()
            handler.wfile.write(BODY[:HALF])
            handler.wfile.flush()
            over.wait(10)
        else:
            handler.whole()

    server.script = script
    assert read(server.url()) == BODY
    over.set()
    assert len(server.requests) == 2


def test_lengths_that_are_lies(server: Server) -> None:
    server.script = lambda handler, number: handler.answer(200, BODY, length=len(BODY) + 5)
    assert f"broke off after {len(BODY)} of {len(BODY) + 5} bytes" in refused(server.url("/long"), num_attempts=2)
    # More bytes than announced: what goes beyond is not part of the answer (RFC 9112, 6.3).
    server.script = lambda handler, number: handler.answer(200, BODY, length=100)
    assert read(server.url("/short")) == BODY[:100]
    server.script = lambda handler, number: handler.answer(200)
    assert "the file is empty" in refused(server.url("/empty"), num_attempts=2)


def test_errors_that_pass_are_waited_for_and_others_are_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers = [(500, {}), (503, {"Retry_After": "7"}), (429, {"Retry_After": "9999"}), (502, {"Retry_After": "soon"})]

    def script(handler: Handler, number: int) -> None:
        if number <= len(answers):
            status, headers = answers[number - 1]
            handler.answer(status, b"sorry", **headers)
        else:
            handler.whole()

    server.script = script
    assert read(server.url()) == BODY
    # At first none, then doubled each time or as the server asks, up to half a minute.
    assert waits == pytest.approx([0, 7, 30, 0.008])
    for status in (401, 403, 404, 410):
        server.requests.clear()

        def answer(handler: Handler, number: int, status: int = status) -> None:
            handler.answer(status)

        server.script = answer
        message = refused(server.url(f"/{status}"))
        assert f"answers {status}" in message and "place the file by hand as" in message
        assert len(server.requests) == 1


def test_redirections_are_followed_within_http(server: Server) -> None:
    def script(handler: Handler, number: int) -> None:
        if handler.path == "/net.pkl":
            handler.answer(302, Location="/moved?x=1")
        else:
            handler.whole()

    server.script = script
    assert read(server.url()) == BODY


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/net.pkl", "javascript:alert(1)"])
def test_redirections_to_another_scheme_are_refused(server: Server, target: str) -> None:
    server.script = lambda handler, number: handler.answer(302, Location=target)
    assert f"points to {target}, which is not followed from http" in refused(server.url())
    assert len(server.requests) == 1


def test_a_secured_connection_is_not_left() -> None:
    class Response:
        status_code = 302

        def __init__(self) -> None:
            self.headers = {"Location": "http://elsewhere/net.pkl"}

        def close(self) -> None:
            pass

    class Session:
        def get(self, url: str, **options: object) -> Response:
            return Response()

    with pytest.raises(fetch.Stopped, match=r"http://elsewhere/net\.pkl, which is not followed from https"):
        fetch._get(Session(), "https://here/net.pkl", {})


def test_a_circle_of_redirections_ends(server: Server) -> None:
    server.script = lambda handler, number: handler.answer(301, Location="/net.pkl")
    assert "redirects more than 10 times" in refused(server.url())
    assert len(server.requests) == 11


def test_in_memory_a_dropped_download_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.script = lambda handler, number: handler.drop() if number == 1 else handler.whole()
    content = open_url(server.url(), cache=False)
    assert isinstance(content, io.BytesIO) and content.read() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"] and not (tmp_path / "cache").exists()


def test_a_bar_is_shown_to_whom_it_concerns(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read(server.url("/quiet.pkl"))  # standard error is not a terminal here
    assert capsys.readouterr().err == ""
    import tqdm

    shown = []
    original = tqdm.tqdm

    def bar(*args: object, **options: object) -> object:
        shown.append(options["disable"])
        return original(*args, **{**options, "disable": False})  # type: ignore[call-overload]

    monkeypatch.setattr(tqdm, "tqdm", bar)
    read(server.url("/net.pkl"))
    assert "Downloading net.pkl: 100%" in capsys.readouterr().err
    open_url(server.url("/other.pkl"), verbose=False).close()
    assert shown == [None, True]  # None tells tqdm to show the bar only on a terminal


def _open_in_process(url: str, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    with open_url(url) as file:
        results.put(file.read() == BODY)  # type: ignore[attr-defined]


def test_of_many_processes_one_downloads(server: Server) -> None:
    def script(handler: Handler, number: int) -> None:
        time.sleep(0.3)
        handler.whole()

    server.script = script
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_open_in_process, args=(server.url(), start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    time.sleep(0.5)
    start.set()
    assert [results.get(timeout=60) for _ in workers] == [True] * 4
    for worker in workers:
        worker.join(60)
    assert server.bodies_sent == 1


def test_waiting_for_a_download_that_fails_fails_with_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def script(handler: Handler, number: int) -> None:
        reached.set()
        go_on.wait(10)
        handler.answer(404)

    server.script = script
    messages: list[str] = []

    def attempt() -> None:
        try:
            open_url(server.url())
        except ConfigError as error:
            messages.append(str(error))

    first = threading.Thread(target=attempt)
    first.start()
    reached.wait(10)
    others = [threading.Thread(target=attempt) for _ in range(3)]
    for thread in others:
        thread.start()
    time.sleep(0.2)
    go_on.set()
    for thread in (first, *others):
        thread.join()
    assert len(messages) == 4 and len(set(messages)) == 1 and "404" in messages[0]
    assert len(server.requests) == 1
    assert "Waiting for another process" in capsys.readouterr().err
    server.script = lambda handler, number: handler.whole()  # a later call tries again
    assert read(server.url()) == BODY


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_download_frees_the_lock_and_leaves_its_part(server: Server) -> None:
    over = threading.Event()

    def script(handler: Handler, number: int) -> None:
        if number > 1:
            handler.whole()
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.send_header("ETag", '"1"')
        handler.end_headers()
        handler.wfile.write(BODY[: 2 << 20])
        handler.wfile.flush()
        over.wait(30)

    server.script = script
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    start.set()
    worker = context.Process(target=_open_in_process, args=(server.url(), start, results))
    worker.start()
    part = part_of(server.url())
    deadline = time.monotonic() + 30
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    over.set()
    present = part.stat().st_size
    assert present > 0
    assert read(server.url()) == BODY
    assert server.ranges() == [None, f"bytes={present}-"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set DNNLIB_CACHE_DIR to a folder that can be written"):
        open_url("http://127.0.0.1:9/net.pkl")


def test_without_a_network_the_answer_comes_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    message = refused("https://no-such-host.invalid/net.pkl")
    assert f"place the file by hand as {cached_path('https://no-such-host.invalid/net.pkl')}" in message
    assert len(waits) == 2 and sum(waits) < 5


def test_a_full_disk_is_no_network_problem(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, response: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch._Fetch, "_copy", full)
    with pytest.raises(ConfigError, match=r"cannot write to the download cache .*: No space left on device"):
        open_url(server.url())
    assert len(server.requests) == 1
    assert download.cached_path(server.url()).exists() is False
