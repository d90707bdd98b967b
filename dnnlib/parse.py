"""Parsers of values on the command line: image counts, sizes, integer lists, paths. They raise ConfigError."""

import json
import math
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from dnnlib.errors import ConfigError, reason_of

_SUFFIXES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

_MAX_NUMBERS = 10_000_000  # of a list; each takes memory


def split_url(url: str) -> SplitResult:
    """Split a URL into its parts. Raises ConfigError if it has a host or port that is not one."""
    try:
        parts = urlsplit(url)
        if parts.port == 0 or (parts.scheme in ("http", "https") and not parts.hostname):
            raise ValueError("it names no server")
        return parts
    except ValueError as error:
        raise ConfigError(f"{_short(url)} is not a URL: {error}") from None


def require_possible(path: str | os.PathLike[str]) -> Path:
    """Return `path`, which need not exist. Raises ConfigError if the system cannot even look for it.

    Python's `Path.exists` and its siblings raise then: for long names, or folders that one may not enter.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot open {_short(os.fspath(path))}: {reason_of(error)}") from None
    return Path(path)


def _short(text: str) -> str:
    return f"'{text}'" if len(text) <= 200 else f"'{text[:100]}...' ({len(text)} characters)"


def expand_home(path: str) -> str:
    """Return a path with `~` or `~user` at its start replaced by the home folder. URLs and names have none.

    The shell does that only at the start of a word, not in --outdir=~/run. Raises ConfigError for unknown users, for
    paths that the system cannot look for, and for malformed URLs.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        user = re.split(r"[/\\]", path[1:])[0]
        hint = f"for a path that begins with ~, type ./{path[:100]}"
        raise ConfigError(f"{_short(path)}: this machine has no user {_short(user)}; {hint}")
    if re.match(r"https?://", path, re.IGNORECASE):
        split_url(path)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", path) is None:
        require_possible(expanded)
    return expanded


def parse_nimg(text: str | int) -> int:
    """Number of images: a whole number with an optional suffix Ki, Mi or Gi (powers of 1024)."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"([0-9]{1,18})(Ki|Mi|Gi)?", text.strip())
    if match is None:
        raise ConfigError(
            f"{_short(text)} is not an image count; write a whole number with an optional Ki, Mi or Gi, as in 128Ki"
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
    match = re.fullmatch(r"([1-9][0-9]{0,17})(|K|M|G|T|Ki|Mi|Gi|Ti)B?", text.strip())
    if match is None:
        raise ConfigError(f"{_short(text)} is not a size; write bytes with an optional unit, as in 500MB or 2GiB")
    unit = match[2]
    base = 1024 if unit.endswith("i") else 1000
    return int(match[1]) * base ** " KMGT".index(unit[:1] or " ")


def parse_int_list(text: str | list[int]) -> list[int]:
    """Whole numbers and ranges, in the order given: '1,2,5-10' is [1, 2, 5, 6, 7, 8, 9, 10]."""
    if isinstance(text, list):
        return text
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?[0-9]{1,18})(?:-(-?[0-9]{1,18}))?", part.strip())
        if match is None:
            raise ConfigError(f"{_short(part)} in {_short(text)} is neither a number nor a range; write e.g. 1,2,5-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"the range '{part}' in {_short(text)} runs backwards; write {last}-{first}")
        if last - first + len(numbers) >= _MAX_NUMBERS:
            raise ConfigError(f"{_short(text)} has more than {_MAX_NUMBERS:,} numbers; give fewer at a time")
        numbers.extend(range(first, last + 1))
    return numbers


def parse_class_list(text: str | list[int | str]) -> list[int | str]:
    """Whole numbers, ranges and names of classes, in the order given: '0,5-7,dog' is [0, 5, 6, 7, 'dog']."""
    if isinstance(text, list):
        return text
    classes: list[int | str] = []
    for part in text.split(","):
        classes += parse_int_list(part) if re.fullmatch(r"[-0-9\s]*", part) else [part.strip()]
    return classes


def parse_pair(text: str | tuple[float, float]) -> tuple[float, float]:
    """Two finite numbers with a comma between them, as in 0,4095."""
    if isinstance(text, tuple):
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"'{text}' is not a pair of numbers; write them with a comma, as in 0,4095")
    return low, high


def parse_loss_scale(text: str | float) -> float | Literal["auto"]:
    """A number, or 'auto'."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"'{text}' is not a loss scale; give a number, or auto") from None


def parse_keywords(text: str | dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments, key=value,...: a value is JSON, or True, False or None, or else text.

    Commas in brackets and quotes do not separate: 'depth=6,mult=[1,2],act=gelu'.
    """
    if isinstance(text, dict):
        return text
    pieces, depth, quoted = [""], 0, False
    for char in text:
        quoted ^= char == '"'
        depth += 0 if quoted else (char in "[{") - (char in "]}")
        if char == "," and depth == 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += char
    keywords: dict[str, Any] = {}
    for piece in pieces:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (equals and key.isidentifier()):
            raise ConfigError(f"'{piece}' in '{text}' is not an argument; write key=value,..., as in depth=6,act=gelu")
        if key in keywords:
            raise ConfigError(f"'{text}' gives two values for {key}; give one")
        keywords[key] = _keyword_value(value)
    return keywords


def _keyword_value(text: str) -> Any:
    named = {"True": True, "False": False, "None": None}
    if text in named:
        return named[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


class PrintedNumber(float):
    """A number that keeps the digits of its text: '2.90' is known to two decimals. Raises ValueError for other text."""

    text: str

    def __new__(cls, text: str) -> "PrintedNumber":
        """Return the number that `text` stands for."""
        number = super().__new__(cls, text)
        number.text = text.strip()
        return number

    def __str__(self) -> str:
        return self.text

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.text,)  # for copies and pickles


def half_unit(number: float) -> float:
    """Half a unit of the last digit that is printed of `number`, such as 0.005 for 2.91; 0 if it is not finite."""
    # Numbers of other types, such as tensors, have no digits of their own.
    try:
        exponent = Decimal(str(number if isinstance(number, int | float) else float(number))).as_tuple().exponent
        return 0.5 * 10.0**exponent if isinstance(exponent, int) and math.isfinite(number) else 0.0
    except ArithmeticError:  # an exponent of many digits, as in 0e400
        return 0.0
