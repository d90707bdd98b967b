"""What the page shows, as HTML: pictures, progress, messages, commands to copy."""

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from edm2.explorer.grids import Film, Grid, Progress
from edm2.explorer.networks import Loading
from edm2.explorer.setting import Setting
from training.images.png_files import encode_png
from training.images.sheet import SHEET_GAP, contact_sheet

_SHOWN_WIDTH, _MAX_ZOOM = 680, 6  # small pictures are shown by whole multiples, up to this wide
_FRAME_WIDTH = 96

_COPY = (
    "const b=this,t=b.closest('.command').querySelector('pre').innerText;"
    "const done=()=>{b.innerText='Copied';setTimeout(()=>b.innerText='Copy',1500)};"
    "const old=()=>{const r=document.createRange();r.selectNodeContents(b.closest('.command').querySelector('pre'));"
    "const s=getSelection();s.removeAllRanges();s.addRange(r);document.execCommand('copy');done()};"
    "navigator.clipboard?navigator.clipboard.writeText(t).then(done,old):old()"
)


def status(text: str, *, share: float | None = None, kind: str = "") -> str:
    """A line that says what is going on, over a bar that says how far (0 to 1)."""
    width = 0 if share is None else 100 * share
    kind = kind if share is None else "busy"
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="state {kind}"><div class="bar"><i style="width:{width:.1f}%"></i></div>'
        f'<p role="{role}">{escape(text)}</p></div>'
    )


def progress_text(record: Loading | Progress) -> str:
    """How far the work is, in words."""
    if isinstance(record, Loading):
        return f"Loading {record.name}" + (f": {record.done} of {record.total}" if record.total > 1 else "")
    batch = f" · images {record.batch_idx + 1} of {record.num_batches}" if record.num_batches > 1 else ""
    return f"Step {record.step_idx + 1} of {record.num_steps} · noise level {record.sigma:.3g}{batch}"


def unfinished(record: Progress) -> str:
    """The grid as far as it is: estimates, and grey for what is not begun; '' where there is nothing to see yet."""
    if record.images is None:
        return ""
    sheet = contact_sheet(record.images, num_columns=record.num_columns)
    return _figure(sheet, len(record.images), record.num_columns, record.images.shape[2:], "coming into being")


def grid(found: Grid, commands: Sequence[str], *, name: str) -> str:
    """Finished pictures, with what they are and how to make them again."""
    sheet = found.sheet()
    figure = _figure(sheet, len(found.images), found.num_columns, found.images.shape[2:], "generated images")
    return figure + _below([_about(found.setting, found.classes), *found.notes], commands, sheet, name)


def film(found: Film, commands: Sequence[str]) -> str:
    """A film strip, a column for each noise level."""
    columns = [
        f"<figure><figcaption>{'image' if frame.sigma == 0 else f'σ = {frame.sigma:.3g}'}</figcaption>"
        f"{_image(frame.noisy, _FRAME_WIDTH, 'noisy state')}{_image(frame.denoised, _FRAME_WIDTH, 'denoised')}</figure>"
        for frame in found.frames
    ]
    strip = (
        '<div class="strip"><div class="sides"><span></span><span>state</span><span>denoised</span></div>'
        f'<div class="frames">{"".join(columns)}</div></div>'
    )
    told = "" if found.image_class is None else f", class {found.image_class}"
    return strip + _below(
        [f"Seed {found.setting.first_seed}{told}", *found.notes], commands, found.sheet(), "film-strip"
    )


def _about(setting: Setting, classes: list[int] | None) -> str:
    count, first = setting.num_images, setting.first_seed
    seeds = f"seed {first}" if count == 1 else f"{count} images, seeds {first}–{first + count - 1}"
    if classes is None:
        return f"{seeds}{', without a class' if setting.class_idx == 'none' else ''}".capitalize()
    kind = "classes drawn by the seeds" if setting.class_idx is None else f"class {setting.class_idx}"
    kind = "a row for each class" if setting.class_idx == "all" else kind
    return f"{seeds}, {kind}".capitalize()


def _below(lines: Sequence[str], commands: Sequence[str], sheet: np.ndarray, name: str) -> str:
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    data = _data_url(encode_png(sheet))
    # Lines break between options rather than within.
    shown = "\n".join(
        " ".join(f"<span>{escape(part)}</span>" for part in line.replace(" --", "\0--").split("\0"))
        for line in commands
    )
    return (
        f'<div class="below"><div>{notes}</div><a class="download" download="{escape(name)}.png" href="{data}">'
        "Download PNG</a></div>"
        '<div class="command"><div class="head"><span>The command for this</span>'
        f'<button type="button" onclick="{escape(_COPY)}">Copy</button></div><pre>{shown}</pre></div>'
    )


def _figure(sheet: np.ndarray, count: int, columns: int, size: Sequence[int], alt: str) -> str:
    width = sheet.shape[2]
    zoom = max(min(_SHOWN_WIDTH // width, _MAX_ZOOM), 1)
    attributes = (
        f'data-count="{count}" data-columns="{columns}" data-cell="{size[1] + SHEET_GAP},{size[0] + SHEET_GAP}"'
        f' data-gap="{SHEET_GAP}"'
    )
    return f'<div class="sheet" {attributes}>{_image(sheet, width * zoom, f"{count} {alt}")}</div>'


def _image(pixels: np.ndarray, shown_width: int, alt: str) -> str:
    height, width = pixels.shape[1:]
    sharp = " sharp" if shown_width >= width else ""
    return (
        f'<img class="picture{sharp}" src="{_data_url(encode_png(pixels))}" width="{shown_width}"'
        f' height="{round(height * shown_width / width)}" alt="{escape(alt)}">'
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


# Which image of a grid is clicked, for gr.HTML's js_on_load.
CLICKS = """
element.addEventListener('click', event => {
  const sheet = event.target.closest('.sheet');
  if (!sheet) return;
  const image = sheet.querySelector('img'), box = image.getBoundingClientRect(), data = sheet.dataset;
  const [width, height] = data.cell.split(',').map(Number), gap = Number(data.gap);
  const scale = image.naturalWidth / box.width;
  const column = Math.floor(((event.clientX - box.left) * scale - gap / 2) / width);
  const row = Math.floor(((event.clientY - box.top) * scale - gap / 2) / height);
  const position = row * Number(data.columns) + column;
  if (column >= 0 && column < data.columns && position >= 0 && position < data.count) trigger('click', {position});
});
"""
