"""Calls on tensors of fixed places in memory, recorded once for each combination of shapes and then replayed."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

Function = Callable[..., torch.Tensor]
# Makes the function that computes function(*buffers) anew at each call, always into the same tensor.
Record = Callable[[Function, Sequence[torch.Tensor | None]], Callable[[], torch.Tensor]]

_NUM_WARMUP = 3  # calls before a recording: libraries choose algorithms and take their workspaces in the first


def record_graph(function: Function, buffers: Sequence[torch.Tensor | None]) -> Callable[[], torch.Tensor]:
    """The kernels of function(*buffers) as a CUDA graph: one launch instead of hundreds."""
    device = next(buffer.device for buffer in buffers if buffer is not None)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_NUM_WARMUP):
            function(*buffers)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that write files wait for events of their own; in the default mode that would spoil the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*buffers)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def record_plainly(function: Function, buffers: Sequence[torch.Tensor | None]) -> Callable[[], torch.Tensor]:
    """Where there are no graphs: the call itself stands for the replay."""
    return partial(function, *buffers)


class StaticCall:
    """Stands for `function`, whose arguments are tensors or None and which depends on nothing else that changes.

    The result is the caller's own, not overwritten by later calls. Calls from several CUDA streams wait for each other.
    """

    def __init__(self, function: Function, record: Record = record_graph) -> None:
        self._function = function
        self._record = record
        self._last: torch.cuda.Event | None = None  # the end of the last call
        self._recorded: dict[tuple[object, ...], tuple[list[torch.Tensor | None], Callable[[], torch.Tensor]]] = {}

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """function(*inputs)."""
        key = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._recorded:
            buffers = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
            self._recorded[key] = buffers, self._record(self._function, buffers)
        buffers, replay = self._recorded[key]
        stream = torch.cuda.current_stream(inputs[0].device) if inputs[0] is not None and inputs[0].is_cuda else None
        if stream is not None and self._last is not None:
            stream.wait_event(self._last)
        for buffer, value in zip(buffers, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        result = replay().clone()
        if stream is not None:
            self._last = stream.record_event()
        return result
