"""Two stages of work on one GPU at the same time: the second stage of a batch next to the first stage of the next one.

Sampling is the first stage; decoding and the copy to the host are the second. Each has a CUDA stream, and the host
only queues work. Without a GPU the stages run one after the other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

# Batches that are queued and not finished: one that the GPU works on, and the next, so that it never waits.
_MAX_QUEUED = 2


class CudaStreams:
    """A stream of a GPU for each stage, besides the caller's own; what the caller has queued so far comes first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first, self._second = torch.cuda.Stream(device), torch.cuda.Stream(device)
        for stream in (self._first, self._second):
            stream.wait_stream(torch.cuda.current_stream(device))

    def first(self) -> AbstractContextManager[Any]:
        """Queue what follows for the first stage."""
        return torch.cuda.stream(self._first)

    def second(self) -> AbstractContextManager[Any]:
        """Queue what follows for the second stage, after all of the first stage so far."""
        self._second.wait_stream(self._first)
        return torch.cuda.stream(self._second)

    def mark(self) -> torch.cuda.Event:
        """Return the event of all that is queued for the second stage so far."""
        return queued_event(self._second)

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the host wait for `event`."""
        event.synchronize()

    def hand_over(self, event: torch.cuda.Event, tensors: Iterable[torch.Tensor]) -> None:
        """Let the caller use these `tensors`: what it queues from now on comes after `event`."""
        caller = torch.cuda.current_stream(self._device)
        caller.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(caller)  # keep the memory until this stream is done with it


def queued_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return the event of all that is queued in `stream`. A thread that waits for it sleeps, which frees its core."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def streams_of(device: torch.device) -> CudaStreams | None:
    """Return the streams of `device`; None on devices without, where a stage is over when its call returns."""
    return CudaStreams(device) if device.type == "cuda" else None


def two_stages(
    items: Iterable[T],
    first: Callable[[T], S],
    second: Callable[[S], R],
    tensors_of: Callable[[R], Iterable[torch.Tensor]],
    streams: CudaStreams | None,
) -> Iterator[R]:
    """Yield second(first(item)) of every item, in order.

    With `streams`, both stages of the next item, and of no more, are queued before a result is yielded. `tensors_of`:
    those in a result that the caller may use.
    """
    if streams is None:
        for item in items:
            yield second(first(item))
        return

    def yielded(entry: tuple[S, R, Any]) -> R:
        _, result, event = entry
        streams.hand_over(event, tensors_of(result))
        return result

    # Results of the first stage are kept until the second stage is over: their memory belongs to the first stream.
    queued: deque[tuple[S, R, Any]] = deque()
    num_yielded = 0  # of these, from the left
    try:
        for item in items:
            if len(queued) == _MAX_QUEUED:
                streams.wait(queued[0][2])
                queued.popleft()
                num_yielded -= 1
            with streams.first():
                between = first(item)
            with streams.second():
                result = second(between)
            queued.append((between, result, streams.mark()))
            if len(queued) - num_yielded == _MAX_QUEUED:
                yield yielded(queued[num_yielded])
                num_yielded += 1
        for entry in list(queued)[num_yielded:]:
            yield yielded(entry)
    finally:
        for entry in queued:
            streams.wait(entry[2])
