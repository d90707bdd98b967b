"""Options of training that are about speed, memory and number formats."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dnnlib.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

# In the order of the help page. What is left out is None.
_OPTIONS = (
    click.option(
        "--precision",
        type=click.Choice(["fp32", "tf32", "fp16", "bf16"]),  # torch_utils.precision has them too, and needs torch
        help="Of the U-Net; fp16 is float32 without a CUDA device  [default: fp16]",
    ),
    click.option("--fp16", metavar="BOOL", type=bool, help="Same as --precision=fp16 or fp32"),
    click.option("--compile", metavar="BOOL", type=bool, help="Compile the network  [default: on CUDA devices]"),
    click.option("--recompute", metavar="BOOL", type=bool, help="Less memory: compute activations a second time"),
    click.option("--shard", metavar="BOOL", type=bool, help="Less memory: spread weights over the processes (FSDP2)"),
    click.option("--shard-group", metavar="INT", type=int, help="Processes that share one copy  [default: all]"),
)


def training_speed_options(command: F) -> F:
    """Give a command the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_fp16(options: dict[str, Any]) -> None:
    """Replace the option `fp16` by the `precision` that it stands for. Raises ConfigError where both are given."""
    fp16 = options.pop("fp16")
    if fp16 is None:
        return
    meant = "fp16" if fp16 else "fp32"
    if options["precision"] not in (None, meant):
        raise ConfigError(f"--fp16={fp16} and --precision={options['precision']} contradict each other; give one")
    options["precision"] = meant
