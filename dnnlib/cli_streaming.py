"""The options of scripts that read data sets from URLs."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class _Bytes(click.ParamType):
    """A number of bytes, with an optional unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([1-9]\d*)(|K|M|G|T|Ki|Mi|Gi)B?", value)
        if match is None:
            self.fail(f"'{value}' is no size; write bytes with an optional unit, as in 500MB or 2GiB", param, ctx)
        return int(match[1]) * _BYTES[match[2]]


# In the order of the help page. What is left out is None.
_OPTIONS = (
    click.option("--shuffle-buffer", metavar="IMAGES", type=int, help="Images of a URL to shuffle  [default: 10000]"),
    click.option("--data-cache", metavar="DIR", help="Folder for shards of a URL  [default: in the cache folder]"),
    click.option("--data-cache-size", metavar="SIZE", type=_Bytes(), help="Room for these  [default: 50GB]"),
)


def streaming_options(command: F) -> F:
    """Give a command the options of --data behind a URL."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
