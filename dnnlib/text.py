"""Numbers, sizes, durations, versions and foreign values as people read them."""

import difflib
import importlib.metadata
import json
import math
from collections.abc import Iterable
from typing import Any


def format_number(value: float) -> str:
    """About four digits: 0.1234, 12.35, 1,235; 1.23e-05 below a thousandth."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size == 0 or size >= 1e-3 else f"{value:.2e}"


def format_exact(value: float) -> str:
    """The shortest decimal that reads back as `value`: 2, 0.7, 1e-05."""
    return repr(float(value)).removesuffix(".0")


def format_bytes(num_bytes: int) -> str:
    """Bytes with three digits in decimal units: 900 bytes, 12.3 MB, 2.51 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: 3 d 4 h, 12 min 5 s."""
    left = round(min(max(seconds, 0), 1e12))
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count:,} {name}")
    return " ".join(parts[:2])


def format_elapsed(seconds: float) -> str:
    """A duration to the second, for columns: 3d 04h 05m 06s."""
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (sec, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{value:02d}{unit}" if index else f"{value}{unit}" for index, (value, unit) in enumerate(parts))


def format_kimg(nimg: int) -> str:
    """Images in thousands: 8388.6 as in published logs, with all digits below ten thousand: 0.064, 1.024, 5.0."""
    if nimg >= 10_000:
        return f"{nimg / 1e3:.1f}"
    kimg, rest = divmod(nimg, 1000)
    return f"{kimg}.{f'{rest:03d}'.rstrip('0') or '0'}"


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the error for `name`, with the `choices` of this kind, or the nearest of many."""
    known = list(choices)
    similar = similar_names(name, known)
    if len(known) > 12:
        return f"unknown {kind} '{name}'; there are {len(known)}, such as {', '.join(similar or known[:3])}"
    return f"unknown {kind} '{name}'; choose from {', '.join(known)}{did_you_mean(name, known)}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a question after the choice that `name` may stand for, to be put after an error; '' without one."""
    similar = similar_names(name, choices)
    return f"; did you mean {similar[0]}?" if similar else ""


def similar_names(name: str, choices: Iterable[str]) -> list[str]:
    """Return up to three of the choices that resemble `name`, whatever their case, the most similar one first."""
    known = {choice.lower(): choice for choice in choices}
    return [known[lower] for lower in difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)]


def format_passes(passes: float) -> str:
    """Passes over a data set: 1,049; 2.5 below ten."""
    return f"{passes:,.0f} passes" if passes >= 10 else f"{passes:.2g} passes"


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed, as `edm2` run from a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shortened(value: Any, length: int = 60) -> str:
    """A value out of a file as JSON, cut to `length` characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= length else f"{text[: length - 3]}..."
