"""The page's content as HTML: images, progress, messages, and commands to copy."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from edm2.explorer.grids import Film, Grid, Progress
from edm2.explorer.setting import Setting
from training.images.png import encode_png
from training.images.sheet import SHEET_GAP, contact_sheet

CHANGED = "The settings have changed; Generate makes their images"
STOPPED = "Stopped; the images are unfinished"
_SHEET_WIDTH, _MAX_ZOOM = 680, 6  # small sheets are enlarged by whole multiples, up to this width
_FRAME_WIDTH = 96

_WORDS = {
    "net": "network", "ema": "EMA length", "guide": "guide", "guidance": "guidance", "interval": "guided noise levels",
    "class_idx": "class", "first_seed": "first seed", "num_images": "images", "num_steps": "steps", "solver": "solver",
}  # fmt: skip

# The clipboard of browsers needs HTTPS or this machine; elsewhere the text is selected and copied.
_COPY = (
    "const b=this,t=b.closest('.command').querySelector('pre').innerText;"
    "const done=()=>{b.innerText='Copied';setTimeout(()=>b.innerText='Copy',1500)};"
    "const old=()=>{const r=document.createRange();r.selectNodeContents(b.closest('.command').querySelector('pre'));"
    "const s=getSelection();s.removeAllRanges();s.addRange(r);document.execCommand('copy');done()};"
    "navigator.clipboard?navigator.clipboard.writeText(t).then(done,old):old()"
)


def status(text: str, *, share: float | None = None, kind: str = "") -> str:
    """Return a line of text below a bar that is filled to `share` (0 to 1) while work is running."""
    width = 0 if share is None else 100 * share
    kind = kind if share is None else "busy"
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="state {kind}"><div class="bar"><i style="width:{width:.1f}%"></i></div>'
        f'<p role="{role}">{escape(text)}</p></div>'
    )


def differences(a: Setting, b: Setting) -> str:
    """Describe the differences of two settings."""
    texts = [f"{_WORDS[name]} {_value(getattr(a, name))} and {_value(getattr(b, name))}" for name in a.differences(b)]
    return f"A and B differ: {', '.join(texts)}" if texts else "A and B are the same setting"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{level:g}" for level in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def unfinished(record: Progress) -> str:
    """Return the grid with estimates, and gray for images that are not started."""
    assert record.images is not None
    return _sheet(contact_sheet(record.images, num_columns=record.num_columns), record, "unfinished images")


def grid(record: Grid, commands: Sequence[str], *, name: str, class_names: Sequence[str] = ()) -> str:
    """Return finished images, their description, a download named `name`, and the commands that make them."""
    sheet = record.sheet()
    about = _about(record.setting, record.classes, class_names)
    return _sheet(sheet, record, "generated images") + _below([about, *record.notes], commands, sheet, name)


def film(record: Film, commands: Sequence[str], class_names: Sequence[str] = ()) -> str:
    """Return a film strip with a column for each noise level."""
    columns = [
        f"<figure><figcaption>{'image' if frame.sigma == 0 else f'<i>σ = </i>{frame.sigma:.3g}'}</figcaption>"
        f"{_image(frame.noisy, _FRAME_WIDTH, 'noisy state')}{_image(frame.denoised, _FRAME_WIDTH, 'denoised')}</figure>"
        for frame in record.frames
    ]
    strip = (
        '<div class="strip"><div class="sides"><span></span><span>state</span><span>denoised</span></div>'
        f'<div class="frames">{"".join(columns)}</div></div>'
    )
    about = f"Seed {record.setting.first_seed}"
    about += "" if record.image_class is None else f", {_class(record.image_class, class_names)}"
    return strip + _below([about, *record.notes], commands, record.sheet(), "film-strip")


def _class(index: int, names: Sequence[str]) -> str:
    return f"class {index}: {names[index]}" if index < len(names) else f"class {index}"


def _about(setting: Setting, classes: list[int] | None, names: Sequence[str]) -> str:
    count, first = setting.num_images, setting.first_seed
    seeds = f"Seed {first}" if count == 1 else f"{count} images, seeds {first}–{first + count - 1}"
    if classes is None:
        return f"{seeds}, without a class" if setting.class_idx == "none" else seeds
    if isinstance(setting.class_idx, int):
        return f"{seeds}, {_class(setting.class_idx, names)}"
    return f"{seeds}, {'classes drawn by the seeds' if setting.class_idx is None else 'a row for each class'}"


def _below(lines: Sequence[str], commands: Sequence[str], sheet: np.ndarray, name: str) -> str:
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    # Lines break between options, not within one.
    shown = "\n".join(
        " ".join(f"<span>{escape(part)}</span>" for part in line.replace(" --", "\0--").split("\0"))
        for line in commands
    )
    return (
        f'<div class="below"><div>{notes}</div>'
        f'<a class="download" download="{escape(name)}.png" href="{_data_url(sheet)}">Download PNG</a></div>'
        '<div class="command"><div class="head"><span>The command for this</span>'
        f'<button type="button" onclick="{escape(_COPY)}">Copy</button></div><pre>{shown}</pre></div>'
    )


def _sheet(sheet: np.ndarray, record: Progress | Grid, alt: str) -> str:
    """Return the contact sheet of a record, with the numbers that clicks.js needs."""
    assert record.images is not None
    count, _, height, width = record.images.shape
    zoom = max(min(_SHEET_WIDTH // sheet.shape[2], _MAX_ZOOM), 1)
    return (
        f'<div class="sheet" data-count="{count}" data-columns="{record.num_columns}" data-gap="{SHEET_GAP}"'
        f' data-cell="{width + SHEET_GAP},{height + SHEET_GAP}">'
        f"{_image(sheet, sheet.shape[2] * zoom, f'{count} {alt}')}</div>"
    )


def _image(pixels: np.ndarray, shown_width: int, alt: str) -> str:
    height, width = pixels.shape[1:]
    sharp = " sharp" if shown_width >= width else ""
    return (
        f'<img class="pixels{sharp}" src="{_data_url(pixels)}" width="{shown_width}"'
        f' height="{round(height * shown_width / width)}" alt="{escape(alt)}">'
    )


def _data_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode('ascii')}"
