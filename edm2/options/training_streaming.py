"""The options of scripts that read data sets from URLs."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dnnlib.cli import BYTES

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page. What is left out is None.
_OPTIONS = (
    click.option("--shuffle-buffer", metavar="IMAGES", type=int, help="Images of a URL to shuffle  [default: 10000]"),
    click.option("--data-cache", metavar="DIR", help="Folder for shards of a URL  [default: in the cache folder]"),
    click.option("--data-cache-size", metavar="SIZE", type=BYTES, help="Room for these  [default: 50GB]"),
)


def streaming_options(command: F) -> F:
    """Give a command the options of --data behind a URL."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
