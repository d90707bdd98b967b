"""The report in a browser: on a wide screen, on a phone, in the dark and on paper.

`python -m tests.edm2.report.test_report_page` takes docs/report.png again.
"""

import io
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from edm2.report.document import render
from edm2.report.record import read_run
from tests.helpers.chromium import Browser, chromium, no_chromium
from tests.helpers.paths import ROOT

RUN = ROOT / "tests" / "runs" / "fashion"
SCREENSHOT = ROOT / "docs" / "report.png"
WIDTH, HEIGHT = 1280, 1500

pytestmark = pytest.mark.skipif(no_chromium(), reason="needs Chromium and chromedriver")


def write_page(dest: Path) -> Path:
    """The report of the kept run, as of one fixed time."""
    dest.write_text(render(read_run(RUN), now=datetime(2026, 11, 24, 23, 0, tzinfo=UTC)), encoding="utf-8")
    return dest


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with chromium(folder / "profile") as found:
        found.view(WIDTH, HEIGHT)
        found.get(write_page(folder / "report.html"))
        yield found


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# Texts of the drawings whose size on the page is below `least` pixels, and elements that reach beyond the window.
_TOO_SMALL = """
const shown = [...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length);
return [shown.length, shown.filter(t => t.getBoundingClientRect().height < arguments[0]).length];
"""
_OUTSIDE = """
const scrolled = e => e.closest('.earlier') !== null;
return [...document.querySelectorAll('body *')].filter(
    e => !scrolled(e) && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (800, 1100), (390, 844), (320, 640)])
def test_everything_fits_the_window_and_can_be_read(browser, size):
    browser.view(*size)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(_OUTSIDE) == []
    num_texts, num_small = browser.run(_TOO_SMALL, 9)
    assert num_texts > 40 and num_small == 0
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_ticks_do_not_cover_one_another(browser):
    script = """
    return [...document.querySelectorAll('svg[role]')].filter(s => s.getClientRects().length).map(s =>
        [...s.querySelectorAll('text')].map(t => t.getBoundingClientRect()).map(
            r => [r.left, r.top, r.right, r.bottom]));
    """
    for size in ((WIDTH, HEIGHT), (390, 844)):
        browser.view(*size)
        drawings = browser.run(script)
        assert len(drawings) >= 6
        for boxes in drawings:
            for i, (left, top, right, bottom) in enumerate(boxes):
                for other in boxes[:i]:
                    over_x = min(right, other[2]) - max(left, other[0])
                    over_y = min(bottom, other[3]) - max(top, other[1])
                    assert over_x <= 0 or over_y <= 3, (boxes[i], other)  # line boxes have some air


def test_dark_and_light_differ_and_both_have_contrast(browser):
    for dark in (False, True):
        browser.view(WIDTH, HEIGHT, dark=dark)
        page, ink = browser.run(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => c.match(/\\d+/g))"
        )
        background, text = np.array(page, dtype=int).mean(), np.array(ink, dtype=int).mean()
        assert (background < 60) == dark and abs(background - text) > 150
        shown = pixels(browser.screenshot())
        assert np.median(shown) == pytest.approx(background, abs=12)
        colors = shown @ [1 << 16, 1 << 8, 1]
        assert len(np.unique(colors)) > 50  # colored curves, grays of samples
    browser.view(WIDTH, HEIGHT)


def test_on_paper_it_is_light_and_takes_few_pages(browser):
    browser.view(WIDTH, HEIGHT, dark=True)
    document = browser.pdf()
    assert document[:5] == b"%PDF-"
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 8
    browser.view(WIDTH, HEIGHT, dark=True, media="print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.view(WIDTH, HEIGHT)


def test_nothing_is_loaded_and_nothing_is_complained_about(browser):
    names = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def test_the_documented_screenshot_is_up_to_date(browser):
    browser.view(WIDTH, HEIGHT)
    shown, kept = pixels(browser.screenshot()), pixels(SCREENSHOT.read_bytes())
    assert shown.shape == kept.shape
    # Fonts differ between machines; the layout does not. Means over squares of 20 pixels:
    squares = [image.reshape(HEIGHT // 20, 20, WIDTH // 20, 20, 3).mean((1, 3, 4)) for image in (shown, kept)]
    assert np.abs(squares[0] - squares[1]).mean() < 12
    assert np.corrcoef(squares[0].ravel(), squares[1].ravel())[0, 1] > 0.8


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, chromium(Path(name) / "profile") as window:
        window.view(WIDTH, HEIGHT)
        window.get(write_page(Path(name) / "report.html"))
        SCREENSHOT.write_bytes(window.screenshot())
