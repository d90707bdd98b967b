"""EMA lengths as people write them, and the stored averages of a reconstruction: listed and chosen."""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dnnlib.errors import ConfigError, reason_of
from training.phema import MAX_STD
from training.snapshot import KIMG, name_of_nimg, nimg_from_name, parse_name

_NAME = re.compile(rf"(?P<prefix>.*)-(?P<kimg>{KIMG})-(?P<std>\d+\.\d+)(?P<suffix>\.pkl|\.safetensors)")
_MAX_STDS = 10_000  # of a list
_SPACING = "0.010,0.015,...,0.250"  # example for errors


@dataclass(frozen=True, kw_only=True)
class Input:
    """A stored average: its file, the images seen when it was taken, and its relative EMA length."""

    path: str
    nimg: int
    std: float


def require_std(std: float, what: str) -> None:
    """Raise ConfigError unless `std`, called `what`, is shorter than the uniform average (Eq. 123)."""
    if not 0 < std < MAX_STD:
        raise ConfigError(f"{what} is not an EMA length: it must be above 0 and below {MAX_STD}")


def parse_std_list(text: str | list[float]) -> list[float]:
    """Parse relative EMA lengths; sorts them and drops duplicates. 'a,b,...,c' fills in an even spacing."""
    if isinstance(text, list):
        return text
    parts = [part.strip() for part in text.split(",")]
    stds: set[float] = set()
    for index, part in enumerate(parts):
        if part == "...":
            if index < 2 or index + 1 == len(parts):
                raise ConfigError(f"'...' in '{text}' needs two lengths before it and one after it: {_SPACING}")
            first, second, last = (_parse_std(parts[i], text) for i in (index - 2, index - 1, index + 1))
            step = second - first
            if step <= 0 or last < second:
                raise ConfigError(f"'{text}' does not rise; write e.g. {_SPACING}")
            if not (last - second) / step < _MAX_STDS:
                raise ConfigError(f"'{text}' has more than {_MAX_STDS:,} lengths; write e.g. {_SPACING}")
            # Half a step of slack, so that rounding neither drops the last value nor adds one beyond it.
            stds.update(second + step * j for j in range(1, int((last - second) / step + 0.5)))
        else:
            stds.add(_parse_std(part, text))
    return sorted(stds)


def parse_kimg(text: str | float) -> int:
    """Return the image count of a file name's thousands, which may have decimals (1.536); it must be above 0."""
    match = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,3}))?", str(text).strip())
    nimg = 0
    if match is not None:
        nimg = nimg_from_name(f"{match[1]}.{match[2]:0<3}" if match[2] else match[1])
    if nimg < 1:
        raise ConfigError(
            f"'{str(text)[:100]}' is not a training time; write thousands of images above 0, as in file names"
        )
    return nimg


def kimg_text(nimg: int) -> str:
    """Return an image count as `parse_kimg` reads it."""
    kimg, point, rest = name_of_nimg(nimg).partition(".")
    return f"{int(kimg)}{point}{rest}"


def _parse_std(part: str, text: str) -> float:
    try:
        std = float(part)
    except ValueError:
        std = math.nan
    require_std(std, f"'{part}' in '{text}'")
    return std


def list_input_pickles(
    in_dir: str | os.PathLike[str], in_prefix: str | None = None, in_std: float | Iterable[float] | None = None
) -> list[Input]:
    """List the snapshots {prefix}-{kimg}-{std}.pkl or .safetensors in `in_dir`, sorted by (nimg, std).

    `in_prefix` and `in_std` select by prefix and length. If a snapshot has both formats, the .safetensors file is
    taken: its header has the exact image count. Raises ConfigError if the folder cannot be read.
    """
    stds = None if in_std is None else [float(std) for std in np.atleast_1d(np.asarray(in_std, dtype=np.float64))]
    try:
        names = sorted(entry.name for entry in os.scandir(in_dir) if entry.is_file())
    except OSError as error:
        raise ConfigError(f"cannot read the input folder {in_dir}: {reason_of(error)}") from None
    found: dict[str, Input] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or (in_prefix is not None and match["prefix"] != in_prefix):
            continue
        std = float(match["std"])
        if stds is None or any(math.isclose(std, selected, abs_tol=1e-6) for selected in stds):
            path = os.path.join(in_dir, name)
            nimg = nimg_from_name(match["kimg"])
            if "." not in match["kimg"]:  # in thousands
                nimg = _recorded_nimg(path, int(match["kimg"])) or nimg
            # .safetensors sorts after .pkl, so it replaces the pickle here.
            found[name.removesuffix(match["suffix"])] = Input(path=path, nimg=nimg, std=std)
    return sorted(found.values(), key=lambda file: (file.nimg, file.std, file.path))


def choose_inputs(inputs: Iterable[Input], out_nimg: int | None) -> tuple[int, list[Input]]:
    """Return the output time, an input time with the thousands of `out_nimg`, and the inputs up to it, sorted."""
    inputs = sorted((file for file in inputs if file.nimg > 0), key=lambda file: (file.nimg, file.std))
    if not inputs:
        raise ConfigError(
            "no input snapshots to reconstruct from; their names are {prefix}-{kimg}-{std}.pkl, kimg above 0"
        )
    times = sorted({file.nimg for file in inputs})
    nimg = times[-1] if out_nimg is None else out_nimg
    if nimg not in times:
        same = [time for time in times if time // 1000 == nimg // 1000]
        if not same:
            near = min(times, key=lambda time: abs(time - nimg))
            raise ConfigError(
                f"no input snapshot at {kimg_text(nimg)} kimg ({nimg} images); there are {len(times)} times from"
                f" {kimg_text(times[0])} to {kimg_text(times[-1])} kimg, the nearest is {kimg_text(near)}"
            )
        nimg = same[-1]
    inputs = [file for file in inputs if file.nimg <= nimg]
    taken: dict[Any, Input] = {}
    for file in inputs:
        # A pickle's time is known to the thousand only, so compare the names as well.
        for key in {(file.nimg, file.std), parse_name(file.path) or (file.nimg, file.std)}:
            if taken.setdefault(key, file) is not file:
                raise ConfigError(
                    f"two inputs have the same time and EMA length: {os.path.basename(taken[key].path)} and"
                    f" {os.path.basename(file.path)}; choose one kind by its prefix"
                )
        require_std(file.std, f"{file.path}: {file.std}")
    return nimg, inputs


def _recorded_nimg(path: str, kimg: int) -> int | None:
    """Return the image count in the header of a .safetensors file if its thousands are those of the name."""
    if not path.endswith(".safetensors"):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            nimg = json.loads((file.metadata() or {}).get("nimg", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None  # if the file takes part, its check tells what is wrong
    return nimg if type(nimg) is int and nimg // 1000 == kimg else None
