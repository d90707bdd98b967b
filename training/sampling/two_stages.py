"""Two stages of work on one GPU at the same time: the second stage of a batch beside the first stage of the next.

Sampling is the first stage; decoding and the copy to the host are the second. Each has a CUDA stream, and the host
only queues. Elsewhere the stages run one after the other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

# Batches that are queued and not finished: one that the GPU works on, and the next, so that it never waits.
_MAX_QUEUED = 2


class Streams(Protocol):
    """What the two stages need of a device. An event is a point in a stream's work."""

    def first(self) -> AbstractContextManager[Any]:
        """What is queued inside belongs to the first stage."""

    def second(self) -> AbstractContextManager[Any]:
        """What is queued inside belongs to the second stage, and comes after all of the first stage so far."""

    def mark(self) -> Any:
        """The event of all that is queued for the second stage so far."""

    def wait(self, event: Any) -> None:
        """Let the host wait for `event`."""

    def hand_over(self, event: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Make what the caller will queue come after `event`, so that it may use these `tensors`."""


class CudaStreams:
    """Two streams of a GPU beside the one that the caller uses; what the caller has queued so far comes first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first, self._second = torch.cuda.Stream(device), torch.cuda.Stream(device)
        for stream in (self._first, self._second):
            stream.wait_stream(torch.cuda.current_stream(device))

    def first(self) -> AbstractContextManager[Any]:
        """See Streams."""
        return torch.cuda.stream(self._first)

    def second(self) -> AbstractContextManager[Any]:
        """See Streams."""
        self._second.wait_stream(self._first)
        return torch.cuda.stream(self._second)

    def mark(self) -> torch.cuda.Event:
        """See Streams."""
        return queued_event(self._second)

    def wait(self, event: torch.cuda.Event) -> None:
        """See Streams."""
        event.synchronize()

    def hand_over(self, event: torch.cuda.Event, tensors: Iterable[torch.Tensor]) -> None:
        """See Streams."""
        caller = torch.cuda.current_stream(self._device)
        caller.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(caller)  # the memory is the caller's until this stream is done with it


def queued_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The event of all that is queued in `stream`. Who waits for it sleeps: the cores have other work."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def streams_of(device: torch.device) -> Streams | None:
    """The streams of `device`; None where there are none, and a stage is over when its call returns."""
    return CudaStreams(device) if device.type == "cuda" else None


def two_stages(
    items: Iterable[T],
    first: Callable[[T], S],
    second: Callable[[S], R],
    tensors_of: Callable[[R], Iterable[torch.Tensor]],
    streams: Streams | None,
) -> Iterator[R]:
    """second(first(item)) of every item, in order; with `streams`, both stages of the next item are queued before a
    result is given out, and not more than that one.

    `tensors_of`: those in a result that the caller may use.
    """
    if streams is None:
        for item in items:
            yield second(first(item))
        return
    # The results of the first stage are kept until the second stage is over: their memory belongs to the first stream.
    queued: deque[tuple[S, R, Any]] = deque()
    given = 0  # how many of these, from the left, the caller has
    try:
        for item in items:
            if len(queued) == _MAX_QUEUED:
                streams.wait(queued[0][2])
                queued.popleft()
                given -= 1
            with streams.first():
                between = first(item)
            with streams.second():
                result = second(between)
            queued.append((between, result, streams.mark()))
            if len(queued) - given == _MAX_QUEUED:
                yield _given(queued[given], streams, tensors_of)
                given += 1
        for entry in list(queued)[given:]:
            yield _given(entry, streams, tensors_of)
    finally:
        for entry in queued:
            streams.wait(entry[2])


def _given(entry: tuple[Any, R, Any], streams: Streams, tensors_of: Callable[[R], Iterable[torch.Tensor]]) -> R:
    _, result, event = entry
    streams.hand_over(event, tensors_of(result))
    return result
