"""A headless Chromium for tests, driven through chromedriver (W3C WebDriver) with nothing but requests."""

import base64
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
    """The browser and its driver; None where either is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, page: Path) -> None:
        """Open a file and wait until it is loaded."""
        self._call("POST", "url", {"url": page.absolute().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """The value that the script returns."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(args)})

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def view(self, width: int, height: int, *, scale: float = 1, dark: bool = False, media: str = "") -> None:
        """Take this size, colour scheme and medium ('print', or '' for the screen)."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of what is seen, or of the whole page."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it would be printed."""
        return base64.b64decode(self.devtools("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def _call(self, method: str, path: str, data: Mapping[str, Any] | None = None) -> Any:
        answer = requests.request(method, f"{self._url}/{path}", json=data, timeout=_PATIENCE_SEC).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in the folder `profile`, until the block ends."""
    paths = chromium_paths()
    assert paths is not None
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
        driver.wait()
        if driver.stdout is not None:
            driver.stdout.close()
