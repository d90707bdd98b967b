"""Copies of tensors in the host's memory, so that they can be written while the originals go on changing."""

from typing import Any

import torch


class HostCopy:
    """Memory for a copy of nested dictionaries and lists of tensors; kept for the next copy of the same shapes.

    The copy is of the moment when `take` is called, in the order of the device's work: what is computed later doesn't
    change it. On CUDA `take` waits for nothing, and the values are there after `wait`.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        self._gpus: set[torch.device] = set()  # of the tensors that are on one; there is one a process
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, data: Any, *, dtype: torch.dtype | None = None) -> Any:
        """`data` with all tensors replaced by copies, of `dtype` if given; the copies before are overwritten."""
        self._used, self._copied = 0, None
        self._gpus.clear()
        copied = self._take(data, dtype)
        del self._buffers[self._used :]
        for gpu in self._gpus:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(gpu))
        return copied

    def wait(self) -> None:
        """Wait until the values of the last copy are there. Any thread may call this."""
        if self._copied is not None:
            self._copied.synchronize()

    def _take(self, data: Any, dtype: torch.dtype | None) -> Any:
        if isinstance(data, torch.Tensor):
            return self._copy(data, data.dtype if dtype is None else dtype)
        if isinstance(data, dict):
            return {key: self._take(value, dtype) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return type(data)(self._take(value, dtype) for value in data)
        return data

    def _copy(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = tensor.detach()
        on_cuda = tensor.device.type == "cuda"
        buffer = self._buffers[self._used] if self._used < len(self._buffers) else None
        fits = buffer is not None and (buffer.shape, buffer.dtype, buffer.is_pinned()) == (tensor.shape, dtype, on_cuda)
        if buffer is None or not fits or buffer.stride() != torch.empty_like(tensor, device="meta").stride():
            buffer = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=on_cuda)
            self._buffers[self._used : self._used + 1] = [buffer]
        self._used += 1
        buffer.copy_(tensor, non_blocking=on_cuda)
        if on_cuda:
            self._gpus.add(tensor.device)
        return buffer


@torch.no_grad()
def on_host(data: Any, *, dtype: torch.dtype | None = None) -> Any:
    """`data` with all tensors in the host's memory, copied only where they are elsewhere or of another dtype.

    A part of a larger tensor is copied too: torch.save would store the whole.
    """
    if isinstance(data, torch.Tensor):
        tensor = data.detach().to("cpu", dtype)
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if isinstance(data, dict):
        return {key: on_host(value, dtype=dtype) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(on_host(value, dtype=dtype) for value in data)
    return data
