"""The global switches of PyTorch, in one place: numerics and threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def numerics(*, cudnn_benchmark: bool = True) -> Iterator[None]:
    """Compute as the papers did while the block runs, then restore what was set before.

    TF32 off, no reduced-precision accumulation in half-precision matrix products; `cudnn_benchmark` lets cuDNN time its
    convolution algorithms. Without a GPU the switches have no effect.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = [
        (cudnn, "benchmark", cudnn_benchmark),
        (cudnn, "allow_tf32", False),
        (matmul, "allow_tf32", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    previous = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in previous:
            setattr(owner, name, value)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let an operation on the CPU use `count` threads while the block runs, where more would be in each other's way."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
