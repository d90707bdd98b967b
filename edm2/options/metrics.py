"""The options that say what is measured and with what, the same for every script that computes metrics."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from dnnlib.cli import NIMG
from dnnlib.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_METRICS = "fid,fd_dinov2"  # as published
COUNT = click.IntRange(min=1)

metrics_option = click.option(
    "--metrics", metavar="LIST", default=DEFAULT_METRICS, show_default=True, help="Which; all = whatever can be had"
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that read images"
)

skip_existing_option = click.option(
    "--skip-existing", is_flag=True, help="End at once where --json has the results of just this"
)

_MEASURING = (
    click.option("--ref", metavar="PATH|URL", help="Reference statistics: .pkl, .npz or .safetensors"),
    metrics_option,
    # Some versions of torchrun take --num for an abbreviation of options of their own, even behind the script's name.
    click.option("--num", "--num-images", "num", type=NIMG, default=50000, show_default=True, help="Images to measure"),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="What chooses the images"),
    click.option("--repeat", type=COUNT, default=1, show_default=True, help="Measure so many disjoint sets of images"),
    click.option(
        "--json",
        "json_path",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Write the results and what repeats them",
    ),
)

_WEIGHTS = {
    "inception": "Weights of Inception-v3, in place of the download",
    "dinov2": "Weights of DINOv2, in place of the download",
    "efflite0": "Weights of EfficientNet-Lite0, in place of the package's",
}


_WHILE_TRAINING: dict[str, Callable[[Any], Any]] = {
    "metrics": click.option("--metrics", metavar="LIST", help="Measure the averaged networks: fd_efflite0, fid, ..."),
    "every": click.option(
        "--metrics-every", metavar="NIMG", type=NIMG, help="Interval, each time with a snapshot  [default: --snapshot]"
    ),
    "num": click.option(
        "--metrics-num", metavar="NIMG", type=NIMG, help="Images that each network generates  [default: 5000]"
    ),
    "ref": click.option("--metrics-ref", metavar="PATH|URL", help="Reference statistics to compare them with"),
    "batch": click.option("--metrics-batch", metavar="INT", type=COUNT, help="At once per process  [default: 32]"),
    "steps": click.option("--metrics-steps", metavar="INT", type=COUNT, help="Sampling steps  [default: 32]"),
    "weights": lambda command: _weights_options(command),
}


def measuring_options(command: F) -> F:
    """Add --ref, --metrics, --num, --seed, --repeat and --json (`json_path`) to a command function."""
    for option in reversed(_MEASURING):
        command = option(command)
    return command


def detector_options(command: F) -> F:
    """Add --inception-weights and its like, and --device; `given_weights` takes the former apart."""
    device_help = "cpu, cuda, cuda:N or mps [default: the best one here]"
    return _weights_options(click.option("--device", metavar="NAME", help=device_help)(command))


def training_metrics_options(command: F) -> F:
    """Add what a training run measures: --metrics, --metrics-every and so on, which `given_metrics` collects."""
    for option in reversed(_WHILE_TRAINING.values()):
        command = option(command)
    return command


def given_metrics(options: dict[str, Any]) -> dict[str, Any] | None:
    """Take the options of `training_metrics_options` out of `options`: arguments for MetricsConfig, None = no metrics.

    Raises ConfigError where there are others than --metrics without it.
    """
    weights = given_weights(options)
    for name in _WEIGHTS:
        del options[f"{name}_weights"]
    given = {name: options.pop(f"metrics_{name}") for name in ("every", "num", "ref", "batch", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    names = options.pop("metrics")
    if names is None:
        idle = [f"--metrics-{name}" for name in given] + [f"--{name}-weights" for name in weights]
        if idle:
            raise ConfigError(f"{idle[0]} needs --metrics, e.g. --metrics=fd_efflite0")
        return None
    return {"names": tuple(name.strip() for name in names.split(",")), "weights": weights, **given}


def _weights_options(command: F) -> F:
    for name in reversed(_WEIGHTS):
        command = click.option(f"--{name}-weights", metavar="PATH", help=_WEIGHTS[name])(command)
    return command


def batch_option(default: int) -> Callable[[F], F]:
    """--batch, with this default."""
    return click.option("--batch", type=COUNT, default=default, show_default=True, help="Images at once per process")


def given_weights(options: Mapping[str, Any]) -> dict[str, str]:
    """The weights options in use, by detector."""
    return {name: options[f"{name}_weights"] for name in _WEIGHTS if options[f"{name}_weights"] is not None}
