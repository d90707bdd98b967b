"""The stored averages that a reconstruction is made of: found in a folder, and chosen."""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dnnlib.errors import ConfigError
from training.snapshot import nimg_from_kimg, parse_name

_NAME = re.compile(r"(?P<prefix>.*)-(?P<kimg>\d+)-(?P<std>\d+\.\d+)(?P<suffix>\.pkl|\.safetensors)")


@dataclass(frozen=True, kw_only=True)
class Input:
    """A stored average: its file, the images seen when it was taken, and its relative EMA length."""

    path: str
    nimg: int
    std: float


def list_input_pickles(
    in_dir: str | os.PathLike[str], in_prefix: str | None = None, in_std: float | Iterable[float] | None = None
) -> list[Input]:
    """The snapshots {prefix}-{kimg}-{std}.pkl or .safetensors in `in_dir`, sorted by (nimg, std).

    `in_prefix` and `in_std` leave out those with another prefix or length. Of two formats of one snapshot, the
    safetensors file counts; its header has the exact image count. Raises ConfigError where the folder cannot be read.
    """
    stds = None if in_std is None else [float(std) for std in np.atleast_1d(np.asarray(in_std, dtype=np.float64))]
    try:
        names = sorted(entry.name for entry in os.scandir(in_dir) if entry.is_file())
    except OSError as error:
        raise ConfigError(f"cannot read the input folder {in_dir}: {error.strerror}") from None
    found: dict[str, Input] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or (in_prefix is not None and match["prefix"] != in_prefix):
            continue
        std = float(match["std"])
        if stds is None or any(math.isclose(std, wanted, abs_tol=1e-6) for wanted in stds):
            # The suffixes sort in the order in which the later one wins.
            path = os.path.join(in_dir, name)
            nimg = _recorded_nimg(path, int(match["kimg"]))
            nimg = nimg_from_kimg(int(match["kimg"])) if nimg is None else nimg
            found[name.removesuffix(match["suffix"])] = Input(path=path, nimg=nimg, std=std)
    return sorted(found.values(), key=lambda file: (file.nimg, file.std, file.path))


def choose_inputs(inputs: Iterable[Input], out_nimg: int | None) -> tuple[int, list[Input]]:
    """The output time and the inputs up to it, sorted by time and length; times need to agree in thousands only."""
    inputs = sorted((file for file in inputs if file.nimg > 0), key=lambda file: (file.nimg, file.std))
    if not inputs:
        raise ConfigError(
            "no input snapshots to reconstruct from; they are named {prefix}-{kimg}-{std}.pkl, kimg above 0"
        )
    times = sorted({file.nimg for file in inputs})
    nimg = times[-1] if out_nimg is None else out_nimg
    if nimg not in times:
        same = [time for time in times if time // 1000 == nimg // 1000]
        if not same:
            near = min(times, key=lambda time: abs(time - nimg))
            raise ConfigError(
                f"no input snapshot at {nimg // 1000} kimg ({nimg} images); there are {len(times)} times from"
                f" {times[0] // 1000} to {times[-1] // 1000} kimg, the nearest is {near // 1000}"
            )
        nimg = same[-1]
    inputs = [file for file in inputs if file.nimg <= nimg]
    taken: dict[Any, Input] = {}
    for file in inputs:
        # A pickle's time is known to the thousand only, so that what the names say counts too.
        for key in {(file.nimg, file.std), parse_name(file.path) or (file.nimg, file.std)}:
            if taken.setdefault(key, file) is not file:
                raise ConfigError(
                    f"two inputs have the same time and EMA length: {os.path.basename(taken[key].path)} and"
                    f" {os.path.basename(file.path)}; choose one kind by its prefix"
                )
        if not 0 < file.std < 0.289:
            raise ConfigError(f"{file.path}: {file.std} is no EMA length; it must lie above 0 and below 0.289")
    return nimg, inputs


def _recorded_nimg(path: str, kimg: int) -> int | None:
    """The image count in the header of a .safetensors file, if its thousands are those of the name; else None."""
    if not path.endswith(".safetensors"):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            nimg = json.loads((file.metadata() or {}).get("nimg", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None  # what is wrong with the file is said when it is checked, if it takes part
    return nimg if type(nimg) is int and nimg // 1000 == kimg else None
