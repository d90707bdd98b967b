"""The options of training that say how often classes and labels are seen."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page. What is left out is None.
_OPTIONS = (
    click.option("--balance/--no-balance", default=None, help="See every class equally often, however large it is"),
    click.option(
        "--label-dropout",
        metavar="FLOAT",
        type=float,
        help="Probability of learning an image without its label, for guidance by the network itself  [default: 0]",
    ),
)


def label_options(command: F) -> F:
    """Give a command these options: balance, label_dropout."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
