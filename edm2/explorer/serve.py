"""The web server of the page: its look, its socket on this machine, and headers that keep browsers from elsewhere."""

import os
import socket
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


def quiet_gradio() -> None:
    """Turn Gradio's usage reports and version checks off; must be called before Gradio is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def serve(demo: Any, listening: socket.socket) -> None:
    """Serve the Gradio application `demo` until the program is interrupted."""
    import fastapi
    import gradio as gr
    import uvicorn

    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app, demo, path="", server_name=listening.getsockname()[0], server_port=listening.getsockname()[1],
        theme=_theme(gr.themes), css=style, footer_links=[], ssr_mode=False, show_error=False, enable_monitoring=False,
    )  # fmt: skip
    config = uvicorn.Config(_with_policy(app), log_level="error", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _with_policy(app: Any) -> Any:
    """Wrap an ASGI application so that browsers load nothing from other servers and tell them nothing."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await app(scope, receive, send_with_policy if scope["type"] == "http" else send)

    return wrapped


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
