"""The options that say when a session of training ends before the run does, and what is watched meanwhile."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dnnlib.cli import NIMG

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page. What is left out is None, and `timeout` is in minutes.
_OPTIONS = (
    click.option("--slice", metavar="NIMG", type=NIMG, help="End after NIMG images of this session, to be continued"),
    click.option(
        "--on-nonfinite",
        type=click.Choice(["stop", "continue"]),
        help="Where loss or gradients stay infinite or NaN  [default: stop]",
    ),
    click.option(
        "--nonfinite-limit", metavar="INT", type=int, help="Status intervals in a row before that  [default: 3]"
    ),
    click.option(
        "--monitor",
        is_flag=True,
        default=None,
        help="Record magnitudes of gradients, and of each block's activations and weights, in stats.jsonl",
    ),
    click.option(
        "--timeout",
        metavar="MINUTES",
        type=click.FloatRange(min=0, min_open=True),
        default=30,
        show_default=True,
        help="Give up when another process does not answer for so long",
    ),
)


def session_options(command: F) -> F:
    """Give a command these options: slice, on_nonfinite, nonfinite_limit, monitor, timeout."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
