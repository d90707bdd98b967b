"""Modules laid out without values, as what a file's tensors are then put into, quickly."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_SCALINGS = ("mul", "__mul__", "__rmul__")


class WithoutValues(TorchFunctionMode):
    """A context in which new tensors are on the meta device: a shape and a type, no memory.

    `torch.device("meta")` means the same. But there the first random tensor, or product with a number, makes PyTorch
    load its compiler, which takes more than a second; here the few operations of constructors are done by allocating.
    Whatever else a constructor does goes the ordinary way.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by PyTorch in place of its functions."""
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs.pop("generator", None)
            return torch.empty(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__name__", "") in _SCALINGS and len(args) == 2 and not kwargs:
            tensor, factor = args
            if tensor.is_meta and tensor.is_floating_point() and isinstance(factor, int | float):
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        with torch.device("meta"):
            return func(*args, **kwargs)
