"""Checkpoints of either form, a file or a folder (torch_utils/sharded_checkpoint.py), and tensors still in a folder.

What reads and writes folders is imported where it is needed: it takes a good part of the time that torch itself takes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_utils.checkpoint import load_checkpoint


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint's folder, not read yet."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """The content of a file, or of a folder with a StoredTensor in the place of each tensor.

    `verify` compares the digests of a folder's files; those of a file always are. Raises DamagedCheckpoint where it is
    not as it was written, ConfigError where it is missing or foreign.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    from torch_utils.sharded_checkpoint import open_sharded

    return open_sharded(path, verify=verify)


def read_whole(data: Any) -> Any:
    """`data` with whole tensors on the CPU in place of StoredTensors. To be called by every process."""
    if not has_stored(data):
        return data
    from torch_utils.sharded_checkpoint import read_all

    return read_all(data)


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
