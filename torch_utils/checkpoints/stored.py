"""Nested data with tensors, of which some may still be in the folder of a checkpoint (sharded.py)."""

from collections.abc import Callable
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


def map_leaves(function: Callable[[str, Any], Any], data: Any, path: str = "") -> Any:
    """Copy of nested data with function(path, leaf) in place of leaves; a path is like optimizer/state/0/exp_avg."""
    if isinstance(data, dict):
        return {key: map_leaves(function, value, f"{path}/{key}") for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(map_leaves(function, value, f"{path}/{index}") for index, value in enumerate(data))
    return function(path.removeprefix("/"), data)


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """Nested dictionaries, lists and tuples like `data`, with function(tensor) in place of each tensor."""
    return map_leaves(lambda _, leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, data)


def flatten(data: Any) -> dict[str, Any]:
    """All leaves of nested dictionaries, lists and tuples by their path."""
    leaves: dict[str, Any] = {}
    map_leaves(leaves.__setitem__, data)
    return leaves


def has_stored(data: Any) -> bool:
    """Return True if `data` contains a StoredTensor."""
    return any(isinstance(leaf, StoredTensor) for leaf in flatten(data).values())


def check_same(stored: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError if the tensors of two flat dictionaries differ in names or shapes."""
    shapes = [{path: tuple(leaf.shape) for path, leaf in named.items()} for named in (stored, ours)]
    if shapes[0] != shapes[1]:
        differences = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ValueError(f"the stored tensors have other names or shapes: {differences[:4]}")
