"""Work beside a computation that must not notice it."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Put back the global random states of Python, NumPy and PyTorch as they were when the block began.

    Our own code draws from none of them; the libraries that load a VAE or DINOv2, or report to a service, may.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
