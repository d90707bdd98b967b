"""Two computations on one input at the same time, where the device can: each fills the gaps that the other leaves."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., torch.Tensor]


class SideBySide:
    """Stands for both functions, of a tensor x and other arguments; gives both results.

    On a CUDA device the first runs on a stream of its own beside the second; the caller's stream has both results when
    it goes on. Elsewhere one runs after the other. They must not share memory that they write to.
    """

    def __init__(self, first: Function, second: Function) -> None:
        self._first = first
        self._second = second
        self._side: torch.cuda.Stream | None = None

    def __call__(self, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Both results for `x` and `args`."""
        if not x.is_cuda:
            return self._first(x, *args), self._second(x, *args)
        if self._side is None:
            self._side = torch.cuda.Stream(x.device)
        here = torch.cuda.current_stream(x.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            first = self._first(x, *args)
        # The allocator may give freed memory out as soon as the stream that it belongs to has come so far: it has
        # to know that the other stream reads x, and that this one reads the result.
        x.record_stream(self._side)
        second = self._second(x, *args)
        here.wait_stream(self._side)
        first.record_stream(here)
        return first, second
