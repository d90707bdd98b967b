"""Options of training for those who want to see the run: sample grids, and logs for other programs."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dnnlib.cli import INT_LIST
from dnnlib.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

COUNT = click.IntRange(min=0)

# In the order of the help page. What is left out is None, or () for --log.
_OPTIONS = (
    click.option(
        "--samples", metavar="INT", type=COUNT, help="Draw a grid at each snapshot: images of each class  [default: 0]"
    ),
    click.option(
        "--samples-classes", metavar="LIST", type=INT_LIST, help="Its rows  [default: all, or 10 spread over them]"
    ),
    click.option(
        "--samples-std", metavar="FLOAT", type=float, help="EMA length to draw from  [default: best for the preset]"
    ),
    click.option("--samples-steps", metavar="INT", type=COUNT, help="Sampling steps  [default: 32]"),
    click.option("--samples-batch", metavar="INT", type=COUNT, help="At once per process  [default: 32]"),
    click.option(
        "--log",
        "log_names",
        type=click.Choice(["tensorboard", "wandb"]),
        multiple=True,
        help="Log there too; may be given twice",
    ),
)


def watching_options(command: F) -> F:
    """Give a command the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_samples(options: dict[str, Any]) -> dict[str, Any] | None:
    """Take the options --samples... out of `options`: arguments for SamplesConfig, None = no grids.

    Raises ConfigError where there are others than --samples without it.
    """
    given = {name: options.pop(f"samples_{name}") for name in ("classes", "std", "steps", "batch")}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    num = options.pop("samples")
    if not num:
        if given and num is None:
            raise ConfigError(f"--samples-{next(iter(given))} needs --samples, e.g. --samples=8")
        return None
    return {"num": num, **given}
