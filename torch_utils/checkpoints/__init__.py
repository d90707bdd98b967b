"""Checkpoints of one file or of many, their digests, and copies in host memory to write them from.

The reader of folders is imported on first use: importing it takes nearly as long as torch itself.
"""

from pathlib import Path
from typing import Any

from torch_utils.checkpoints.checkpoint import load_checkpoint
from torch_utils.checkpoints.stored import has_stored


def read_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a file, or a folder with a StoredTensor in place of each tensor.

    `verify` compares the digests of a folder's files; that of a file is always compared. Raises DamagedCheckpoint if
    the checkpoint is not as it was written, ConfigError if it is missing or something else.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    from torch_utils.checkpoints.sharded import open_sharded

    return open_sharded(path, verify=verify)


def read_whole(data: Any) -> Any:
    """Return `data` with whole tensors on the CPU in place of StoredTensors. Every process must call this."""
    if not has_stored(data):
        return data
    from torch_utils.checkpoints.sharded import read_all

    return read_all(data)
