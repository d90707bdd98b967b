"""EasyDict, the cache folder, and downloads from a real server on loopback that misbehaves."""

import contextlib
import copy
import pickle
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dnnlib
from dnnlib import fetch
from dnnlib.errors import ConfigError
from dnnlib.util import (
    EasyDict,
    call_func_by_name,
    construct_class_by_name,
    format_time,
    get_obj_by_name,
    make_cache_dir_path,
    open_url,
)

BODY = bytes(range(256)) * 5000


class Server(ThreadingHTTPServer):
    """Answers by path, and counts the requests for each."""

    daemon_threads = True

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    """/file works; /flaky after two failures; /cut is always cut short; /missing and /broken have error codes."""

    server: Server

    def do_GET(self) -> None:
        count = self.server.counts[self.path] = self.server.counts.get(self.path, 0) + 1
        kind = self.path.split("?")[0]
        status = {"/missing.pkl": 404, "/broken.pkl": 500, "/elsewhere.pkl": 302}.get(kind, 200)
        if kind == "/flaky.pkl" and count == 1:
            status = 503
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "file:///etc/hostname")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        cut = kind == "/cut.pkl" or (kind == "/flaky.pkl" and count == 2)
        with contextlib.suppress(OSError):
            self.wfile.write(BODY[: len(BODY) // 2] if cut else BODY)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_FIRST_WAIT_SEC", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def files(folder: Path) -> list[Path]:
    """The usable files of a folder: names of locks and notes of failures begin with a dot."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]


def test_easydict_is_a_dictionary_with_attributes() -> None:
    options = dnnlib.EasyDict(a=1)
    options.b = [2]
    del options.a
    assert options == {"b": [2]} and options.b is options["b"]
    with pytest.raises(AttributeError, match="a"):
        _ = options.a
    with pytest.raises(AttributeError):
        del options.a
    for twin in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert type(twin) is EasyDict and twin == options
    assert b"dnnlib.util" in pickle.dumps(options)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    assert make_cache_dir_path("a", "b") == str(tmp_path / "a" / "b")
    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert make_cache_dir_path("a") == str(tmp_path / ".cache" / "dnnlib" / "a")


def test_a_download_is_kept_and_reused(server: Server, tmp_path: Path) -> None:
    url = server.url("/file.pkl?version=1")
    path = open_url(url, return_filename=True)
    assert Path(path).read_bytes() == BODY and Path(path).name.endswith("_file.pkl")
    with open_url(url) as file:
        assert file.read() == BODY
    assert server.counts == {"/file.pkl?version=1": 1} and files(tmp_path) == [Path(path)]
    assert open_url(server.url("/file.pkl?version=2"), return_filename=True) != path


def test_without_cache_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    assert open_url(server.url("/file.pkl"), cache=False).read() == BODY
    assert files(tmp_path) == []
    with pytest.raises(ConfigError):
        open_url(server.url("/file.pkl"), cache=False, return_filename=True)


def test_failures_that_may_pass_are_tried_again(server: Server) -> None:
    with open_url(server.url("/flaky.pkl")) as file:
        assert file.read() == BODY
    assert server.counts == {"/flaky.pkl": 3}


@pytest.mark.parametrize(
    ("path", "message", "count"),
    [
        ("/missing.pkl", "404", 1),
        ("/broken.pkl", "500", 3),
        ("/cut.pkl", f"broke off after .* of {len(BODY)} bytes", 3),
        ("/elsewhere.pkl", "points to file:///etc/hostname, which is not followed from http", 1),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: Server, tmp_path: Path, path: str, message: str, count: int
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_url(server.url(path), num_attempts=3)
    assert server.url(path) in str(caught.value) and "\n" not in str(caught.value)
    assert server.counts == {path: count} and files(tmp_path) == []


def test_offline_the_error_says_what_to_place_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pkl"
    with pytest.raises(ConfigError, match="place the file by hand as") as caught:
        open_url(url, num_attempts=1)
    by_hand = Path(str(caught.value).rsplit(" as ", 1)[1])
    assert by_hand.is_relative_to(tmp_path)
    by_hand.write_bytes(b"by hand")
    with open_url(url) as file:
        assert file.read() == b"by hand"


def test_local_paths_open_and_other_schemes_do_not(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(b"local")
    assert open_url(str(path)).read() == b"local" and open_url(str(path), return_filename=True) == str(path)
    for bad, message in (
        (tmp_path / "no.pkl", "does not exist"),
        (tmp_path, "is not a file"),
        ("ftp://a/b", "scheme ftp"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_url(str(bad))


def test_objects_are_found_by_their_dotted_names():
    assert get_obj_by_name("dnnlib.util.EasyDict.keys") is EasyDict.keys
    assert get_obj_by_name("dnnlib.errors") is __import__("dnnlib.errors").errors
    assert call_func_by_name("a", "b", func_name="os.path.join") == str(Path("a", "b"))
    assert construct_class_by_name(class_name="dnnlib.EasyDict", a=1) == {"a": 1}
    with pytest.raises(AttributeError, match="EasyDict"):
        get_obj_by_name("dnnlib.util.EasyDict.nothing")
    for name in ("nothing.at.all", "dnnlib.nothing.at_all"):
        with pytest.raises((ImportError, AttributeError), match="nothing"):
            get_obj_by_name(name)


def test_a_module_that_cannot_be_imported_says_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "wants_more.py").write_text("import not_installed_anywhere", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        get_obj_by_name("wants_more.thing")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3725, "1h 02m 05s"), (270_000, "3d 03h 00m")],
)
def test_times_are_short(seconds, text):
    assert format_time(seconds) == text
