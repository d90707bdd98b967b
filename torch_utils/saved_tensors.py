"""What a computation keeps in memory for its backward pass."""

from collections.abc import Callable
from typing import Any

import torch


def saved_bytes(work: Callable[[], Any]) -> int:
    """The bytes of all tensors that `work()` keeps for its backward pass, parameters left out, each counted once."""
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())
