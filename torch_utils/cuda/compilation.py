"""torch.compile with what was compiled kept for the next run, and a word to the user about the time that it takes."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from dnnlib.util import make_cache_dir_path


def compiled(function: Callable[..., Any], announce: Callable[[str], None] | None = None) -> Callable[..., Any]:
    """`function` of tensors through torch.compile: as one graph, once for each combination of shapes.

    What is compiled is kept in the cache folder, where TORCHINDUCTOR_CACHE_DIR does not name another place. `announce`
    is told before the first call of each combination, and how long it took.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", make_cache_dir_path("compiled"))
    inner = torch.compile(function, fullgraph=True, dynamic=False)
    seen: set[tuple[object, ...]] = set()

    def call(*args: Any) -> Any:
        key = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        if key in seen:
            return inner(*args)
        start = time.perf_counter()
        if announce is not None:
            announce(f"Compiling for batches of {args[0].shape[0]} ...")
        result = inner(*args)
        seen.add(key)
        if announce is not None:
            announce(f"... compiled in {time.perf_counter() - start:.0f} s; the next run finds it in the cache.")
        return result

    return call
