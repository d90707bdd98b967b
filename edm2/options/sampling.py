"""Options of scripts that generate images: what to sample from, how, and what to write."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import click

from dnnlib.cli import KEYWORDS, PATH, SOURCE
from dnnlib.parse import PrintedNumber
from torch_utils.precision_names import AUTO, PRECISIONS, Precision
from training.sampling.schedule import SOLVER_NAMES, HeunOptions

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType):
    """Numbers separated by commas, as a tuple with their digits; `count` of them if that is fixed."""

    name = "list"

    def __init__(self, example: str, count: int | None = None) -> None:
        self._example = example
        self._count = count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers in `value`."""
        if isinstance(value, tuple):
            return value
        try:
            numbers: tuple[float, ...] = tuple(PrintedNumber(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or self._count not in (None, len(numbers)):
            count = "" if self._count is None else f"{self._count} "
            self.fail(f"'{value}' is not a list of {count}numbers; write e.g. {self._example}", param, ctx)
        return numbers


NUMBERS = Numbers("1,1.5,2")


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _heun_options() -> dict[str, dict[str, Any]]:
    return {
        field.metadata["flag"] or field.name: {
            "name": field.name,
            "type": field.type,
            "help": f"{field.metadata['help']} [default: {field.default:g}]",
        }
        for field in dataclasses.fields(HeunOptions)
    }


OWN_NETWORKS: dict[str, Any] = {
    "name": "own_networks",
    "metavar": "MODULE:CLASS",
    "multiple": True,
    "help": "Own class to import for a network's file that is of this class (docs/extending.md)",
}

# Keywords of click.option by flag, in the order of the help page. Options left out are None, or () for --gnet.
_OPTIONS: dict[str, dict[str, Any]] = {
    "preset": {"metavar": "NAME", "help": "Networks and guidance of a published result; other options win over it"},
    "net": {"metavar": "PATH|URL|NAME", "type": SOURCE, "help": "Network: file, model folder, URL or hub name"},
    "gnet": {
        "metavar": "PATH|URL|NAME",
        "type": SOURCE,
        "multiple": True,
        "help": "Guiding network, used if guidance is not 1; self = --net without labels; several share the guidance",
    },
    "gnet-shares": {
        "metavar": "LIST",
        "type": Numbers("0.7,0.3"),
        "help": "Share of each --gnet, 1 in all [default: equal]",
    },
    "guidance": {"type": float, "help": "Guidance strength; 1 = none [default: 1]"},
    "interval": {
        "metavar": "LO,HI",
        "type": Numbers("0.28,2.90", count=2),
        "help": "Guide only the steps that start at noise levels in (LO, HI] [default: all]",
    },
    "solver": {"metavar": "NAME", "help": f"{_either(SOLVER_NAMES)} [default: {SOLVER_NAMES[0]}]"},
    **_heun_options(),
    "sampler": {
        "metavar": "MODULE:FUNCTION",
        "help": "Own sampler in place of ours (docs/extending.md); it gets the options that are given",
    },
    "sampler-args": {"metavar": "KEY=VALUE,...", "type": KEYWORDS, "help": "Further arguments of --sampler"},
    "network": OWN_NETWORKS,
    "precision": {
        "metavar": "NAME",
        "type": click.Choice((*PRECISIONS, AUTO)),
        "help": f"{', '.join(PRECISIONS)}; auto = fastest [default: fp16 on CUDA if the network says so, else fp32]",
    },
    "compile": {
        "is_flag": True,
        "default": None,
        "help": "Compile the networks, which takes minutes at first [default: on CUDA from 5000 images per process]",
    },
    "decoder-tile": {"metavar": "PIXELS", "type": int, "help": "Decode larger images in tiles [default: whole]"},
    "decoder-precision": {"metavar": "NAME", "help": "fp32, tf32, fp16 or bf16 [default: fp16 on CUDA, else fp32]"},
    "source": {
        "metavar": "PATH",
        "type": PATH,
        "help": "Images for a network of --condition: file, folder or ZIP; one per seed, in turn",
    },
    "masks": {
        "metavar": "PATH",
        "type": PATH,
        "help": "Masks that are white where --source is to be filled; one for all images, or one each",
    },
}

_FILE_OPTIONS: dict[str, dict[str, Any]] = {
    "skip-existing": {"is_flag": True, "help": "Generate only the images whose files are not in --outdir"},
    "png-compression": {
        "metavar": "0..9",
        "type": click.IntRange(0, 9),
        "default": 1,
        "show_default": True,
        "help": "0 = none, 1 = fast, 9 = smallest; same pixels",
    },
    "decoder-batch": {
        "metavar": "INTEGER",
        "type": click.IntRange(min=1),
        "default": 4,
        "show_default": True,
        "help": "Latents decoded at once",
    },
}


def settled_precision(precision: Precision | Literal["auto"] | None, device: str | None) -> Precision | None:
    """Return `precision`, or the fastest on the device of this name for 'auto', and print which.

    float16 is left to the network's file (None), which knows whether the network can be computed in it.
    """
    if precision != "auto":  # AUTO, which the type checker does not know for one of its choices
        return precision
    from torch_utils.distributed import resolve_device  # here, because --help does not wait for torch
    from torch_utils.precision import fastest_precision

    fastest, reason = fastest_precision(resolve_device(device))
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"--precision=auto: {fastest}{' if the network is for it' * (fastest == 'fp16')}, {reason}.")
    return None if fastest == "fp16" else fastest


def sampling_options(command: F) -> F:
    """Add the options of `training.sampling.request.resolve_sampling` to a command function, by the same names."""
    return _add(_OPTIONS, command)


def sampling_options_without(*names: str) -> Callable[[F], F]:
    """Add the same options, except for `--{name}` in `names`."""
    return lambda command: _add({flag: row for flag, row in _OPTIONS.items() if flag not in names}, command)


def own_networks_option(command: F) -> F:
    """Add --network, as `own_networks`, to a command function that reads networks without sampling options."""
    return _add({"network": OWN_NETWORKS}, command)


def file_options(command: F) -> F:
    """Add options for written images to a command function: skip_existing, png_compression, decoder_batch."""
    return _add(_FILE_OPTIONS, command)


def _add(options: dict[str, dict[str, Any]], command: F) -> F:
    for flag, keywords in reversed(options.items()):
        name = keywords.get("name", flag.replace("-", "_"))
        rest = {key: value for key, value in keywords.items() if key != "name"}
        switch = f"--{flag}/--no-{flag}" if "default" in rest and rest["default"] is None else f"--{flag}"
        command = click.option(switch, name, **rest)(command)
    return command
