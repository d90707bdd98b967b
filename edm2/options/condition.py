"""The options of networks that see a second image: what it is, in training, and where it comes from, in sampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def condition_option(command: F) -> F:
    """Give a training command --condition."""
    return click.option(
        "--condition",
        metavar="KIND",
        help="Let the network see lowres:FACTOR (super-resolution) or inpaint[:MIN-MAX]  [default: none]",
    )(command)


# In the order of the help page. What is left out is None.
SOURCE_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "source": click.option(
        "--source",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="Pictures for a network of --condition: file, folder or ZIP; one per seed, in turn",
    ),
    "masks": click.option(
        "--masks",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="What to fill of these: white; one for all, or each",
    ),
}
