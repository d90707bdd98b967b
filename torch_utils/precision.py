"""Global state of PyTorch in one place: number formats, switches, threads, random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from torch_utils.precision_names import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type of activations, and of the weights applied to them, for `precision` on `device`."""
    if precision == "bf16":
        return torch.bfloat16
    return torch.float16 if precision == "fp16" and device.type == "cuda" else torch.float32


def precision_note(precision: Precision, device: torch.device) -> str | None:
    """Return what a user who asked for `precision` should know about `device`, or None."""
    if precision == "fp16" and device.type != "cuda":
        return f"float16 needs a CUDA GPU: the network computes in float32 on the {device.type} here."
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"TF32 needs an NVIDIA GPU of the Ampere generation or later: float32 on the {device.type} here."
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "This CPU has no instructions for bfloat16: it is emulated, and slower than --precision=fp32."
    return None


def fastest_precision(device: torch.device) -> tuple[Precision, str]:
    """Return the fastest format on `device`, of those that training and sampling work in, and the reason."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "as published"
        return "fp32", "this GPU has no tensor cores"
    if device.type != "cpu":
        return "fp32", f"other formats are not used on {device.type}"
    if precision_note("bf16", device) is None:
        return "bf16", "this CPU has instructions for it"
    return "fp32", "this CPU has no instructions for bfloat16"


@contextmanager
def numerics(*, cudnn_benchmark: bool = True, precision: Precision = "fp32") -> Iterator[None]:
    """Set PyTorch's switches as in the papers while the block runs, then restore them.

    TF32 is off (on for `precision` tf32), as is reduced-precision accumulation in half-precision matrix products.
    `cudnn_benchmark` lets cuDNN time its convolution algorithms. Without a GPU the switches have no effect.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = [
        (cudnn, "benchmark", cudnn_benchmark),
        (cudnn, "allow_tf32", precision == "tf32"),
        (matmul, "allow_tf32", precision == "tf32"),
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
    """Let CPU operations use `count` threads while the block runs, for work that more threads would slow down."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global random states after the block: libraries for a VAE, DINOv2 or logging may use them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
