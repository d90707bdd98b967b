"""Parsers of values on the command line: image counts, sizes, integer lists. They raise ConfigError."""

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
            f"'{text}' is not an image count; write a whole number with an optional Ki, Mi or Gi, as in 128Ki"
        )
    return int(match[1]) * _SUFFIXES[match[2] or ""]


def format_nimg(nimg: int) -> str:
    """Return the shortest text that `parse_nimg` reads back as `nimg`."""
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
        raise ConfigError(f"'{text}' is not a size; write bytes with an optional unit, as in 500MB or 2GiB")
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


def parse_loss_scale(text: str | float) -> float | Literal["auto"]:
    """A number, or 'auto'."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"'{text}' is not a loss scale; give a number, or auto") from None
