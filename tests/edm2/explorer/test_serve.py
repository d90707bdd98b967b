"""The explorer's server, asked over HTTP: it answers its own page at its own address, and nobody else."""

import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("gradio")

from dnnlib.errors import ConfigError
from edm2.explorer.grids import Explorer
from edm2.explorer.networks import Networks
from edm2.explorer.page import Page
from edm2.explorer.serve import listen, quiet_gradio, server
from edm2.explorer.setting import Setting, offered


@contextmanager
def serving(host: str) -> Iterator[int]:
    """Port of an explorer at `host` that runs until the block ends."""
    networks = Networks(torch.device("cpu"))
    with listen(host, 0) as listening, quiet_gradio():
        running = server(Page(Explorer(networks), offered([], [], [], networks, typed=True)).demo, listening, host)
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(timeout=60)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving("127.0.0.1") as port:
        yield port


def ask(port: int, method: str, path: str, headers: dict[str, str | None], body: bytes = b"") -> tuple[int, bytes]:
    """Status and content of the answer; a header that is None is not sent."""
    headers = {"Host": f"127.0.0.1:{port}", "Content-Length": str(len(body)), **headers}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value.format(port=port))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


OWN = "http://127.0.0.1:{port}"
JSON = {"Content-Type": "application/json"}


def look(port: int, name: str, **headers: str) -> tuple[int, bytes]:
    """Ask what a typed network is, as the page does."""
    config = json.loads(ask(port, "GET", "/config", {})[1])
    looks = [fn for fn in config["dependencies"] if fn["targets"][0][1] == "input" and len(fn["outputs"]) == 6]
    body = json.dumps({"data": [name], "fn_index": looks[0]["id"], "session_hash": "abc"}).encode()
    return ask(port, "POST", "/gradio_api/run/predict", {**JSON, **headers}, body)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_its_own_names(port, host):
    assert ask(port, "GET", "/", {"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}.evil.example", "", None),
        *("127.0.0.1.evil.example:{port}", "[::1]:{port}", "10.0.0.1:{port}", "localhost:{port}:{port}"),
        "a@localhost:{port}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join"])
def test_other_hosts_get_nothing(port, host, path):
    status, content = ask(port, "POST" if "join" in path else "GET", path, {"Host": host})
    assert status in (400, 421) and b"gradio" not in content


@pytest.mark.parametrize(
    "headers",
    [
        *({"Origin": origin} for origin in ("http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1")),
        {"Origin": "http://localhost:{port}"},  # another origin than the Host's
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
)  # fmt: skip
def test_other_sites_cannot_ask(port, headers):
    assert look(port, "no/such/file", Origin=OWN)[0] == 200
    assert look(port, "no/such/file", **headers)[0] == 403
    assert ask(port, "GET", "/config", headers)[0] == 403


def test_a_link_from_another_site_opens_the_page(port):
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(port, "GET", "/", foreign)[0] == 200
    assert ask(port, "POST", "/gradio_api/queue/join", foreign)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        *("upload", "upload/", "upload?upload_id=1", "process_recording", "vibe-edit", "file=/etc/hostname", "info"),
        *("file/etc/hostname", "proxy=http://example.org/", "openapi.json", "stream/x", "call/grid", "api/predict"),
        *("../openapi.json", "../docs", "../redoc", "../monitoring", "../login", "../openapi.json/"),
    ],
)
def test_there_is_nothing_but_the_page(port, path):
    path = f"/gradio_api/{path}".replace("/gradio_api/..", "")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        status, content = ask(port, method, path, {"Content-Type": "multipart/form-data; boundary=x"}, body)
        assert status == 404 and b"/tmp" not in content


def test_requests_are_bounded(port):
    for length in (str(2 << 20), "9" * 5000, "-1", "x"):
        assert ask(port, "POST", "/gradio_api/queue/join", {**JSON, "Content-Length": length})[0] in (400, 413)


@pytest.mark.parametrize("name", ["n" * 5000, "a/" * 3000, "n" * 300, "x\0y", "https://[::1"])
def test_a_name_that_cannot_be_one_is_no_error_of_the_server(port, name, capfd):
    assert look(port, name, Origin=OWN)[0] == 200
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError):
        list(Explorer(Networks(torch.device("cpu"))).grid(Setting(net=name, num_images=1, num_steps=1)))
    with pytest.raises(ConfigError):
        setting = Setting(net="models/fashion.safetensors", guide=name, guidance=2, num_images=1, num_steps=1)
        list(Explorer(Networks(torch.device("cpu"))).grid(setting))


def test_a_body_without_a_length_is_bounded(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Origin": f"http://127.0.0.1:{port}", **JSON}
    pieces = [b"x" * 65536] * 100
    try:
        connection.request("POST", "/gradio_api/queue/join", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status in (400, 413)
    except (OSError, http.client.HTTPException):  # the server has closed the connection
        pass
    finally:
        connection.close()
    assert ask(port, "GET", "/config", {})[0] == 200


def test_a_socks_proxy_of_the_environment_is_no_matter(monkeypatch):
    """Gradio's clients look for proxies when they are made, and fail on one of this kind."""
    for name in ("ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with serving("127.0.0.1") as port:
        assert ask(port, "GET", "/config", {})[0] == 200
    assert os.environ["ALL_PROXY"] == "socks5://127.0.0.1:9"


def test_every_address_of_this_machine():
    """Bare addresses are safe: another site's name is what has to be kept out."""
    with serving("0.0.0.0") as port:
        for host in ("127.0.0.1:{port}", "10.1.2.3:{port}", "localhost:{port}"):
            assert ask(port, "GET", "/config", {"Host": host})[0] == 200
        for host in ("evil.example:{port}", "127.0.0.1.evil.example:{port}", "10.1.2.3"):
            assert ask(port, "GET", "/config", {"Host": host})[0] == 421
