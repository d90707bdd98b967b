"""Weighted sums of the tensors of many networks, block by block, in memory independent of their number."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dnnlib.background import map_in_order
from dnnlib.errors import ConfigError, reason_of
from torch_utils.precision import cpu_threads


class Reader(Protocol):
    """The tensors of one network, by name."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""
        ...

    def copy_to(self, row: torch.Tensor, name: str, start: int) -> None:
        """Copy values of the flattened tensor, from index `start`, to `row`, float32 [N]."""
        ...


class StateReader:
    """Reader of a network in memory, or in a mapped file."""

    def __init__(self, tensor: Callable[[str], torch.Tensor]) -> None:
        self.tensor = tensor

    def copy_to(self, row: torch.Tensor, name: str, start: int) -> None:
        """See Reader."""
        row.copy_(self.tensor(name).reshape(-1)[start : start + len(row)])


class Float16File:
    """Reader of a .safetensors file of float16 tensors, piece by piece, which is faster than mapping it.

    The file is, by the format's specification, an 8-byte length, a JSON header of that length with the offset of each
    tensor, and the values. Raises ValueError, KeyError, TypeError or OSError for other files.
    """

    def __init__(self, path: str, tensor: Callable[[str], torch.Tensor]) -> None:
        self.tensor = tensor
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 stays open as long as this lives
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(self._file.read(length))
        entries.pop("__metadata__", None)
        if any(entry["dtype"] != "F16" for entry in entries.values()):
            raise ValueError("not all tensors are float16")
        self._begin = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in entries.items()}
        self._buffer = np.empty(0, dtype="<f2")

    def copy_to(self, row: torch.Tensor, name: str, start: int) -> None:
        """See Reader. Raises ConfigError if the file has become shorter or unreadable."""
        if len(self._buffer) < len(row):
            self._buffer = np.empty(len(row), dtype="<f2")
        values = self._buffer[: len(row)]
        try:
            self._file.seek(self._begin[name] + 2 * start)
            count = self._file.readinto(values.view(np.uint8).data)
        except OSError as error:
            raise ConfigError(f"{self._file.name} cannot be read: {reason_of(error)}") from None
        if count != values.nbytes:
            raise ConfigError(f"{self._file.name} has become shorter while it was read")
        row.copy_(torch.from_numpy(values))


# I inputs, O outputs, N values of a block.
BLOCK_BYTES = 4 << 20  # of a block of all inputs in float32: fits the processor's cache
# Outputs that are multiplied at a time, filled up with zeros: the rounding of a row depends on the number of rows, and
# an output must not depend on the others that are built with it.
_ROWS = 8
_AHEAD = 2  # blocks that are read while one is added


class NotFinite(Exception):
    """A sum that float16 cannot hold. Arguments: index of the output, name of the tensor."""


class WeightedSums:
    """Sums of networks with tensors of these `shapes`, with coefficients `weights` [inputs, outputs].

    `outputs` holds the finished tensors in float16, by name. Besides them, memory holds a few blocks; it holds sums in
    float32 only if `add` is called more than once, because not all inputs can be open at the same time.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], weights: npt.NDArray[np.float64]) -> None:
        self.outputs: list[dict[str, torch.Tensor]] = [{} for _ in range(weights.shape[1])]
        self._shapes = dict(shapes)
        self._weights = torch.from_numpy(weights.T.copy()).to(torch.float32)  # [O, I]
        self._sums: dict[str, torch.Tensor] = {}  # [O, numbers of the tensor]

    def add(self, indices: Sequence[int], readers: Sequence[Reader], last: bool) -> Iterator[float]:
        """Add the inputs `indices`, yielding the share that is done; `last` completes the outputs. Raises NotFinite."""
        weights = torch.zeros(-(-len(self.outputs) // _ROWS) * _ROWS, len(readers))
        weights[: len(self.outputs)] = self._weights[:, list(indices)]
        product = torch.empty(weights.shape[0] * self._width(len(readers)))
        with cpu_threads(max(torch.get_num_threads() - 1, 1)):  # leaves one to the reading
            yield from self._add(weights, product, readers, last)

    def _add(
        self, weights: torch.Tensor, product: torch.Tensor, readers: Sequence[Reader], last: bool
    ) -> Iterator[float]:
        total = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        done = 0
        for name, start, stop, stacked in self._read(readers):
            products = product[: weights.shape[0] * (stop - start)].view(weights.shape[0], -1)
            for rows, out in zip(weights.split(_ROWS), products.split(_ROWS), strict=True):
                torch.mm(rows, stacked, out=out)
            block = products[: len(self.outputs)]  # [O, N]
            if not last:
                if name not in self._sums:
                    self._sums[name] = torch.zeros(len(self.outputs), torch.Size(self._shapes[name]).numel())
                self._sums[name][:, start:stop] += block
            else:
                if name in self._sums:
                    block += self._sums[name][:, start:stop]
                self._complete(name, start, block)
                if stop == torch.Size(self._shapes[name]).numel():
                    self._sums.pop(name, None)
            done += stop - start
            yield done / total

    def _width(self, num_inputs: int) -> int:
        return max(BLOCK_BYTES // (4 * num_inputs), 1024)

    def _read(self, readers: Sequence[Reader]) -> Iterator[tuple[str, int, int, torch.Tensor]]:
        """Yield blocks of all flattened tensors: name, start, stop, values [I, N] in float32, valid until the next."""
        width = self._width(len(readers))
        buffers = [torch.empty(len(readers) * width) for _ in range(_AHEAD + 1)]
        sizes = {name: torch.Size(shape).numel() for name, shape in self._shapes.items()}
        blocks = [(name, i, min(i + width, size)) for name, size in sizes.items() for i in range(0, size, width)]

        def read(numbered: tuple[int, tuple[str, int, int]]) -> tuple[str, int, int, torch.Tensor]:
            index, (name, start, stop) = numbered
            stacked = buffers[index % len(buffers)][: len(readers) * (stop - start)].view(len(readers), -1)
            for row, reader in zip(stacked, readers, strict=True):
                reader.copy_to(row, name, start)
            return name, start, stop, stacked

        return map_in_order(ThreadPoolExecutor(1), read, enumerate(blocks), max_pending=_AHEAD + 1)

    def _complete(self, name: str, start: int, block: torch.Tensor) -> None:
        # A cheap comparison, which NaN fails as well; the exact test below includes the rounding to float16.
        low, high = torch.aminmax(block)
        limit = torch.finfo(torch.float16).max
        doubtful = not bool((low >= -limit) & (high <= limit))
        if start == 0:
            self._allocate(name)
        targets = self._targets[:, start : start + block.shape[1]]
        targets.copy_(block)
        if doubtful:
            finite = torch.isfinite(targets).all(dim=1)
            if not finite.all():
                raise NotFinite(int(finite.int().argmin()), name)

    def _allocate(self, name: str) -> None:
        """Allocate a tensor of all outputs at once, because large allocations come in large pages.

        Each output still has its own storage, so that a file written from it holds nothing of the others.
        """
        shape = self._shapes[name]
        room = np.empty((len(self.outputs), torch.Size(shape).numel()), dtype=np.float16)
        self._targets = torch.from_numpy(room)
        for tensors, row in zip(self.outputs, room, strict=True):
            tensors[name] = torch.from_numpy(row).view(shape)
