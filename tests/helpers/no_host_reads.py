"""A check that work on a device reads nothing on the host: run it on the meta device, which has no values."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.paths import ROOT


class NoHostReads(TorchDispatchMode):
    """Raises AssertionError, with file and line, at operations that read a value or that make or take CPU tensors.

    On a GPU the host would wait there for all work in flight, and a CUDA graph could not be recorded.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(f"{_place()}: a value is read on the host")
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" for x in tensors):
            raise AssertionError(f"{_place()}: {func} takes or makes a CPU tensor")
        return result


def _place() -> str:
    """Return the innermost line of this repository outside of this file, and of a virtual environment in it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return "outside of the repository"
