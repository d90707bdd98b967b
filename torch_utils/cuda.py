"""Compilation, CUDA graphs, streams and transfers. Everything works on a CPU, too."""

import gc
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from torch_utils.compiling import keep_compiled_code, missing_compiler

Function = Callable[..., torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
# Makes a function that computes function(*buffers) at each call, always into the same tensor.
Record = Callable[[Function, Sequence[torch.Tensor | None]], Callable[[], torch.Tensor]]

_NUM_WARMUP = 3  # calls before a recording: in the first, libraries choose algorithms and allocate workspaces
_MAX_RECORDINGS = 4  # of one StaticCall: each keeps the memory of all its intermediate results

_MAX_COMPILED = 128  # combinations of kinds of networks and shapes in one process

# PyTorch hands out 32 streams of each priority in turn: a new one may be the stream of a graph that still lives.
_POOL_SIZE = 32
_recording_streams: "weakref.WeakSet[torch.cuda.Stream]" = weakref.WeakSet()


def compiled(
    function: Callable[..., Any], announce: Callable[[str], None] | None = None, *, fullgraph: bool = True
) -> Callable[..., Any]:
    """Compile a function of tensors with torch.compile: as one graph, once for each combination of shapes.

    Without `fullgraph`, code that cannot be compiled runs between several graphs.

    `announce` gets a line before the first call of each combination, and another one with the time that it took. Where
    a compiler is missing it gets one line, and the function is called as it is. See `compiling` for the folder.
    """
    keep_compiled_code()
    inner: Callable[..., Any] | None = None
    missing: str | None = None
    seen: set[tuple[object, ...]] = set()

    def call(*args: Any) -> Any:
        nonlocal inner, missing
        if inner is None:
            missing = missing_compiler(args[0].device)
            inner = torch.compile(function, fullgraph=fullgraph, dynamic=False) if missing is None else function
            if missing is not None and announce is not None:
                announce(f"Not compiled, and slower: {missing}.")
        key = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        if key in seen or missing is not None:
            return inner(*args)
        start = time.perf_counter()
        if announce is not None:
            announce(f"Compiling for batches of {args[0].shape[0]} ...")
        # All networks are versions of the same code to the compiler, which refuses the ninth. The second name of the
        # limit is from before PyTorch 2.7.
        options: Any = torch._dynamo.config
        limit = "recompile_limit" if hasattr(options, "recompile_limit") else "cache_size_limit"
        with options.patch({limit: _MAX_COMPILED}):
            result = inner(*args)
        seen.add(key)
        if announce is not None:
            announce(f"... compiled in {time.perf_counter() - start:.0f} s; the next run finds it in the cache.")
        return result

    return call


def record_graph(function: Function, buffers: Sequence[torch.Tensor | None]) -> Callable[[], torch.Tensor]:
    """Record the kernels of function(*buffers) as a CUDA graph: one launch instead of hundreds.

    Every graph has a stream of its own as long as it lives. cuBLAS has one workspace for each stream: graphs that were
    recorded on the same stream would write to it at the same time, and the end of one would free it for all.
    """
    device = next(buffer.device for buffer in buffers if buffer is not None)
    gc.collect()  # now rather than during the recording, which the end of another graph would invalidate
    torch.cuda.synchronize(device)  # graphs that ended may still run, in memory that the calls below take
    stream = _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the graph repeats cuDNN's choice: time the algorithms once
    try:
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARMUP):
                function(*buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        # Threads that write files wait for events of their own, which would invalidate a recording in the default mode.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function(*buffers)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return _Replay(graph, stream, result)


class _Replay:
    """Replays a graph, and keeps its stream from being given to another one."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, result: torch.Tensor) -> None:
        self._graph = graph
        self._stream = stream
        self._result = result

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self._result


def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that no living graph was recorded on.

    It is one of high priority, since all other streams of this code have the default priority: work that is queued on
    them never shares a workspace with a graph.
    """
    for _ in range(_POOL_SIZE):
        stream = torch.cuda.Stream(device, priority=-1)
        if stream not in _recording_streams:
            _recording_streams.add(stream)
            return stream
    raise RuntimeError(
        f"{_POOL_SIZE} CUDA graphs are in memory, as many as there are streams; drop some networks first"
    )


def record_plainly(function: Function, buffers: Sequence[torch.Tensor | None]) -> Callable[[], torch.Tensor]:
    """Replacement for `record_graph` on devices without graphs: each replay is an ordinary call."""
    return partial(function, *buffers)


class StaticCall:
    """Calls `function` by replaying a recording, one for each combination of shapes; the last few are kept.

    The arguments must be tensors or None, and `function` must not depend on anything else that changes. The result is a
    copy that later calls do not overwrite. Calls from several CUDA streams wait for each other.
    """

    def __init__(self, function: Function, record: Record = record_graph) -> None:
        self._function = function
        self._record = record
        self._last: torch.cuda.Event | None = None  # end of the last call
        # By combination, least recently used first: buffers, and the function that replays.
        self._recorded: OrderedDict[
            tuple[object, ...], tuple[list[torch.Tensor | None], Callable[[], torch.Tensor]]
        ] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Return function(*inputs)."""
        key = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._recorded:
            if len(self._recorded) == _MAX_RECORDINGS:
                if self._last is not None:
                    self._last.synchronize()  # it may be the one that runs
                self._recorded.popitem(last=False)
            buffers = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
            self._recorded[key] = buffers, self._record(self._function, buffers)
        self._recorded.move_to_end(key)
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


class SideBySide:
    """Computes two functions of a tensor x and other arguments at the same time; each fills the other's gaps.

    On a CUDA device the first runs on its own stream in parallel to the second, and the caller's stream waits for both.
    Elsewhere one runs after the other. They must not share memory that they write to.
    """

    def __init__(self, first: Function, second: Function) -> None:
        self._first = first
        self._second = second
        self._side: torch.cuda.Stream | None = None

    def __call__(self, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both results for `x` and `args`."""
        if not x.is_cuda:
            return self._first(x, *args), self._second(x, *args)
        if self._side is None:
            self._side = torch.cuda.Stream(x.device)
        here = torch.cuda.current_stream(x.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            first = self._first(x, *args)
        # The allocator reuses freed memory as soon as the stream that allocated it gets there. It has to know that the
        # other stream reads x, and that this one reads the result.
        x.record_stream(self._side)
        second = self._second(x, *args)
        here.wait_stream(self._side)
        first.record_stream(here)
        return first, second


def on_device(batches: Iterable[Pair], device: torch.device) -> Iterator[Pair]:
    """Yield each batch, images and labels, on `device`.

    On a GPU a separate stream copies them. The host is ahead of the GPU: when it asks for the next batch, the GPU still
    works on the previous one, and the copy runs in parallel if the tensors are in pinned memory.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    for images, labels in batches:
        with torch.cuda.stream(stream):
            moved = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in moved:
            tensor.record_stream(current)  # the next copy must not reuse its memory before this stream has finished
        yield moved
