"""Dataclass fields with limits and the help of an option; the class attribute PREFIX goes before its options' names."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any

from dnnlib.errors import ConfigError
from dnnlib.parse import format_nimg
from dnnlib.text import did_you_mean


def option(
    default: Any = MISSING,
    help: str | None = None,
    *,
    value: str | None = None,
    shown: str | None = None,
    flag: str | None = None,
    extra: dict[str, Any] | None = None,
    **limits: Any,
) -> Any:
    """A dataclass field with its command line option.

    help:     help text; None = not an option.
    value:    name of the value in the help text; None = from the type of the field, '' = a switch, '/' = a switch
              with its opposite, --no-NAME.
    shown:    default as the help text gives it; None = `default`, '' = nothing.
    flag:     name of the option without dashes; None = the name of the field.
    extra:    more metadata.
    limits:   `above`, `least`, `below` and `most` for numbers, `choices` for texts.
    """
    details = {"help": help, "value": value, "shown": shown, "flag": flag}
    return field(default=default, metadata={**details, "limits": limits, **(extra or {})})


def option_name(owner: Any, item: dataclasses.Field[Any]) -> str:
    """Return the name of the option of a field of `owner`, a configuration or its class, without the dashes."""
    if item.metadata["flag"] is not None:
        return str(item.metadata["flag"])
    name = item.name if item.name.startswith("P_") else item.name.replace("_", "-")
    return getattr(owner, "PREFIX", "") + name


def option_text(item: dataclasses.Field[Any], value: Any) -> str:
    """Return a value of a field as one writes it on the command line, '' for none."""
    if value is None or value is MISSING:
        return ""
    if item.metadata["value"] == "NIMG":
        return format_nimg(value)
    if isinstance(value, tuple):
        return ",".join(f"{each:g}" for each in value)
    return str(value) if isinstance(value, bool | str) else f"{value:g}"


def check_limits(config: Any) -> None:
    """Raise ConfigError for the first field whose value is beyond its limits."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        problem = _problem(value, **item.metadata["limits"]) if "limits" in item.metadata else None
        if problem is not None:
            raise ConfigError(f"--{option_name(config, item)}={value} {problem}")


def _problem(
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
) -> str | None:
    """Return what is wrong with a value, to be put after it; None if it is accepted. Floats must be finite."""
    if isinstance(value, str):
        known = not choices or value in choices
        return None if known else f"is unknown; choose from {', '.join(choices)}{did_you_mean(value, choices)}"
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "must be a finite number"
    if above is not None and value <= above:
        return f"must be above {above:g}"
    if least is not None and below is not None and not least <= value < below:
        return f"must be in [{least:g}, {below:g})"
    if least is not None and most is not None and not least <= value <= most:
        return f"must be from {least:g} to {most:g}"
    if least is not None and value < least:
        return f"must be at least {least:g}"
    return None
