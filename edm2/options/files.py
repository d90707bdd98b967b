"""The options of scripts that write generated images."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page.
_OPTIONS = (
    click.option("--skip-existing", is_flag=True, help="Make only the images whose files are not in --outdir"),
    click.option(
        "--png-compression",
        metavar="0..9",
        type=click.IntRange(0, 9),
        default=1,
        show_default=True,
        help="0 = none, 1 = fast, 9 = smallest; same pixels",
    ),
    click.option(
        "--decoder-batch",
        metavar="INTEGER",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="Latents decoded at once",
    ),
)


def file_options(command: F) -> F:
    """Add them to a command function. Their names there: skip_existing, png_compression, decoder_batch."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
