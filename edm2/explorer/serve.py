"""The web server of the page: on a socket of this machine, reaching out to nothing."""

import os
import socket
from typing import Any

from dnnlib.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 7860, 100

# What a browser may load for the page: what comes from this server, or is in the page. Gradio's page runs scripts in
# itself and makes functions out of text.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self';"
    " form-action 'self'; frame-ancestors 'self'"
)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that waits for browsers, at the first free port from 7860 on where none is asked for.

    Raises ConfigError where that cannot be.
    """
    ports = range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS) if port is None else (port,)
    reason = ""
    for number in ports:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family)
        except socket.gaierror:
            raise ConfigError(f"--host={host} is no address of this machine; 127.0.0.1 is for itself alone") from None
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    if port is None:
        raise ConfigError(f"no port of {host} from {ports[0]} to {ports[-1]} can be used ({reason}); give a --port")
    raise ConfigError(f"--port={port} of {host} cannot be used ({reason}); leave it out to take a free one")


def address(listening: socket.socket) -> str:
    """The page's URL."""
    host, port = listening.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


def quiet_gradio() -> None:
    """Make Gradio, which is not imported yet, keep to itself: no reports of use, no question for a newer version."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def serve(demo: Any, listening: socket.socket) -> None:
    """Show the Gradio application `demo` until the program is interrupted."""
    import fastapi
    import gradio as gr
    import uvicorn

    from edm2.explorer.theme import STYLE, theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app, demo, path="", server_name=listening.getsockname()[0], server_port=listening.getsockname()[1],
        theme=theme(), css=STYLE, footer_links=[], ssr_mode=False, show_error=False, enable_monitoring=False,
    )  # fmt: skip
    config = uvicorn.Config(_keeping_to_itself(app), log_level="error", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _keeping_to_itself(app: Any) -> Any:
    """The ASGI application `app`, with headers that tell browsers to load nothing from elsewhere and to tell nobody."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await app(scope, receive, send_with_policy if scope["type"] == "http" else send)

    return wrapped
