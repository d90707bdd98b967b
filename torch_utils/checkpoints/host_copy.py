"""Copies of tensors in host memory, which can be written to a file while the originals change."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from torch_utils.checkpoints.stored import map_tensors


class HostCopy:
    """Memory for a copy of nested dictionaries and lists of tensors, reused by the next copy of the same shapes.

    The copy has the values at the time of `take`, in the order of the device's work: later computations don't change
    it. On CUDA `take` does not wait, and the values are complete after `wait`.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        self._gpus: set[torch.device] = set()  # of the copied tensors; a process uses one at most
        self._copied: torch.cuda.Event | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, data: Any, *, dtype: torch.dtype | None = None) -> None:
        """Start allocating the memory for `take` with the same arguments, in a thread.

        The system takes several times longer to provide fresh memory than to fill it. With this, the first copy is as
        fast as the later ones.
        """
        self._reserving = threading.Thread(target=self._all, args=(data, dtype, _zero))
        self._reserving.start()

    @torch.no_grad()
    def take(self, data: Any, *, dtype: torch.dtype | None = None) -> Any:
        """Return `data` with copies of all tensors, of `dtype` if given; overwrites the previous copies."""
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
        """Wait until the last copy is complete. Any thread may call this."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fill(self, buffer: torch.Tensor, tensor: torch.Tensor) -> None:
        on_cuda = tensor.device.type == "cuda"
        buffer.copy_(tensor, non_blocking=on_cuda)
        if on_cuda:
            self._gpus.add(tensor.device)

    def _all(self, data: Any, dtype: torch.dtype | None, fill: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """Return `data` with a buffer, filled by `fill`, in place of each tensor."""

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            buffer = self._buffer(tensor.detach(), tensor.dtype if dtype is None else dtype)
            fill(buffer, tensor.detach())
            return buffer

        self._used = 0
        copy = map_tensors(copied, data)
        del self._buffers[self._used :]
        return copy

    def _buffer(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the next buffer if it fits the tensor, else a new one in its place."""
        on_cuda = tensor.device.type == "cuda"
        layout = _layout(torch.empty_like(tensor, dtype=dtype, device="meta"))
        buffer = self._buffers[self._used] if self._used < len(self._buffers) else None
        if buffer is None or _layout(buffer) != layout or buffer.is_pinned() != on_cuda:
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
    """Return `data` with all tensors in host memory, copied only if they are elsewhere or of another dtype.

    A view of a larger tensor is copied too: torch.save would store the whole storage.
    """

    def host(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu", dtype)
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    return map_tensors(host, data)
