"""Options that say what is measured and with what, the same in all scripts; and the type of lists of EMA lengths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import click

from dnnlib.cli import NIMG, PATH, SOURCE, Parsed
from training.metrics.metric_table import DEFAULT, listing

F = TypeVar("F", bound=Callable[..., Any])


def _std_list(text: Any) -> list[float]:
    from training.posthoc.inputs import parse_std_list  # here, because --help does not wait for torch

    return parse_std_list(text)


def _kimg(text: Any) -> int:
    from training.posthoc.inputs import parse_kimg

    return parse_kimg(text)


STD_LIST = Parsed("list", _std_list)
KIMG = Parsed("kimg", _kimg)
COUNT = click.IntRange(min=1)

metrics_option = click.option(
    "--metrics", metavar="LIST", default=",".join(DEFAULT), show_default=True, help="Names; all = all available ones"
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that read images"
)


def _list_metrics(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo("\n".join(listing()))
        ctx.exit()


list_metrics_option = click.option(
    "--list-metrics",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_metrics,
    help="List the metrics and exit",
)
skip_existing_option = click.option(
    "--skip-existing", is_flag=True, help="Stop at once if --json has the results of this very request"
)

_MEASURING = (
    click.option(
        "--ref",
        metavar="PATH|URL",
        type=SOURCE,
        help="Reference statistics; calc and gen take images, too",
    ),
    metrics_option,
    # Some versions of torchrun take --num for an abbreviation of options of their own, even behind the script's name.
    click.option("--num", "--num-images", "num", type=NIMG, default=50000, show_default=True, help="Images to measure"),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Determines the choice of images"
    ),
    click.option("--repeat", type=COUNT, default=1, show_default=True, help="Number of disjoint sets to measure"),
    click.option(
        "--json",
        "json_path",
        metavar="FILE",
        type=PATH,
        help="Write the results and everything needed to repeat them",
    ),
)
_WEIGHTS = {
    "inception": "Weights of Inception-v3, in place of the download",
    "dinov2": "Weights of DINOv2, in place of the download",
    "efflite0": "Weights of EfficientNet-Lite0, in place of the package's",
}


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """The values of `measuring_options`, `skip_existing_option` and `detector_options`."""

    ref: str | None
    metrics: str
    num: int
    seed: int
    repeat: int
    json_path: Path | None
    skip_existing: bool = False
    device: str | None
    weights: dict[str, str]  # by detector

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Take the fields out of a command's `options`."""
        weights = given_weights(options)
        for name in _WEIGHTS:
            del options[f"{name}_weights"]
        own = {field.name: options.pop(field.name) for field in fields(cls) if field.name in options}
        return cls(**own, weights=weights)


def measuring_options(command: F) -> F:
    """Add --ref, --metrics, --num, --seed, --repeat and --json (`json_path`) to a command function."""
    for option in reversed(_MEASURING):
        command = option(command)
    return command


def detector_options(command: F) -> F:
    """Add the options of weights, which `given_weights` collects, and --device."""
    device_help = "cpu, cuda, cuda:N or mps [default: the best one here]"
    return weights_options(click.option("--device", metavar="NAME", help=device_help)(command))


def batch_option(default: int) -> Callable[[F], F]:
    """Return the option --batch with this default."""
    return click.option("--batch", type=COUNT, default=default, show_default=True, help="Images at once per process")


def given_weights(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths of the weights options in use, by detector."""
    return {name: options[f"{name}_weights"] for name in _WEIGHTS if options[f"{name}_weights"] is not None}


def weights_options(command: F) -> F:
    """Add the option of weights for each detector to a command function."""
    for name in reversed(_WEIGHTS):
        command = click.option(f"--{name}-weights", metavar="PATH", type=SOURCE, help=_WEIGHTS[name])(command)
    return command
