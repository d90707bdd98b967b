"""The options that say what to sample from and how, the same for every script that generates images."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from edm2.options.condition import SOURCE_OPTIONS

F = TypeVar("F", bound=Callable[..., Any])


class _Numbers(click.ParamType):
    """Numbers separated by commas, as a tuple; `count` of them where that is fixed."""

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
            self.fail(f"'{value}' is no list of {count}numbers; write e.g. {self._example}", param, ctx)
        return numbers


# Numbers separated by commas, as a tuple.
NUMBERS = _Numbers("1,1.5,2")

# By name, in the order of the help page. What is left out is None, or () for --gnet.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "preset": click.option(
        "--preset", metavar="NAME", help="Networks and guidance of a published result; other options win over it"
    ),
    "net": click.option("--net", metavar="PATH|URL|NAME", help="Network: file, model folder, URL or hub name"),
    "gnet": click.option(
        "--gnet",
        metavar="PATH|URL|NAME",
        multiple=True,
        help="Guiding network, used where guidance is not 1; self = --net without labels; several share the guidance",
    ),
    "gnet-shares": click.option(
        "--gnet-shares",
        metavar="LIST",
        type=_Numbers("0.7,0.3"),
        help="Share of each --gnet, 1 in all [default: equal]",
    ),
    "guidance": click.option("--guidance", type=float, help="Guidance strength; 1 = none [default: 1]"),
    "interval": click.option(
        "--interval",
        metavar="LO,HI",
        type=_Numbers("0.28,2.90", count=2),
        help="Guide only the steps that start at noise levels in (LO, HI] [default: all]",
    ),
    "solver": click.option("--solver", metavar="NAME", help="heun, euler or dpmpp2m [default: heun]"),
    "steps": click.option("--steps", "num_steps", type=int, help="Sampling steps [default: 32]"),
    "sigma_min": click.option("--sigma_min", type=float, help="Lowest noise level [default: 0.002]"),
    "sigma_max": click.option("--sigma_max", type=float, help="Highest noise level [default: 80]"),
    "rho": click.option("--rho", type=float, help="Exponent of the noise levels [default: 7]"),
    "S_churn": click.option(
        "--S_churn", "S_churn", type=float, help="Strength of added noise; heun, euler [default: 0]"
    ),
    "S_min": click.option("--S_min", "S_min", type=float, help="Add noise from this noise level ... [default: 0]"),
    "S_max": click.option("--S_max", "S_max", type=float, help="... up to this one [default: inf]"),
    "S_noise": click.option("--S_noise", "S_noise", type=float, help="Inflation of added noise [default: 1]"),
    "precision": click.option(
        "--precision",
        metavar="NAME",
        type=click.Choice(["fp32", "tf32", "fp16", "bf16"]),
        help="fp32, tf32, fp16 or bf16 [default: fp16 on CUDA where the network says so, else fp32]",
    ),
    "compile": click.option(
        "--compile",
        is_flag=True,
        help="Compile the networks: takes minutes the first time, worth it for thousands of images",
    ),
    "decoder-tile": click.option(
        "--decoder-tile", metavar="PIXELS", type=int, help="Decode larger images in tiles [default: whole]"
    ),
    "decoder-precision": click.option(
        "--decoder-precision", metavar="NAME", help="fp32, fp16 or bf16 [default: fp16 on CUDA, else fp32]"
    ),
    **SOURCE_OPTIONS,
}


def sampling_options(command: F) -> F:
    """Add the options to a command function; what they give is for `training.sampling.request.resolve_sampling`.

    Their names there: preset, net, gnet (a tuple), gnet_shares, guidance, interval, solver, num_steps, sigma_min,
    sigma_max, rho, S_churn, S_min, S_max, S_noise, precision, compile (a bool), decoder_tile, decoder_precision,
    source, masks.
    """
    return sampling_options_without()(command)


def sampling_options_without(*names: str) -> Callable[[F], F]:
    """The same, apart from the options `--{name}` in `names`."""

    def decorator(command: F) -> F:
        for flag, option in reversed(_OPTIONS.items()):
            if flag not in names:
                command = option(command)
        return command

    return decorator
