"""Tensors that are still in the folder of a checkpoint, and nested data with such."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint's folder, not read yet."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def has_stored(data: Any) -> bool:
    """Whether a StoredTensor is in `data`."""
    return any(isinstance(leaf, StoredTensor) for leaf in flatten(data).values())


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """All leaves of nested dictionaries, lists and tuples by their path, e.g. optimizer/state/0/exp_avg."""
    if isinstance(data, dict | list | tuple):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return {k: v for key, value in items for k, v in flatten(value, f"{path}/{key}").items()}
    return {path.removeprefix("/"): data}


def check_same(stored: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError where the tensors in two flat dictionaries have other names or shapes."""
    shapes = [{path: tuple(leaf.shape) for path, leaf in named.items()} for named in (stored, ours)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the stored tensors are others: {sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:4]}"
        )
