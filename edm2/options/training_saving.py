"""The options that say how a run's files are written."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page. What is left out is None.
_OPTIONS = (
    click.option("--keep-checkpoints", metavar="INT", type=int, help="Checkpoints to keep; 0 = all  [default: 2]"),
    click.option(
        "--background-saves",
        metavar="BOOL",
        type=bool,
        help="Write files while training goes on, from a copy in the host's memory  [default: True]",
    ),
    click.option(
        "--on-disk-full", type=click.Choice(["stop", "wait"]), help="Where a file finds no room  [default: stop]"
    ),
)


def saving_options(command: F) -> F:
    """Give a command these options: keep_checkpoints, background_saves, on_disk_full."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
