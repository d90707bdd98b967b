"""Output folders: whether they can be had, before anything is made, and making them."""

import os
from pathlib import Path

from dnnlib.errors import ConfigError


def require_folder(path: Path) -> None:
    """Raise ConfigError if `path` is no folder and cannot become one; makes nothing."""
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
        for name in path.parts[len(nearest.parts) :]:
            (nearest / name).exists()  # raises where a folder here cannot have such a name
    except OSError as error:
        raise ConfigError(f"the output folder {path} cannot be made: {error.strerror}") from None
    if not nearest.is_dir():
        raise ConfigError(f"the output folder {path} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"the output folder {path} cannot be written to: no permission for {nearest}")


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it where missing. Raises ConfigError where that fails."""
    require_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output folder {path} cannot be made: {error.strerror}") from None
