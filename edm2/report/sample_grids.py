"""A run's sample grids as images for the page: the newest large, earlier ones small, and a strip of one seed."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import PIL.Image

from edm2.report.record import Grid
from training.images.decode import Unreadable, on_background, open_image

T = TypeVar("T")

MAX_EARLIER = 12  # grids besides the newest
STRIP_COLUMNS = 8
STRIP_ROWS = 10

_MAX_SIDE, _MAX_EARLIER_SIDE, _STRIP_CELL = 1600, 480, 96  # pixels
_MAX_SHOWN_HEIGHT = 760
_LOSSLESS_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """An image that the page contains."""

    nimg: int
    url: str  # data:
    width: int  # pixels on the page
    height: int


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One seed of each class over the run: a column for each time."""

    nimgs: list[int]
    image: PageImage


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of `items`, evenly spaced, with the first and the last; all if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def newest_image(grid: Grid) -> PageImage:
    """The grid in the width of the page."""
    return _whole_image(grid, max_side=_MAX_SIDE, shown=640)


def earlier_images(grids: Sequence[Grid]) -> list[PageImage]:
    """At most MAX_EARLIER grids before the newest, small."""
    return [_whole_image(grid, max_side=_MAX_EARLIER_SIDE, shown=300) for grid in spread(grids[:-1], MAX_EARLIER)]


def _whole_image(grid: Grid, *, max_side: int, shown: int) -> PageImage:
    return _page_image(_opaque(grid), grid.nimg, max_side=max_side, shown=shown)


def _opaque(grid: Grid) -> PIL.Image.Image:
    """The grid, gray or RGB, with white behind transparent pixels."""
    with open_image(grid.path.read_bytes()) as image:
        image.load()
        return image if image.mode in ("L", "RGB") else on_background(image)


def strip_of(grids: Sequence[Grid]) -> Strip | None:
    """The first image of each row of the grids, over time; None unless two grids record the same layout."""
    recorded = [grid for grid in grids if _cell(grid) is not None]
    same = [grid for grid in recorded if _layout(grid) == _layout(recorded[-1])]
    chosen = spread(same, STRIP_COLUMNS)
    if len(chosen) < 2:
        return None
    cell = _cell(chosen[-1])
    assert cell is not None
    width, height, gap, rows = cell
    scale = min(1.0, _STRIP_CELL / max(width, height))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    picked = spread(range(rows), STRIP_ROWS)
    sheet = PIL.Image.new("RGB", (len(chosen) * (size[0] + gap) - gap, len(picked) * (size[1] + gap) - gap), "white")
    for column, grid in enumerate(chosen):
        whole = _opaque(grid).convert("RGB")
        for place, row in enumerate(picked):
            top = gap + row * (height + gap)
            left = gap + (width + gap) * bool(grid.about.get("pictures"))  # after the row's conditioning image
            part = whole.crop((left, top, left + width, top + height))
            part = part if scale == 1.0 else part.resize(size, PIL.Image.Resampling.LANCZOS)
            sheet.paste(part, (column * (size[0] + gap), place * (size[1] + gap)))
    image = _page_image(sheet, chosen[-1].nimg, max_side=_MAX_SIDE, shown=560)
    return Strip(nimgs=[grid.nimg for grid in chosen], image=image)


def _cell(grid: Grid) -> tuple[int, int, int, int] | None:
    """Width and height of an image in the grid, the gap, and the number of rows; None if the file lacks them."""
    try:
        _, height, width = (int(n) for n in grid.about["image"])
        gap, rows = int(grid.about["gap"]), len(grid.about["classes"])
        columns = len(grid.about["seeds"][0]) + len(grid.about.get("pictures", []))
        with open_image(grid.path.read_bytes()) as image:
            size = image.size
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, OSError, Unreadable):
        return None
    fits = size == (gap + columns * (width + gap), gap + rows * (height + gap))
    return (width, height, gap, rows) if fits and min(width, height, rows) > 0 and gap >= 0 else None


def _layout(grid: Grid) -> object:
    return [grid.about[key] for key in ("image", "gap", "classes", "seeds")]


def _page_image(image: PIL.Image.Image, nimg: int, *, max_side: int, shown: int) -> PageImage:
    """Reduce `image` to `max_side` pixels; small images are shown at whole multiples, up to `shown` pixels wide."""
    factor = min(1.0, max_side / max(image.size))
    if factor < 1:
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        image = image.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    kind = "png"
    if data.tell() > _LOSSLESS_BYTES:
        data, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(data, format="JPEG", quality=85, optimize=True)
    url = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    times = max(min(shown // image.width, _MAX_SHOWN_HEIGHT // image.height), 1)
    return PageImage(nimg=nimg, url=url, width=image.width * times, height=image.height * times)
