"""Copies of tensors in the host's memory, so that they can be written while the originals go on changing."""

import threading
from collections.abc import Callable
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
        self._reserving: threading.Thread | None = None

    def reserve(self, data: Any, *, dtype: torch.dtype | None = None) -> None:
        """Begin to get the memory that `take` of the same arguments needs.

        Memory that was never written to takes the system several times longer to give than to fill: a thread does that,
        so that the first copy is as quick as the others.
        """
        self._reserving = threading.Thread(target=self._all, args=(data, dtype, _zero))
        self._reserving.start()

    @torch.no_grad()
    def take(self, data: Any, *, dtype: torch.dtype | None = None) -> Any:
        """`data` with all tensors replaced by copies, of `dtype` if given; the copies before are overwritten."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._copied = None
        self._gpus.clear()
        copied = self._all(data, dtype, self._fill)
        for gpu in self._gpus:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(gpu))
        return copied

    def wait(self) -> None:
        """Wait until the values of the last copy are there. Any thread may call this."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fill(self, buffer: torch.Tensor, tensor: torch.Tensor) -> None:
        on_cuda = tensor.device.type == "cuda"
        buffer.copy_(tensor, non_blocking=on_cuda)
        if on_cuda:
            self._gpus.add(tensor.device)

    def _all(self, data: Any, dtype: torch.dtype | None, fill: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """`data` with buffers in place of the tensors, each filled."""
        self._used = 0
        found = self._walk(data, dtype, fill)
        del self._buffers[self._used :]
        return found

    def _walk(self, data: Any, dtype: torch.dtype | None, fill: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        if isinstance(data, torch.Tensor):
            buffer = self._buffer(data.detach(), data.dtype if dtype is None else dtype)
            fill(buffer, data.detach())
            return buffer
        if isinstance(data, dict):
            return {key: self._walk(value, dtype, fill) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return type(data)(self._walk(value, dtype, fill) for value in data)
        return data

    def _buffer(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The next buffer, if it fits the tensor; else a new one in its place."""
        on_cuda = tensor.device.type == "cuda"
        wanted = torch.empty_like(tensor, dtype=dtype, device="meta")
        buffer = self._buffers[self._used] if self._used < len(self._buffers) else None
        if buffer is None or _layout(buffer) != _layout(wanted) or buffer.is_pinned() != on_cuda:
            buffer = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=on_cuda)
            self._buffers[self._used : self._used + 1] = [buffer]
        self._used += 1
        return buffer


def _zero(buffer: torch.Tensor, tensor: torch.Tensor) -> None:
    buffer.zero_()


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


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
