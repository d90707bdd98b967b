"""Checkpoints of either form: a file (torch_utils/checkpoints/checkpoint.py) or a folder
(torch_utils/checkpoints/sharded.py).

What reads folders is imported where it is needed: it takes a good part of the time that torch itself takes.
"""

from pathlib import Path
from typing import Any

from torch_utils.checkpoints.checkpoint import load_checkpoint
from torch_utils.checkpoints.stored_tensor import has_stored


def read_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """The content of a file, or of a folder with a StoredTensor in the place of each tensor.

    `verify` compares the digests of a folder's files; those of a file always are. Raises DamagedCheckpoint where it is
    not as it was written, ConfigError where it is missing or foreign.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    from torch_utils.checkpoints.sharded import open_sharded

    return open_sharded(path, verify=verify)


def read_whole(data: Any) -> Any:
    """`data` with whole tensors on the CPU in place of StoredTensors. To be called by every process."""
    if not has_stored(data):
        return data
    from torch_utils.checkpoints.sharded import read_all

    return read_all(data)
