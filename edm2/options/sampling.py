"""Options of scripts that generate images: what to sample from, how, and what to write."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from torch_utils.precision import PRECISIONS
from training.sampling.options import HeunOptions, SamplerOptions
from training.sampling.solvers import SOLVERS

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


class _Numbers(click.ParamType):
    """Numbers separated by commas, as a tuple; `count` of them if that is fixed."""

    name = "list"

    def __init__(self, example: str, count: int | None = None) -> None:
        self._example = example
        self._count = count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or self._count not in (None, len(numbers)):
            count = "" if self._count is None else f"{self._count} "
            self.fail(f"'{value}' is not a list of {count}numbers; write e.g. {self._example}", param, ctx)
        return numbers


NUMBERS = _Numbers("1,1.5,2")


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


# Keywords of click.option by flag, in the order of the help page. Options left out are None, or () for --gnet.
_OPTIONS: dict[str, dict[str, Any]] = {
    "preset": {"metavar": "NAME", "help": "Networks and guidance of a published result; other options win over it"},
    "net": {"metavar": "PATH|URL|NAME", "help": "Network: file, model folder, URL or hub name"},
    "gnet": {
        "metavar": "PATH|URL|NAME",
        "multiple": True,
        "help": "Guiding network, used if guidance is not 1; self = --net without labels; several share the guidance",
    },
    "gnet-shares": {
        "metavar": "LIST",
        "type": _Numbers("0.7,0.3"),
        "help": "Share of each --gnet, 1 in all [default: equal]",
    },
    "guidance": {"type": float, "help": "Guidance strength; 1 = none [default: 1]"},
    "interval": {
        "metavar": "LO,HI",
        "type": _Numbers("0.28,2.90", count=2),
        "help": "Guide only the steps that start at noise levels in (LO, HI] [default: all]",
    },
    "solver": {"metavar": "NAME", "help": f"{_either(list(SOLVERS))} [default: {SamplerOptions().solver}]"},
    **_heun_options(),
    "precision": {
        "metavar": "NAME",
        "type": click.Choice(PRECISIONS),
        "help": f"{_either(PRECISIONS)} [default: fp16 on CUDA if the network says so, else fp32]",
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
        "type": _PATH,
        "help": "Images for a network of --condition: file, folder or ZIP; one per seed, in turn",
    },
    "masks": {"metavar": "PATH", "type": _PATH, "help": "What to fill of these: white; one for all, or each"},
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


def sampling_options(command: F) -> F:
    """Add the options of `training.sampling.request.resolve_sampling` to a command function, by the same names."""
    return _add(_OPTIONS, command)


def sampling_options_without(*names: str) -> Callable[[F], F]:
    """Add the same options, except for `--{name}` in `names`."""
    return lambda command: _add({flag: row for flag, row in _OPTIONS.items() if flag not in names}, command)


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
