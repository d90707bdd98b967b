"""Downloads from a real server on loopback that drops, stalls, lies and changes its mind."""

import contextlib
import gzip
import io
import multiprocessing
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

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


def raw(handler: Handler, *lines: str | bytes) -> None:
    """Send an answer byte by byte, and hang up."""
    handler.wfile.write(b"".join(line.encode() + b"\r\n" if isinstance(line, str) else line for line in lines))
    handler.close_connection = True


MANY = "9" * 5000


@pytest.mark.parametrize(
    "location",
    [
        *("http://[::1/x", "http://[x]/", "http://", "http://:1/", "http://a:99999/", "http://a:b/", "http://a:0/"),
        *(
            "\xff\xfe",
            "http://\xff\xfe/",
            "//[",
            "http://[::1%25x/",
            "http://" + "a" * 70 + ".invalid/",
            "http://a\tb\x00/",
        ),
    ],
)
def test_locations_that_are_none(server: Server, location: str) -> None:
    server.script = lambda handler, number: raw(
        handler, "HTTP/1.1 302 Found", b"Location: " + location.encode("latin-1") + b"\r\n", "Content-Length: 0", ""
    )
    refused(server.url(), num_attempts=2)


def test_a_location_beyond_ascii_is_followed(server: Server) -> None:
    def script(handler: Handler, number: int) -> None:
        if number == 1:
            return raw(handler, "HTTP/1.1 302 Found", b"Location: /\xc3\xa4.pkl\r\n", "Content-Length: 0", "")
        assert handler.path == "/%C3%A4.pkl"
        return handler.whole()

    server.script = script
    assert read(server.url()) == BODY


@pytest.mark.parametrize(
    "header",
    [
        *(f"Retry-After: {value}" for value in (MANY, "-1", "x", "Fri, 99 Foo 99999999999 00:00:00 GMT", "\x80")),
        *(f"Content-Length: {value}" for value in (MANY, "-1", "x", "1, 2", "٣", "1_0", "")),
        *(f"Content-Range: bytes {value}" for value in (f"{MANY}-{MANY}/{MANY}", "x", "0-1/*")),
        *("Transfer-Encoding: foo", "Transfer-Encoding: chunked", "Set-Cookie: " + "=;" * 1000, "no colon", ": x"),
        *("ETag: \x01\x80", "ETag: " + "x" * 60000, "Last-Modified: \t", "ETag: a\r\n b", "X: " + "y" * 70000),
        "\r\n".join(f"X{i}: y" for i in range(200)),
    ],
    ids=lambda header: header[:20],
)
@pytest.mark.parametrize("status", ["200 OK", "206 Partial Content", "503 " + "busy " * 100])
def test_malformed_headers_end_in_one_line_or_the_file(
    server: Server, header: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LONGEST_WAIT_SEC", 0.001)
    server.script = lambda handler, number: (
        handler.drop() if number == 1 else raw(handler, f"HTTP/1.1 {status}", header, "", BODY)
    )
    for _ in range(2):  # the second finds what the first left
        try:
            assert read(server.url(), num_attempts=2) == BODY
        except ConfigError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-gzip", "zstd", "unknown"])
@pytest.mark.parametrize("announced", [True, False])
def test_compressed_answers_are_not_unpacked(server: Server, coding: str, announced: bool) -> None:
    packed = gzip.compress(bytes(20 << 20))
    length = [f"Content-Length: {len(packed)}"] if announced else []
    server.script = lambda handler, number: raw(
        handler, "HTTP/1.1 200 OK", f"Content-Encoding: {coding}", *length, "", packed
    )
    assert "sends it compressed" in refused(server.url())
    assert len(server.requests) == 1
    if "gzip" in coding:
        assert read(server.url("/set.tar.gz")) == packed  # its coding is the file itself


def test_more_than_announced_or_possible_is_not_written(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_MAX_UNANNOUNCED", 10 * fetch._CHUNK_BYTES)
    chunk = bytes(fetch._CHUNK_BYTES)
    sent = 0

    def endless(handler: Handler, number: int) -> None:
        nonlocal sent
        raw(handler, "HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "")
        for _ in range(10_000):
            raw(handler, f"{len(chunk):x}", chunk, "")
            sent += len(chunk)

    server.script = endless
    assert "sends more than is possible" in refused(server.url())
    assert sent < 200 * fetch._CHUNK_BYTES  # what the system buffers
    assert len(server.requests) == 1

    def beyond_its_range(handler: Handler, number: int) -> None:
        if number == 2:
            return handler.drop()
        headers = (f"Content-Range: bytes {HALF}-{len(BODY) - 1}/{len(BODY)}", 'ETag: "1"', "")
        return raw(handler, "HTTP/1.1 206 Partial Content", *headers, 2 * BODY)

    server.script = beyond_its_range
    assert "sends more than it announced" in refused(server.url())


def test_a_file_for_which_the_disk_has_no_room_is_not_begun(server: Server) -> None:
    server.script = lambda handler, number: handler.answer(200, BODY, length=1 << 58)
    with pytest.raises(ConfigError, match="the disk has"):
        open_url(server.url())
    assert len(server.requests) == 1


def closing(body: bytes) -> Callable[[Handler, int], None]:
    """Script that sends `body` without a length."""
    return lambda handler, number: raw(handler, "HTTP/1.0 200 OK", "", body)


def whole_files() -> dict[str, bytes]:
    """Small whole files, by name."""
    import pickle
    import tarfile
    import zipfile

    import numpy as np
    import PIL.Image
    import torch
    from safetensors.torch import save

    zipped, tarred, png, legacy = (io.BytesIO() for _ in range(4))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a", bytes(3000))
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        entry = tarfile.TarInfo("a")
        entry.size = 30000
        archive.addfile(entry, io.BytesIO(b"x" * entry.size))
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "PNG")
    torch.save(torch.zeros(1000), legacy, _use_new_zipfile_serialization=False)
    return {
        "a.zip": zipped.getvalue(), "a.tar": tarred.getvalue(), "a.png": png.getvalue(), "a.gz": gzip.compress(BODY),
        "a.pkl": pickle.dumps(list(range(1000))), "a.safetensors": save({"a": torch.zeros(1000)}),
        "a.pt": legacy.getvalue(), "a.bin": b"no format",
    }  # fmt: skip


def test_without_a_length_the_format_tells_what_is_missing(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in whole_files().items():
        told = name not in ("a.pt", "a.bin")
        server.script = closing(content)
        assert read(server.url(f"/{name}")) == content
        assert ("Nothing tells whether" in capsys.readouterr().err) != told
        for kept in (len(content) // 2, len(content) - 1):
            url = server.url(f"/cut-{kept}-{name}")
            server.script = closing(content[:kept])
            if told:
                assert "it was cut: the " in refused(url, num_attempts=2)
            else:
                assert read(url) == content[:kept]
                assert "Nothing tells whether" in capsys.readouterr().err


def test_a_link_in_the_cache_is_not_followed(server: Server, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    part_of(server.url()).parent.mkdir(parents=True)
    for target in (victim, tmp_path / "missing"):
        for kind in ("part", "version", "failed"):
            path = part_of(server.url()).with_name(f".{cached_path(server.url()).name}.{kind}")
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        assert read(server.url()) == BODY
        cached_path(server.url()).unlink()
    assert victim.read_text() == "precious" and not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://[::1",
            "https://[::1/x.zip",
            "http://[x]/a",
            "http://",
            "https:///a",
            "http://a:b/",
            "http://a:99999/a",
        ),
        *("http://a:0/a", "http://[::1]x/a", "http://" + "a" * 70 + ".invalid/a", "http://\u2100.invalid/a"),
    ],
)
def test_urls_that_are_none(server: Server, url: str) -> None:
    for options in ({}, {"cache": False}):
        with pytest.raises(ConfigError) as caught:
            open_url(url, **options)
        assert "\n" not in str(caught.value)


def test_what_no_attempt_mends_is_not_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.delenv("NO_PROXY")
    for name in ("ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socks", None)
    assert "unset ALL_PROXY" in refused(server.url())
    for status in (400, 401, 403, 404, 410, 451):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.script = partial(lambda status, handler, number: handler.answer(status), status)
        refused(server.url())
    assert waits == []


def test_a_certificate_that_does_not_count_is_not_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    tries: list[str] = []

    def get(*args: object, **options: object) -> None:
        tries.append("")
        try:
            raise ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
        except ssl.SSLError as error:
            raise requests.exceptions.SSLError("max retries") from error

    monkeypatch.setattr(requests.Session, "get", get)
    assert "self-signed" in refused(server.url()) and tries == [""] and waits == []
