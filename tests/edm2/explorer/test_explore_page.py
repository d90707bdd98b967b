"""The explorer in a browser, used like a person does: clicks, drags, typing, and what the page then shows.

`python -m tests.edm2.explorer.test_explore_page` renews docs/explore.png.
"""

import base64
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest

import generate_images
import reconstruct_phema
from tests.helpers.chromium import Browser, chromium, no_chromium
from tests.helpers.paths import ROOT

SCREENSHOT = ROOT / "docs" / "explore.png"
NET = "tests/golden/snapshots/rgb-cond.pkl"
GUIDE = "tests/golden/snapshots/rgb-cond-guide.pkl"
RUN = "tests/golden/snapshots/run"
WIDTH, HEIGHT = 1280, 940

pytest.importorskip("gradio")
pytestmark = pytest.mark.skipif(no_chromium(), reason="needs Chromium and chromedriver")


@contextmanager
def served(errors: Path) -> Iterator[str]:
    """URL of an explorer with default options, which runs until the block ends; its stderr goes to `errors`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(errors, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "explore.py"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found, errors.read_text()
            yield found[0]
        finally:
            process.terminate()
            process.wait(timeout=120)
            process.stdout.close()


class Explored:
    """The page in a browser, by its user's actions."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url

    def open(self) -> None:
        """Load the page again, and wait for its first images."""
        self.browser.get(self.url)
        self.browser.wait("document.querySelector('#grid pre')")

    def tab(self, name: str) -> None:
        self.browser.wait("document.querySelector('#tabs button[role=tab]')")
        index = ["Grid", "Compare", "Film strip"].index(name) + 1
        self.browser.click(f"#tabs button[role=tab]:nth-of-type({index})")

    def number(self, control: str, value: str) -> None:
        self._type(f"#{control} input[type=number]", value)

    def choose(self, control: str, value: str) -> None:
        """Type into a picker."""
        self._type(f"#{control} input", value)

    def pick(self, control: str, option: str) -> None:
        """Open a picker, and click one of its options."""
        self.browser.click(f"#{control} input")
        offered = f"[role=option][aria-label={json.dumps(option)}]"
        self.browser.wait("document.querySelector(arguments[0])", offered)
        self.browser.click(offered)

    def _type(self, selector: str, value: str) -> None:
        self.browser.wait("document.querySelector(arguments[0])?.offsetWidth", selector)
        self.browser.type(selector, value)

    def shown(self, view: str, *words: str) -> None:
        """Wait for finished images whose command has all these words."""
        self.browser.wait(
            "arguments[1].every(word => document.querySelector(arguments[0]).innerText.includes(word))"
            " && !document.querySelector('.busy')",
            f"#{view} pre",
            list(words),
        )

    def commands(self, view: str) -> list[str]:
        return self.browser.run("return document.querySelector(arguments[0]).innerText", f"#{view} pre").split("\n")

    def image(self, view: str) -> np.ndarray:
        return from_url(self.browser.run("return document.querySelector(arguments[0]).src", f"#{view} .sheet img"))

    def status(self) -> str:
        return self.browser.run("return document.querySelector('#status p').innerText")

    def says(self, pattern: str) -> str:
        """Wait until the status matches, and return it."""
        found = "document.querySelector('#status p').innerText"
        return self.browser.wait(f"RegExp(arguments[0]).test({found}) && {found}", pattern)


def from_url(url: str) -> np.ndarray:
    assert url.startswith("data:image/png;base64,")
    return pixels(base64.b64decode(url.partition(",")[2]))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def stderr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "errors.txt"


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory, stderr: Path) -> Iterator[Explored]:
    with served(stderr) as url, chromium(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.view(WIDTH, HEIGHT)
        yield Explored(browser, url)


@pytest.fixture
def page(explored: Explored) -> Explored:
    explored.open()
    return explored


def made_by(lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Pixels of the grid that the command lines write to `folder`/out, run unchanged."""
    monkeypatch.chdir(folder)
    for name in ("models", "tests"):
        (folder / name).symlink_to(ROOT / name)
    commands = {"generate_images.py": generate_images.cmdline, "reconstruct_phema.py": reconstruct_phema.cmdline}
    for line in lines:
        python, script, *words = shlex.split(line)
        assert python == "python"
        result = click.testing.CliRunner().invoke(commands[script], words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return pixels((folder / "out" / "grid.png").read_bytes())


def test_it_shows_the_shipped_model_at_once_and_loads_nothing_from_other_servers(page):
    assert page.image("grid").shape == (138, 138)
    (line,) = page.commands("grid")
    assert "--net=models/fashion.safetensors --gnet=models/fashion-guide.safetensors --guidance=1.5" in line
    names = page.browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith((page.url, "data:")) for name in names)


def test_the_documented_screenshot_is_what_the_page_shows(page):
    now, documented = (pixels(png)[..., :3].astype(int) for png in (page.browser.screenshot(), SCREENSHOT.read_bytes()))
    assert now.shape == documented.shape
    # Fonts differ between machines; the layout does not. Means over squares of 20 pixels:
    squares = [image.reshape(HEIGHT // 20, 20, WIDTH // 20, 20, 3).mean((1, 3, 4)) for image in (now, documented)]
    assert np.abs(squares[0] - squares[1]).mean() < 12
    assert np.corrcoef(squares[0].ravel(), squares[1].ravel())[0, 1] > 0.8


def test_a_run_whose_ema_length_is_dragged(page, tmp_path, monkeypatch):
    page.pick("a-guide", "none")
    page.choose("a-net", RUN)
    page.shown("grid", "network-snapshot-0033554-0.100.pkl")
    before = page.image("grid")
    page.browser.drag("#a-ema input[type=range]", 0.37, 0.8)
    page.shown("grid", "reconstruct_phema.py", "phema-0033554-0.2")
    length = float(page.browser.run("return document.querySelector('#a-ema input').value"))
    assert 0.19 < length < 0.22
    lines = page.commands("grid")
    assert f"--outstd={length:.3f}" in lines[0] and len(lines) == 2
    after = page.image("grid")
    assert not np.array_equal(before, after)
    assert np.array_equal(made_by(lines, tmp_path, monkeypatch), after)


def test_two_settings_side_by_side(page, tmp_path, monkeypatch):
    page.choose("a-net", NET)
    page.choose("a-guide", GUIDE)
    page.number("num_images", "4")
    page.shown("grid", NET, GUIDE, "--seeds=0-3")
    page.tab("Compare")
    page.says("A and B differ: network")
    page.browser.click("#copy")
    page.says("A and B are the same setting")
    assert np.array_equal(page.image("view-a"), page.image("view-b"))
    assert NET in page.browser.run("return document.querySelector('#b-net input').value")
    page.browser.drag("#b-guidance input[type=range]", 0.38, 0.9)
    assert re.search(r"guidance 1.5 and 3\.\d", page.says("A and B differ: guidance"))
    a, b = page.image("view-a"), page.image("view-b")
    assert not np.array_equal(a, b)
    lines = page.commands("view-b")
    assert "--guidance=3." in lines[0] and "--seeds=0-3" in lines[0]
    assert np.array_equal(made_by(lines, tmp_path, monkeypatch), b)


def test_the_second_setting_can_take_over_a_run(page):
    page.pick("a-guide", "none")
    page.choose("a-net", RUN)
    page.shown("grid", "network-snapshot-0033554-0.100.pkl")
    page.tab("Compare")
    page.says("A and B differ: network")
    page.browser.click("#copy")
    page.says("A and B are the same setting")
    page.browser.drag("#b-ema input[type=range]", 0.37, 0.2)
    page.says("A and B differ: EMA length 0.1 and 0.0")
    assert "reconstruct_phema.py" in page.commands("view-b")[0]


def test_a_click_on_an_image_shows_how_it_came_into_being(page):
    page.choose("a-net", NET)
    page.pick("a-guide", "none")
    page.number("num_images", "4")
    page.shown("grid", NET, "--seeds=0-3")
    grid = page.image("grid")
    size = (len(grid) - 6) // 2
    page.browser.click("#grid .sheet img", at=(0.75, 0.25))
    page.browser.wait("document.querySelector('#film .strip') && !document.querySelector('.busy')")
    (line,) = page.commands("film")
    assert "--seeds=1 " in line
    captions = page.browser.run("return [...document.querySelectorAll('#film figcaption')].map(e => e.innerText)")
    assert captions[0] == "σ = 80" and captions[-1] == "image" and len(captions) == 8
    images = [
        from_url(url)
        for url in page.browser.run("return [...document.querySelectorAll('#film figure img')].map(e => e.src)")
    ]
    assert np.array_equal(images[-1], grid[2 : 2 + size, 4 + size : 4 + 2 * size])
    page.number("image", "9")
    assert "choose one from 1 to 4" in page.says("image 9 does not exist")


def test_cancel_stops_and_does_not_hold_up_the_next_request(page):
    page.number("num_images", "64")
    page.number("a-num_steps", "64")
    page.browser.wait(
        "document.querySelector('.busy') && document.querySelector('#status').innerText.includes('of 64')"
    )
    page.browser.click("#cancel")
    page.says("Stopped; the images are unfinished")
    assert page.browser.run("return document.querySelector('#grid pre')") is None  # no command makes these images
    page.number("a-num_steps", "2")
    page.pick("a-guide", "none")
    page.shown("grid", "--steps=2", "--seeds=0-63")


def test_errors_are_shown_on_the_page(page):
    before = page.commands("grid")
    page.choose("a-net", "no/such/network.pkl")
    assert "no/such/network.pkl" in page.says("no/such")
    assert page.browser.run("return document.querySelector('#status [role=alert]') !== null")
    page.choose("a-net", "models/toy-clsA-layers04-dim32.safetensors")
    page.says("toy")
    page.choose("a-net", "models/fashion.safetensors")
    page.says("Done")
    page.browser.click("#a-limited input")
    page.number("a-low", "9")
    assert "make the first smaller" in page.says("above 9 and up to 2.9")
    page.browser.click("#a-limited input")
    page.pick("a-class_idx", "all, a row for each")
    assert "choose 10 or 20 or 30" in page.says("16 images cannot show each of 10 classes")
    assert page.commands("grid") == before  # of the images that are still shown


def test_what_is_typed_is_shown_and_computed(page):
    """Beyond the slider's ends too; what is out of range is a line, and stays where it was typed."""
    typed = {"first_seed": "123456", "num_images": "2", "a-num_steps": "70", "a-guidance": "4.5"}
    for control, value in typed.items():
        page.number(control, value)
    page.shown("grid", "--guidance=4.5", "--steps=70", "--seeds=123456-123457")
    for control, value in typed.items():
        assert page.browser.run("return document.querySelector(arguments[0]).value", f"#{control} input") == value
    page.number("first_seed", "5000000000")
    page.says("5e\\+09 as first seed is out of range")
    page.number("first_seed", "0")
    page.pick("a-guide", "none")
    page.choose("a-net", RUN)
    page.shown("grid", "network-snapshot-0033554-0.100.pkl")
    for length in ("0.5", "0.1234"):
        page.number("a-ema", length)
        page.says(f"EMA length {length} must be from 0.001 to 0.288, in thousandths")


def test_a_run_offers_its_early_snapshots_as_guides_and_none_that_cannot_fit(page):
    page.choose("a-net", RUN)
    page.shown("grid", "network-snapshot-0033554-0.100.pkl", "--seeds=0-15")
    assert "--gnet" not in page.commands("grid")[0]  # the shipped guide is for other images
    page.pick("a-guide", "earlier: network-snapshot-0016777-0.100")
    page.shown("grid", f"--gnet={RUN}/network-snapshot-0016777-0.100.pkl")
    page.browser.click("#a-guide input")
    page.browser.wait("document.querySelector('[role=option]')")
    offered = page.browser.run("return [...document.querySelectorAll('[role=option]')].map(e => e.innerText.trim())")
    names = [name.removeprefix("✓").strip() for name in offered]
    assert names == ["none", *(f"earlier: network-snapshot-{n}-0.100" for n in ("0008388", "0016777", "0025165"))]


def test_the_film_strip_is_seen_whole(page):
    page.tab("Film strip")
    for count in ("8", "16"):
        page.number("frames", count)
        page.browser.wait("document.querySelectorAll('#film figure').length == arguments[0]", int(count))
        last = "[...document.querySelectorAll('#film figure img')].pop().getBoundingClientRect().right"
        assert page.browser.run(f"return {last} <= document.querySelector('.frames').getBoundingClientRect().right + 1")
    page.tab("Grid")


def test_changes_can_wait_for_the_button(page):
    page.pick("a-guide", "none")
    page.choose("a-net", NET)
    page.shown("grid", NET)
    page.browser.click("#live input")
    page.number("num_images", "2")
    page.says("Generate makes their images")
    assert "--seeds=0-15" in page.commands("grid")[0]
    page.browser.click("#go")
    page.shown("grid", "--seeds=0-1")


def test_two_windows_do_not_disturb_each_other(page):
    browser = page.browser
    page.pick("a-guide", "none")
    page.choose("a-net", NET)
    page.number("num_images", "3")
    page.shown("grid", NET, "--seeds=0-2")
    first = browser.window()
    browser.new_window()
    page.open()
    page.number("num_images", "64")
    page.number("a-num_steps", "64")
    page.says("Step .* of 64")
    second = browser.window()
    browser.switch(first)
    page.number("num_images", "5")
    page.says("Waiting for another page")
    browser.switch(second)
    browser.click("#cancel")
    page.says("Stopped")
    browser.switch(first)
    page.shown("grid", NET, "--seeds=0-4")
    browser.switch(second)
    browser.click("#go")
    page.says("Step .* of 64")
    browser.switch(first)
    page.number("num_images", "6")
    page.says("Waiting for another page")
    browser.click("#cancel")
    page.says("Stopped")
    browser.switch(second)
    page.number("a-num_steps", "1000")  # longer than the browser waits
    page.says("Step .* of 1000")
    browser.close_window()
    browser.switch(first)
    page.number("num_images", "7")
    page.shown("grid", NET, "--seeds=0-6")


def test_the_image_can_be_downloaded_and_the_command_copied(page, tmp_path):
    page.browser.devtools(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True
    )
    href = page.browser.run("return document.querySelector('#grid a.download').href")
    assert np.array_equal(from_url(href), page.image("grid"))
    page.browser.click("#grid a.download")
    page.browser.click("#grid .command button")
    page.browser.wait("document.querySelector('#grid .command button').innerText == 'Copied'")
    for _ in range(1000):
        if (tmp_path / "grid.png").exists():
            break
        page.browser.run("return 1")
    assert np.array_equal(pixels((tmp_path / "grid.png").read_bytes()), page.image("grid"))


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (390, 844), (320, 640)])
def test_everything_fits_the_window(explored, size):
    browser = explored.browser
    browser.view(*size, dark=size[0] == 390)
    try:
        explored.open()
        for tab, view in (("Grid", "grid"), ("Compare", "view-b"), ("Film strip", "film")):
            explored.tab(tab)
            browser.wait(
                "document.querySelector(arguments[0])?.offsetWidth && !document.querySelector('.busy')", f"#{view} pre"
            )
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
            outside = """return [...document.querySelectorAll('#layout *')].filter(e => !e.closest('.frames') &&
                e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));"""
            assert browser.run(outside) == []
        page, ink = browser.run(
            "const body = getComputedStyle(document.body);"
            "const text = getComputedStyle(document.querySelector('#film pre'));"
            "const numbers = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);"
            "return [numbers(body.backgroundColor), numbers(text.color)]"
        )
        assert (np.mean(page) < 60) == (size[0] == 390) and abs(np.mean(page) - np.mean(ink)) > 150
    finally:
        browser.view(WIDTH, HEIGHT)


def test_the_terminal_shows_no_error(explored, stderr):
    """Runs last, after everything else that the page did."""
    assert stderr.read_text() == ""


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as name,
        served(Path(name) / "errors.txt") as shown_at,
        chromium(Path(name) / "profile") as window,
    ):
        window.view(WIDTH, HEIGHT)
        Explored(window, shown_at).open()
        SCREENSHOT.write_bytes(window.screenshot())
