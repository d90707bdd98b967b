"""Two stages of work on a GPU at the same time: what is queued when, told by streams that only take notes."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from training.sampling.two_stages import streams_of, two_stages


class NotedStreams:
    """Takes the place of CudaStreams; an event is the number of things queued for the second stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: set[int] = set()
        self._events = 0
        self.inside: str | None = None

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        assert self.inside is None
        self.inside = name
        yield
        self.inside = None

    def first(self):
        return self._stage("first")

    def second(self):
        return self._stage("second")

    def mark(self):
        self._events += 1
        return self._events - 1

    def wait(self, event):
        self.done.add(event)
        self.notes.append(f"wait {event}")

    def hand_over(self, event, tensors):
        self.notes.append(f"hand over {event} with {list(tensors)}")


def stages(streams: NotedStreams):
    def first(item):
        assert streams.inside == "first"
        streams.notes.append(f"first {item}")
        return item

    def second(item):
        assert streams.inside == "second"
        streams.notes.append(f"second {item}")
        return item

    return first, second


def test_the_next_batch_is_queued_before_a_batch_is_given_out_and_no_more_than_that_one():
    streams = NotedStreams()
    for item in two_stages(range(4), *stages(streams), lambda x: [x * 10], streams):
        streams.notes.append(f"given {item}")
        assert streams.inside is None
    queue = [[f"first {i}", f"second {i}"] for i in range(4)]
    give = [[f"hand over {i} with [{i * 10}]", f"given {i}"] for i in range(4)]
    assert streams.notes == [
        *queue[0], *queue[1], *give[0],
        "wait 0", *queue[2], *give[1],
        "wait 1", *queue[3], *give[2],
        *give[3], "wait 2", "wait 3",
    ]  # fmt: skip


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7])
def test_results_come_in_order_and_all_work_is_over_at_the_end(num: int):
    streams = NotedStreams()
    first, second = stages(streams)
    assert list(two_stages(range(num), first, second, lambda x: [], streams)) == list(range(num))
    assert streams.done == set(range(num))


def test_what_is_queued_is_waited_for_also_where_the_caller_stops_early_or_work_fails():
    streams = NotedStreams()
    loop = two_stages(range(9), *stages(streams), lambda x: [], streams)
    assert next(loop) == 0
    loop.close()
    assert streams.done == {0, 1}

    streams = NotedStreams()
    with pytest.raises(ZeroDivisionError):
        list(two_stages([3, 2, 1, 0], lambda x: 1 / x, lambda x: x, lambda x: [], streams))
    assert streams.done == {0, 1, 2}


def test_without_streams_a_batch_is_given_out_as_soon_as_it_is_made():
    assert streams_of(torch.device("cpu")) is None
    made: list[int] = []
    loop = two_stages(range(3), made.append, lambda _: len(made), lambda _: [], None)
    assert next(loop) == 1 and made == [0]
    assert list(loop) == [2, 3]


@pytest.mark.gpu
def test_on_a_gpu_the_stages_see_each_others_results():
    device = torch.device("cuda")
    weight = torch.randn(512, 512, device=device) / 512**0.5

    def first(seed: int) -> torch.Tensor:
        x = torch.randn(512, 512, device=device, generator=torch.Generator(device).manual_seed(seed))
        for _ in range(50):
            x = x @ weight
        return x

    results = [x.cpu() for x in two_stages(range(6), first, lambda x: x * 2, lambda x: [x], streams_of(device))]
    for seed, result in enumerate(results):
        assert torch.equal(result, (first(seed) * 2).cpu())
