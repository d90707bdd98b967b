"""Values as they are written on the command line: image counts, sizes, integer lists, lists of EMA lengths."""

import re
from typing import Literal

from dnnlib.errors import ConfigError

_SUFFIXES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def parse_nimg(text: str | int) -> int:
    """Number of images: a whole number with an optional suffix Ki, Mi or Gi (powers of 1024)."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text.strip())
    if match is None:
        raise ConfigError(
            f"'{text}' is no image count; write a whole number with an optional Ki, Mi or Gi, as in 128Ki"
        )
    return int(match[1]) * _SUFFIXES[match[2] or ""]


def format_nimg(nimg: int) -> str:
    """The shortest text that `parse_nimg` reads back as `nimg`."""
    for suffix in ("Gi", "Mi", "Ki"):
        if nimg and nimg % _SUFFIXES[suffix] == 0:
            return f"{nimg // _SUFFIXES[suffix]}{suffix}"
    return str(nimg)


def parse_bytes(text: str | int) -> int:
    """Number of bytes: a whole number above 0 with an optional unit, as in 500MB or 2GiB."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"([1-9]\d*)(|K|M|G|T|Ki|Mi|Gi|Ti)B?", text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is no size; write bytes with an optional unit, as in 500MB or 2GiB")
    unit = match[2]
    base = 1024 if unit.endswith("i") else 1000
    return int(match[1]) * base ** " KMGT".index(unit[:1] or " ")


def parse_int_list(text: str | list[int]) -> list[int]:
    """Whole numbers and ranges, in the order given: '1,2,5-10' is [1, 2, 5, 6, 7, 8, 9, 10]."""
    if isinstance(text, list):
        return text
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"'{part}' in '{text}' is neither a number nor a range; write e.g. 1,2,5-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"the range '{part}' in '{text}' runs backwards; write {last}-{first}")
        numbers.extend(range(first, last + 1))
    return numbers


def parse_std_list(text: str | list[float]) -> list[float]:
    """Relative EMA lengths, sorted, duplicates dropped; 'a,b,...,c' fills in an even spacing.

    Each must lie above 0 and below 0.289, the length of a uniform average (Eq. 123 of arXiv 2312.02696).
    """
    if isinstance(text, list):
        return text
    parts = [part.strip() for part in text.split(",")]
    stds: set[float] = set()
    for index, part in enumerate(parts):
        if part == "...":
            if index < 2 or index + 1 == len(parts):
                raise ConfigError(
                    f"'...' in '{text}' needs two lengths before it and one after it: 0.010,0.015,...,0.250"
                )
            first, second, last = (_parse_std(parts[i], text) for i in (index - 2, index - 1, index + 1))
            step = second - first
            if step <= 0 or last < second:
                raise ConfigError(f"'{text}' does not rise; write e.g. 0.010,0.015,...,0.250")
            # Half a step of slack, so that rounding neither drops the last value nor adds one beyond it.
            stds.update(second + step * j for j in range(1, int((last - second) / step + 0.5)))
        else:
            stds.add(_parse_std(part, text))
    return sorted(stds)


def _parse_std(part: str, text: str) -> float:
    try:
        std = float(part)
    except ValueError:
        std = float("nan")
    if not 0 < std < 0.289:
        raise ConfigError(f"'{part}' in '{text}' is no EMA length; each must lie above 0 and below 0.289")
    return std


def parse_loss_scale(text: str | float) -> float | Literal["auto"]:
    """A number, or 'auto'. Raises ConfigError for anything else."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"'{text}' is no loss scale; give a number, or auto") from None
