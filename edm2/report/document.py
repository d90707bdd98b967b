"""The page of a report: plain HTML that contains its images and charts, without scripts or anything from elsewhere."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any

from dnnlib.text import format_duration, format_number
from edm2.report import figures
from edm2.report.chart import WIDE, Chart, style_sheet, svg, swatch
from edm2.report.next_commands import commands_for
from edm2.report.record import TIMESTAMP, RunRecord, Series
from edm2.report.sample_grids import PageImage, earlier_images, newest_image, strip_of

# Even if text of the run got into the page as markup, a browser would load nothing and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_LAST_TIME = 250_000_000_000  # seconds since 1970, in the year 9892: the calendar ends soon after
_RECENT = 10  # lines of stats.jsonl that the current speed is the mean of


def render(record: RunRecord, *, now: datetime) -> str:
    """Return the whole page; `now` is the time of its making, with a time zone."""
    title = record.path.absolute().name or str(record.path)
    body = "\n".join(part for section in _sections(record, now) for part in section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: training run</title>
<style>
{style_sheet()}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _sections(record: RunRecord, now: datetime) -> Iterator[Iterable[str]]:
    yield _head(record, now)
    yield _charts("Curves", [*figures.main_charts(record), *figures.metric_charts(record)])
    yield _samples(record)
    for sweep in record.sweeps:
        yield _charts(f"Sweep: {sweep.path.name}", list(figures.sweep_charts(sweep)))
    yield _commands(record)
    yield _session_table(record)
    yield _charts("Other statistics", figures.other_charts(record))
    yield _options(_as_computed(record))
    made = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield [f'<footer class="soft small">Made {made} from {escape(str(record.path))}.</footer>']


def _head(record: RunRecord, now: datetime) -> Iterator[str]:
    yield f"<header><h1>{escape(record.path.absolute().name or str(record.path))}</h1>"
    yield f'<p class="soft">{escape(_state(record, now))}</p></header>'
    if record.duration:
        share = min(record.nimg / record.duration, 1.0)
        yield f'<div class="progress"><div style="width:{share:.2%}"></div></div>'
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(small)}</small>' * bool(small)}</dd></div>"
        for name, value, small in _tiles(record)
    )
    yield f'<dl class="tiles">{tiles}</dl>'
    if record.notes:
        yield '<div class="notes small">' + "".join(f"<p>{escape(note)}</p>" for note in record.notes) + "</div>"


def _state(record: RunRecord, now: datetime) -> str:
    data = record.options.get("data")
    words = []
    if record.duration and record.nimg >= record.duration:
        words.append("Finished.")
    elif record.duration:
        words.append(f"{record.nimg / record.duration:.0%} done.")
    if isinstance(data, str):
        words.append(f"Data: {data}.")
    stamps = record.stats.series.get(TIMESTAMP)
    if stamps is not None and len(stamps) and 0 <= stamps.last <= _LAST_TIME:
        age = now - datetime.fromtimestamp(stamps.last, UTC)
        if timedelta(0) <= age and not (record.duration and record.nimg >= record.duration):
            words.append(f"Last statistics {format_duration(age.total_seconds())} before this report.")
    return " ".join(words)


def _tiles(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """The numbers at the top: name, value, and a smaller line."""
    series = record.stats.series
    unit, scale = figures.unit_of(max(record.nimg, record.duration or 0))
    of = f"of {format_number(record.duration / scale)}" if record.duration else ""
    yield unit.capitalize(), format_number(record.nimg / scale), of
    if figures.TOTAL_SEC in series:
        yield "Time", _duration(series[figures.TOTAL_SEC].last), _remaining(record)
    if figures.SEC_PER_KIMG in series and (speed := _recent_mean(series[figures.SEC_PER_KIMG])):
        yield "Images per second", format_number(1e3 / speed), f"{format_number(speed)} s per thousand"
    if figures.LOSS in series:
        yield "Loss", format_number(series[figures.LOSS].last), f"{record.stats.num_lines:,} lines of statistics"
    for name, curves in list(figures.metric_curves(record).items())[:2]:
        nimg, value, std = figures.best_value(name, curves)
        unit, scale = figures.unit_of(record.nimg)
        yield f"Best {name}", format_number(value), f"EMA {std}, at {format_number(nimg / scale)} {unit}"
    memory = {name: max(series[key].values) for key, name in figures.MEMORY.items() if key in series}
    if memory:
        main = memory.pop("main memory", None)
        gpu = max(memory.values(), default=0.0)
        shown = gpu if gpu > 0 or main is None else main
        extra = f"main memory {format_number(main)} GiB" if gpu > 0 and main is not None else "main memory, at most"
        yield "Memory", f"{shown:.2f} GiB", f"GPU; {extra}" if gpu > 0 else extra


def _duration(seconds: float) -> str:
    return format_duration(seconds) if abs(seconds) < _LAST_TIME else "unknown"


def _recent_mean(series: Series) -> float:
    recent = [value for value in series.values[-_RECENT:] if value > 0]
    return sum(recent) / len(recent) if recent else 0.0


def _remaining(record: RunRecord) -> str:
    series = record.stats.series
    if not record.duration or record.nimg >= record.duration or figures.SEC_PER_KIMG not in series:
        return ""
    seconds = (record.duration - record.nimg) / 1e3 * _recent_mean(series[figures.SEC_PER_KIMG])
    if figures.MAINTENANCE in series and figures.SEC_PER_TICK in series:
        training = sum(series[figures.SEC_PER_TICK].values)
        seconds *= 1 + sum(series[figures.MAINTENANCE].values) / training if training > 0 else 1
    return f"about {_duration(seconds)} to go"


def _charts(title: str, charts: Sequence[Chart]) -> Iterator[str]:
    if not charts:
        return
    yield f'<section><h2>{escape(title)}</h2><div class="charts">'
    for chart in charts:
        yield _figure(chart)
    yield "</div></section>"


def _figure(chart: Chart) -> str:
    unit = f" <small>({escape(chart.unit)})</small>" if chart.unit else ""
    legend = ""
    if 1 < len(chart.lines) <= 8:
        items = [f"<li>{swatch(line, color)}{escape(line.label)}</li>" for color, line in chart.curves()]
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    note = f"<figcaption><p>{escape(chart.note)}</p></figcaption>" if chart.note else ""
    drawing = svg(chart)
    if chart.wide:  # the style sheet shows one of the two
        drawing = f'<div class="narrow">{drawing}</div><div class="broad">{svg(chart, width=WIDE)}</div>'
    style = ' class="span"' if chart.wide else ""
    return f"<figure{style}><h3>{escape(chart.title)}{unit}</h3>{drawing}{legend}{note}</figure>"


def _samples(record: RunRecord) -> Iterator[str]:
    if not record.grids:
        return
    unit, scale = figures.unit_of(record.nimg)
    yield '<section><h2>Samples</h2><div class="two">'
    newest = record.grids[-1]
    about = newest.about
    std = f", EMA length {about['ema_std']:.3f}" if isinstance(about.get("ema_std"), float) else ""
    steps = f", {about['steps']} steps" if isinstance(about.get("steps"), int) else ""
    yield f"<figure><h3>At {format_number(newest.nimg / scale)} {unit}{std}{steps}</h3>"
    yield _img(newest_image(newest), "The newest sample grid")
    names = about.get("class_names")
    rows = f": {escape(', '.join(map(str, names)))}" if isinstance(names, list) and names else ""
    yield f"<figcaption><p>A row for each class{rows}.</p></figcaption></figure>"
    strip = strip_of(record.grids)
    if strip is not None:
        yield "<figure><h3>One seed of each class over the run</h3>"
        times = "".join(f"<span>{format_number(nimg / scale)}</span>" for nimg in strip.nimgs)
        yield f'<div class="times" style="width:{strip.image.width}px">{times}</div>'
        yield f"{_img(strip.image, 'The first image of each row at several times')}"
        yield f"<figcaption><p>Columns: {unit}.</p></figcaption></figure>"
    yield "</div>"
    earlier = earlier_images(record.grids)
    if earlier:
        count = f"{len(earlier)} of {len(record.grids) - 1} grids" if len(earlier) < len(record.grids) - 1 else ""
        yield f'<h3>Earlier <small class="soft">{count}</small></h3><div class="earlier">'
        for image in earlier:
            text = f"{format_number(image.nimg / scale)} {unit}"
            yield f"<figure>{_img(image, f'Samples at {text}')}<figcaption><p>{text}</p></figcaption></figure>"
        yield "</div>"
    yield "</section>"


def _img(image: PageImage, alt: str) -> str:
    style = "" if image.url.startswith("data:image/png") else ' class="smooth"'
    return f'<img{style} src="{image.url}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">'


def _commands(record: RunRecord) -> Iterator[str]:
    commands = commands_for(record)
    if not commands:
        return
    yield "<section><h2>Next steps</h2>"
    for purpose, command in commands:
        yield f"<p>{escape(purpose)}</p><pre>{_words(command)}</pre>"
    yield "</section>"


def _words(command: str) -> str:
    """Markup of a command that breaks between its words and not at their hyphens."""
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in command.split(" "))


def _session_table(record: RunRecord) -> Iterator[str]:
    if not record.sessions:
        return
    unit, scale = figures.unit_of(record.nimg)
    heads = ("Session", "Started", f"From ({unit})", "On", "Versions")
    yield '<section><h2>Sessions</h2><div class="wide"><table><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr></thead><tbody>"
    for index, session in enumerate(record.sessions, start=1):
        count = session.get("processes", 1)
        on = f"{count} × {session.get('device', '?')}" if count != 1 else str(session.get("device", "?"))
        cells = [
            str(index),
            str(session.get("started", "?")).replace("T", " ").replace("+00:00", " UTC"),
            format_number(session["nimg"] / scale),
            f"{on} ({session.get('device_name', '?')})",
            f"torch {session.get('torch', '?')}, Python {session.get('python', '?')}",
        ]
        pairs = zip(heads, cells, strict=True)
        yield "<tr>" + "".join(f'<td data-head="{escape(head)}">{escape(cell)}</td>' for head, cell in pairs) + "</tr>"
        command = _words(str(session.get("command", "")))
        yield f'<tr class="command"><td colspan="{len(heads)}">{command}</td></tr>'
    yield "</tbody></table></div></section>"


def _options(options: Mapping[str, Any]) -> Iterator[str]:
    if not options:
        return
    yield '<section><h2>Options</h2><dl class="options">'
    for name, value in _flat(options):
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(_option_text(value))}</dd></div>"
    yield "</dl></section>"


def _as_computed(record: RunRecord) -> Mapping[str, Any]:
    """Return the options, with the format that the network was computed in where the device has not the one given."""
    network, devices = record.options.get("network"), {str(each.get("device")) for each in record.sessions}
    if not isinstance(network, Mapping) or network.get("precision") not in ("fp16", "tf32") or not devices:
        return record.options
    if "cuda" in devices:
        return record.options
    computed = f"{network['precision']}, computed in float32 on {', '.join(sorted(devices))}"
    return {**record.options, "network": {**network, "precision": computed}}


def _option_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_option_text(item) for item in value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
