"""The options of train_edm2.py, made from the fields of TrainingConfig, and the configuration from their values."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_args

import click

from dnnlib.cli import BYTES, CLASS_LIST, INT_LIST, KEYWORDS, LOSS_SCALE, NIMG, SOURCE
from dnnlib.download import is_remote
from dnnlib.errors import ConfigError
from dnnlib.fields import option_name, option_text
from edm2.options.metrics import STD_LIST, given_weights, weights_options
from training.config import (
    ENCODER_PRECISIONS,
    PUBLISHED_VAE,
    MetricsConfig,
    NetworkConfig,
    SamplesConfig,
    TrainingConfig,
)
from training.presets import locate, training_preset

F = TypeVar("F", bound=Callable[..., Any])

# Types of options by the name of the value, and else by the type of the field, with the name of the value.
_NAMED = {"NIMG": NIMG, "SIZE": BYTES, "FLOAT|auto": LOSS_SCALE}
_NAMED |= dict.fromkeys(("ZIP|DIR|URL", "PATH|URL", "PKL|URL", "DIR"), SOURCE)
_TYPES: dict[Any, tuple[str, Any]] = {
    bool: ("BOOL", bool),
    int: ("INT", int),
    float: ("FLOAT", float),
    tuple[int, ...]: ("LIST", INT_LIST),
    tuple[int | str, ...]: ("LIST", CLASS_LIST),
    tuple[float, ...]: ("LIST", STD_LIST),
    tuple[str, ...]: ("LIST", str),
    dict[str, Any]: ("KEY=VALUE,...", KEYWORDS),
}

# Fields that are configurations: their classes, and what the names of the options' values begin with.
_PARTS = {
    "network": (NetworkConfig, ""),
    "metrics": (MetricsConfig, "metrics_"),
    "samples": (SamplesConfig, "samples_"),
}

# Titles of the help page's sections, by the first option below each.
SECTIONS = {
    "outdir": "The run",
    "data": "Data",
    "channels": "Network",
    "P_mean": "Learning",
    "batch_gpu": "Speed and memory",
    "status": "Files and logs",
    "metrics_names": "Metrics",
    "samples_num": "Sample grids",
    "help": "Help",
}

# The help page in its order. A name stands for the option of that field and those of the fields behind it, up to the
# next name in this list. A new field so has its place without being listed.
_PAGE: tuple[str | Callable[[Any], Any], ...] = (
    click.option("--outdir", metavar="DIR", type=SOURCE, required=True, help="Output folder; a run in it is continued"),
    click.option(
        "--preset",
        metavar="STR",
        default="edm2-img512-s",
        show_default=True,
        help="Configuration to start from; small = chosen by the data",
    ),
    "duration",
    "batch",
    "init",
    "seed",
    "slice",
    click.option("--allow-changes", is_flag=True, help="Continue a run even if options that change its result differ"),
    click.option("-n", "--dry-run", is_flag=True, help="Print the training options and exit"),
    "data",
    "cond",
    click.option("--encode-on-the-fly", is_flag=True, help="Train on latents, encoded from pixels while training"),
    click.option(
        "--model-url",
        metavar="NAME|DIR",
        type=SOURCE,
        help=f"VAE of --encode-on-the-fly: hub name or diffusers folder  [default: {PUBLISHED_VAE}]",
    ),
    click.option(
        "--encoder-precision",
        type=click.Choice(ENCODER_PRECISIONS),
        help="Number format of this VAE's convolutions on GPUs  [default: tf32]",
    ),
    "shuffle_buffer",
    "data_cache",
    "channels",
    "condition",
    "P_mean",
    "ls",
    "batch_gpu",
    "precision",
    click.option("--fp16", metavar="BOOL", type=bool, help="Same as --precision=fp16 or fp32"),
    "compile",
    "bench",
    click.option("--device", metavar="STR", help="cpu, cuda, cuda:N or mps  [default: the best available]"),
    "workers",
    click.option(
        "--timeout",
        metavar="MINUTES",
        type=click.FloatRange(min=0, min_open=True),
        default=30,
        show_default=True,
        help="Give up if another process does not answer for this long",
    ),
    "status",
    "on_nonfinite",
    click.option(
        "--log",
        "log_names",
        type=click.Choice(["tensorboard", "wandb"]),
        multiple=True,
        help="Log to TensorBoard or Weights & Biases as well; may be given twice",
    ),
    "metrics_names",
    "metrics_every",
    "metrics_ref",
    "metrics_batch",
    weights_options,
    "samples_num",
)


def training_options(command: F) -> F:
    """Add all options to a command function. Values that are not given are None; `configure` takes those of fields."""
    blocks: dict[str, list[Any]] = {item: [] for item in _PAGE if isinstance(item, str)}
    block: list[Any] = []
    for owner, name, item in _option_fields():
        block = blocks.get(name, block)
        block.append(_click_option(owner, name, item))
    page = [each for item in _PAGE for each in (blocks[item] if isinstance(item, str) else [item])]
    for add in reversed(page):
        command = add(command)
    return command


def configure(preset: str, options: dict[str, Any], base: TrainingConfig | None = None) -> TrainingConfig:
    """Return the configuration of a preset with the given options in place of its own. Raises ConfigError.

    `options` has the values of the options made from fields, and of those for the VAE, --fp16 and the weights of
    detectors. `base` stands for the preset if that is not in the table.
    """
    from training.condition.spec import parse_condition  # here, because --help does not wait for torch
    from training.run.run_samples import preferred_std

    base = training_preset(preset) if base is None else base
    given = _given(TrainingConfig, options)
    network = _given(NetworkConfig, options) | _given_fp16(options)
    std = preferred_std(preset, given.get("ema_stds", base.ema_stds))
    parts = {"metrics": _given_metrics(options), "samples": _given_samples(options, std=std)}
    encode, vae = options["encode_on_the_fly"], options["model_url"]
    if vae is not None and not encode:
        raise ConfigError(f"--model-url={vae} needs --encode-on-the-fly; stored latents need no VAE")
    precision = options.get("encoder_precision")
    if precision is not None and not encode:
        raise ConfigError(f"--encoder-precision={precision} needs --encode-on-the-fly; stored latents need no VAE")
    if "condition" in given:
        given["condition"] = str(parse_condition(given["condition"]))  # with all that was left out
    given |= {name: part for name, part in parts.items() if part is not None}
    if "network_class" in given:
        _require_own(network)
        given.setdefault("snapshot_format", "safetensors")
    config = dataclasses.replace(base, network=dataclasses.replace(base.network, **network), **given)
    if "dataset_class" in given:
        data = options["data"] or ""
    elif config.data:
        data = options["data"] or locate(config.data)  # a preset's own data set is in the repository
    else:
        raise ConfigError(f"--data is missing; --preset={preset} brings no data set of its own")
    buffer = config.shuffle_images if is_remote(data) else None
    vae = (vae or PUBLISHED_VAE) if encode else None
    return dataclasses.replace(config, data=data, shuffle_buffer=buffer, vae=vae, encoder_precision=precision)


def _require_own(network: dict[str, Any]) -> None:
    """Raise ConfigError for options that shape our network, since an own one is in its place."""
    for name in network.keys() - {"precision"}:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} is for our network; what --network needs goes to --network-args")


def _option_fields(owner: Any = TrainingConfig, prefix: str = "") -> Iterator[tuple[Any, str, dataclasses.Field[Any]]]:
    """Yield the fields that are options, each with its class and the name of its value among those of the command."""
    for item in dataclasses.fields(owner):
        if owner is TrainingConfig and item.name in _PARTS:
            yield from _option_fields(*_PARTS[item.name])
        elif item.metadata.get("help") is not None:
            yield owner, prefix + item.name, item


def _click_option(owner: Any, name: str, item: dataclasses.Field[Any]) -> Callable[[Any], Any]:
    details = item.metadata
    default = option_text(item, item.default) if details["shown"] is None else details["shown"]
    text = details["help"] + (f"  [default: {default}]" if default else "")
    flag = f"--{option_name(owner, item)}"
    if details["value"] in ("", "/"):
        switch = f"{flag}/--no-{flag[2:]}" if details["value"] else flag
        return click.option(switch, name, is_flag=True, default=None, help=details["help"])
    if "choices" in details["limits"]:
        choices = (*details["limits"]["choices"], *details.get("settled", ()))
        return click.option(flag, name, type=click.Choice(choices), help=text)
    kinds = [each for each in (item.type, *get_args(item.type)) if each in _TYPES]
    value, kind = _TYPES[kinds[0]] if kinds else ("", str)
    value = details["value"] or value
    return click.option(flag, name, metavar=value, type=_NAMED.get(value, kind), help=text)


def _given(owner: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {item.name: name for each, name, item in _option_fields() if each is owner}
    given = {field: options[name] for field, name in names.items() if options[name] is not None}
    return {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}


def _given_fp16(options: dict[str, Any]) -> dict[str, str]:
    fp16, precision = options["fp16"], options["precision"]
    if fp16 is None:
        return {}
    meant = "fp16" if fp16 else "fp32"
    if precision not in (None, meant):
        raise ConfigError(f"--fp16={fp16} and --precision={precision} contradict each other; give one")
    return {"precision": meant}


def _given_metrics(options: dict[str, Any]) -> MetricsConfig | None:
    given, weights = _given(MetricsConfig, options), given_weights(options)
    names = given.pop("names", None)
    if names is not None:
        return MetricsConfig(names=tuple(name.strip() for name in names.split(",")), weights=weights, **given)
    for name in [f"metrics-{name}" for name in given] + [f"{name}-weights" for name in weights]:
        raise ConfigError(f"--{name} needs --metrics, e.g. --metrics=fd_efflite0")
    return None


def _given_samples(options: dict[str, Any], *, std: float) -> SamplesConfig | None:
    """Return which grids to draw, with the default EMA length `std`; None without --samples, or with 0."""
    given = _given(SamplesConfig, options)
    if given.get("num"):
        return SamplesConfig(**{"std": std, **given})
    for name in given if "num" not in given else ():
        raise ConfigError(f"--samples-{name} needs --samples, e.g. --samples=8")
    return None
