"""Copies of tensors in host memory, which can be written to a file while the originals change."""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from torch_utils.checkpoints.stored import map_tensors

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]  # shape, strides, type, page-locked

_SLAB_BYTES = 256 << 20  # a power of two
_ALIGNMENT = 64


class HostCopy:
    """Memory for a copy of nested dictionaries and lists of tensors, reused by the next copy of the same shapes.

    The copy has the values at the time of `take`, in the order of the device's work: later computations don't change
    it. On CUDA `take` does not wait, and the values are complete after `wait`.

    The memory is a few large slabs. Page-locked memory comes in powers of two (PyTorch's CachingHostAllocator), and
    each request stops the GPU's driver: one for each tensor would take half as much again, and many slow iterations.
    """

    def __init__(self) -> None:
        self._layouts: list[Layout] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # views of slabs, and the same as `_alone`
        self._gpus: set[torch.device] = set()  # of the copied tensors; a process uses one at most
        self._copied: torch.cuda.Event | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, data: Any, *, dtype: torch.dtype | None = None) -> None:
        """Allocate the memory for `take` in a thread: providing memory takes the system far longer than a copy."""
        self._reserving = threading.Thread(target=self._all, args=(data, dtype, lambda buffer, _: buffer.zero_()))
        self._reserving.start()

    @torch.no_grad()
    def take(self, data: Any, *, dtype: torch.dtype | None = None) -> Any:
        """Return `data` with copies of all tensors, of `dtype` if given; overwrites the previous copies."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._gpus.clear()
        copied = self._all(data, dtype, self._fill)
        self._copied = None
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
        layouts: list[Layout] = []
        map_tensors(lambda tensor: layouts.append(_layout(tensor, dtype)), data)
        if layouts != self._layouts:
            self.wait()
            self._layouts, self._buffers = [], []  # first: there may be no room for both
            self._buffers = [(view, _alone(view)) for view in _allocate(layouts)]
            self._layouts = layouts
        buffers = iter(self._buffers)

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            view, alone = next(buffers)
            fill(view, tensor.detach())
            return alone

        return map_tensors(copied, data)


def _layout(tensor: torch.Tensor, dtype: torch.dtype | None) -> Layout:
    """Return the layout of a copy of `tensor` in `dtype`, and whether its memory is page-locked: for a GPU's copies."""
    like = torch.empty_like(tensor, dtype=dtype, device="meta")
    return tuple(like.shape), like.stride(), like.dtype, tensor.device.type == "cuda"


def _allocate(layouts: list[Layout]) -> list[torch.Tensor]:
    """Return tensors of these layouts: views of slabs of at most _SLAB_BYTES, or of one tensor."""
    slabs: list[tuple[int, bool]] = []  # bytes in use, and whether page-locked
    places = []
    for shape, _, dtype, pinned in layouts:
        num_bytes = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        fitting = (i for i, (used, kind) in enumerate(slabs) if kind == pinned and used + num_bytes <= _SLAB_BYTES)
        index = next(fitting, len(slabs))
        if index == len(slabs):
            slabs.append((0, pinned))
        places.append((index, slabs[index][0]))
        slabs[index] = slabs[index][0] + num_bytes, pinned
    memory = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for num_bytes, pinned in slabs]
    views = []
    for (index, start), (shape, stride, dtype, _) in zip(places, layouts, strict=True):
        flat = memory[index][start : start + math.prod(shape) * dtype.itemsize].view(dtype)
        views.append(flat.as_strided(shape, stride))
    return views


def _alone(view: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the memory of `view` with a storage of its own: torch.save writes whole storages.

    It keeps the slab alive. A GPU's copies go to `view`: the allocator watches over its own storages only, and does not
    hand their memory out again before the copies to them are complete.
    """
    if view.numel() == 0:
        return view.clone()
    memory = view.as_strided((view.numel(),), (1,)).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=view.dtype).as_strided(view.shape, view.stride())


@torch.no_grad()
def on_host(data: Any, *, dtype: torch.dtype | None = None) -> Any:
    """Return `data` with all tensors in host memory, copied only if they are elsewhere or of another dtype.

    A view of a larger tensor is copied too: torch.save would store the whole storage.
    """

    def host(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu", dtype)
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    return map_tensors(host, data)
