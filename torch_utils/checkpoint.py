"""Training checkpoints: one torch.save file that appears whole or not at all and is read without running code."""

import os
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError


def save_checkpoint(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write `data` (plain containers, numbers, strings and tensors) to `path`, atomically."""
    with atomic_path(path) as temp:
        torch.save(data, temp)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU. Raises ConfigError where the file is missing or damaged."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: {error.strerror or error}") from None
    except Exception:
        # A dozen kinds, with texts that advise to run what is in the file.
        raise ConfigError(
            f"{path} cannot be read as a checkpoint: it is damaged or something else; without it, a run goes on from"
            " the checkpoint before"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no checkpoint: it holds a {type(data).__name__}")
    return data


def newest(folder: Path, prefix: str, suffix: str) -> Path | None:
    """The file called prefix + digits + suffix in `folder` with the highest number, or None."""
    found = []
    for path in folder.glob(f"{prefix}*{suffix}"):
        digits = path.name[len(prefix) : len(path.name) - len(suffix)]
        if digits.isdecimal():
            found.append((int(digits), path))
    return max(found)[1] if found else None
