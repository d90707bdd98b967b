"""The web server of the page: its look, its socket, and the requests that it answers.

Any page that the user visits can make the browser send requests to this server. So it answers only those that name its
own address, that come from its own page, and that this page makes (docs/explore.md).
"""

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, reason_of

_FIRST_PORT, _NUM_PORTS = 7860, 100

# A browser loads only what comes from this server or is part of the page. Gradio's page runs inline scripts and makes
# functions from text.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self';"
    " form-action 'self'; frame-ancestors 'self'"
)
# Everything that the page asks for. Gradio has many more routes: uploads, files, proxies, a schema of the functions.
_GET = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/queue/data", "/gradio_api/app_id")
_GET_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
_POST = ("/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
_MAX_BODY = 1 << 20  # bytes; the page sends a few hundred

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket; without `port`, at the first free one from 7860. Raises ConfigError."""
    ports = range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS) if port is None else (port,)
    reason = ""
    for number in ports:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family)
        except socket.gaierror:
            raise ConfigError(
                f"--host={host} is not an address of this machine; --host=127.0.0.1 serves this machine alone"
            ) from None
        except (OSError, OverflowError) as error:
            reason = reason_of(error)
    if port is None:
        raise ConfigError(f"all ports of {host} from {ports[0]} to {ports[-1]} failed ({reason}); give a --port")
    raise ConfigError(f"cannot listen at --port={port} of {host} ({reason}); leave it out to use a free one")


def address(listening: socket.socket) -> str:
    """Return the page's URL."""
    host, port = listening.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


@contextlib.contextmanager
def quiet_gradio() -> Iterator[None]:
    """Import Gradio in this block: without its usage reports, and without proxies.

    Its clients look for proxies when they are made, and fail on a SOCKS proxy; the page needs none of them.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(proxies)  # for downloads


def serve(demo: Any, listening: socket.socket, host: str = "") -> None:
    """Serve the Gradio application `demo` until the program is interrupted; `host` as for `listen`."""
    server(demo, listening, host).run(sockets=[listening])


def server(demo: Any, listening: socket.socket, host: str = "") -> Any:
    """Return the uvicorn server of `demo`."""
    import fastapi
    import gradio as gr
    import uvicorn

    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app, demo, path="", server_name=listening.getsockname()[0], server_port=listening.getsockname()[1],
        theme=_theme(gr.themes), css=style, footer_links=[], ssr_mode=False, show_error=False, enable_monitoring=False,
    )  # fmt: skip
    guarded = Guard(app, listening, host)
    return uvicorn.Server(
        uvicorn.Config(
            guarded, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none", proxy_headers=False
        )
    )


class Guard:
    """An ASGI application that passes on only what the page itself asks for, at the address that it listens on.

    Another site can point its own name at this machine (DNS rebinding), but the Host header then has that name.
    Browsers add the Origin or Sec-Fetch-Site of the page that sends a request.
    """

    def __init__(self, app: Any, listening: socket.socket, host: str = "") -> None:
        bound, self.port = listening.getsockname()[:2]
        ip = ipaddress.ip_address(bound)
        self.app = app
        self.any_address = ip.is_unspecified  # a bare address cannot be rebound
        self.names = {_in_url(bound), _in_url(host.lower())} - {""}
        if ip.is_loopback or ip.is_unspecified:
            self.names.add("localhost")
        if ip.is_unspecified:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request as the page's own, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = (403, "not a web socket") if scope["type"] != "http" else self._refusal(scope)
        if refusal is None:
            await self.app(scope, _bounded(receive), _with_policy(send))
            return
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Return status and reason if this request is not answered."""
        given = [(name.lower(), value.decode("latin-1").lower()) for name, value in scope["headers"]]
        headers = dict(given)
        host = headers.get(b"host", "")
        if sum(name == b"host" for name, _ in given) != 1 or not self._is_own(host):
            names = ", ".join(f"http://{name}:{self.port}/" for name in sorted(self.names))
            return 421, f"this server answers at {names} only; --host names another address"
        navigates = scope["method"] in ("GET", "HEAD") and headers.get(b"sec-fetch-mode") == "navigate"
        foreign = headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin") and not navigates
        if foreign or headers.get(b"origin", f"http://{host}") != f"http://{host}":
            return 403, "this server answers to its own page only"
        if not _is_part_of_page(scope["method"], scope["path"]):
            return 404, "the page has no such part"
        length = headers.get(b"content-length", "0")
        if re.fullmatch("[0-9]{1,9}", length) is None or int(length) > _MAX_BODY:
            return 413, f"a request has at most {_MAX_BODY} bytes"
        return None

    def _is_own(self, host: str) -> bool:
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?", host)
        if match is None or int(match[2] or 80) != self.port:
            return False
        return match[1] in self.names or (self.any_address and _is_address(match[1]))


def _is_part_of_page(method: str, path: str) -> bool:
    if method in ("GET", "HEAD"):
        return path in _GET or path.startswith(_GET_BELOW)
    return method == "POST" and path in _POST


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _bounded(receive: Any) -> Any:
    """Wrap an ASGI receiver so that a body without a length ends at the bound, as if the browser had left."""
    num_bytes = 0

    async def bounded() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if num_bytes > _MAX_BODY else message

    return bounded


def _with_policy(send: Any) -> Any:
    """Wrap an ASGI sender so that browsers load nothing from other servers and tell them nothing."""

    async def send_with_policy(message: Any) -> None:
        if message["type"] == "http.response.start":
            more = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return send_with_policy


def _theme(themes: Any) -> Any:
    """Return Gradio's plain theme with the fonts of the system, which need no download."""
    plain = themes.Base(
        primary_hue=themes.colors.blue,
        neutral_hue=themes.colors.slate,
        font=_SANS,
        font_mono=_MONO,
        spacing_size=themes.sizes.spacing_sm,
    )
    return plain.set(
        button_primary_background_fill="#1768ac",
        button_primary_background_fill_hover="#12558d",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#2f7fc4",
        slider_color="#1768ac",
        slider_color_dark="#6db3f2",
    )
