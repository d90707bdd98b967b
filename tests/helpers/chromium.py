"""A headless Chromium for tests, driven through chromedriver (W3C WebDriver) with nothing but requests."""

import base64
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
)  # fmt: skip
_PATIENCE_SEC = 120


def chromium_paths() -> tuple[str, str] | None:
    """Paths of the browser and its driver; None if either is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def no_chromium() -> bool:
    """Return whether to skip tests that need a browser. Never in CI: there they fail without one."""
    return chromium_paths() is None and os.environ.get("CI", "").lower() not in ("1", "true")


class Browser:
    """One window."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, page: Path | str) -> None:
        """Open a file or a URL and wait until it is loaded."""
        self._call("POST", "url", {"url": page if isinstance(page, str) else page.absolute().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """Return the value of the script."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str, *args: Any) -> Any:
        """Wait until the expression `condition` is true in the page, and return its value."""
        script = f"""
        const args = arguments, done = args[args.length - 1];
        const look = () => {{
            let found = null;
            try {{ found = (function() {{ return {condition}; }}).apply(null, args); }} catch (error) {{}}
            found ? done(found) : setTimeout(look, 30);
        }};
        look();"""
        self._call("POST", "timeouts", {"script": 1000 * _PATIENCE_SEC - 10_000})
        return self._call("POST", "execute/async", {"script": script, "args": list(args)})

    def window(self) -> str:
        """Return the handle of the current window."""
        return str(self._call("GET", "window"))

    def new_window(self) -> None:
        """Open another tab and switch to it."""
        self.switch(self._call("POST", "window/new", {"type": "tab"})["handle"])

    def switch(self, handle: str) -> None:
        """Switch to another window."""
        self._call("POST", "window", {"handle": handle})

    def close_window(self) -> None:
        """Close the current window; call `switch` next."""
        self._call("DELETE", "window")

    def click(self, selector: str, *, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Click the first matching element at these shares of its width and height; again if the page moved it away."""
        listen = """
        window.pressed = false;
        const heard = event => { window.pressed = true; };
        document.querySelector(arguments[0]).addEventListener('pointerdown', heard, {once: true, capture: true});"""
        for _ in range(10):
            self.run(listen, selector)
            self._pointer([self._point(selector, at)])
            if self.run("return window.pressed"):
                return
        raise AssertionError(f"{selector} cannot be clicked")

    def drag(self, selector: str, start: float, end: float, *, num_moves: int = 5) -> None:
        """Press at the share `start` of an element's width, move to `end` in steps, and release."""
        shares = [start + (end - start) * i / num_moves for i in range(num_moves + 1)]
        self._pointer([self._point(selector, (share, 0.5)) for share in shares])

    def type(self, selector: str, text: str, *, leave: bool = True) -> None:
        """Click into an input, replace its content by `text`, and with `leave` press Enter and leave it.

        If the input proposes options, Enter waits until they match the text, as a user would.
        """
        self.click(selector)
        self.run("document.querySelector(arguments[0]).select()", selector)
        self._press(text)
        if not leave:
            return
        fits = "option => option.innerText.toLowerCase().includes(arguments[0].toLowerCase())"
        self.wait(f"[...document.querySelectorAll('[role=option]')].every({fits})", text)
        self._press("\ue007")
        self.run("document.activeElement.blur()")

    def _press(self, keys: str) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def devtools(self, command: str, **params: Any) -> Any:
        """Run a command of the DevTools protocol."""
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def view(self, width: int, height: int, *, scale: float = 1, dark: bool = False, media: str = "") -> None:
        """Set the window's size, color scheme and medium ('print', or '' for the screen)."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of the visible part, or of the whole page."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """PDF of the printed page."""
        return base64.b64decode(self.devtools("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def _point(self, selector: str, at: tuple[float, float]) -> tuple[int, int]:
        """Position in the window of a share of an element, after scrolling to it and once it no longer moves."""
        still = """(() => {
            const found = document.querySelector(arguments[0]);
            found.scrollIntoView({block: 'center', behavior: 'instant'});
            const {left, top, width, height} = found.getBoundingClientRect();
            const box = [left, top, width, height], before = window.lastBox;
            window.lastBox = box;
            return width > 0 && String(before) === String(box) && box;
        })()"""
        left, top, width, height = self.wait(still, selector)
        return round(left + at[0] * width), round(top + at[1] * height)

    def _pointer(self, points: list[tuple[int, int]]) -> None:
        moves = [{"type": "pointerMove", "x": x, "y": y, "duration": 20} for x, y in points]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self._call("POST", "actions", {"actions": [mouse]})

    def _call(self, method: str, path: str, data: Mapping[str, Any] | None = None) -> Any:
        answer = requests.request(method, f"{self._url}/{path}", json=data, timeout=_PATIENCE_SEC).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile in the folder `profile`, until the block ends."""
    paths = chromium_paths()
    assert paths is not None, "Chromium or chromedriver is missing; .ci/run installs both with apt as root"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [paths[1], f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if "started successfully" in line:
                break
        url = f"http://127.0.0.1:{port}/session"
        options = {"binary": paths[0], "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        answer = requests.post(url, json=wanted, timeout=_PATIENCE_SEC).json()["value"]
        assert "sessionId" in answer, answer
        try:
            yield Browser(f"{url}/{answer['sessionId']}")
        finally:
            requests.delete(f"{url}/{answer['sessionId']}", timeout=_PATIENCE_SEC)
    finally:
        driver.terminate()
        driver.wait(timeout=120)
        if driver.stdout is not None:
            driver.stdout.close()
