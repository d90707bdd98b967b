"""Batches on the device: the same ones in the same order, while the caller computes."""

from typing import Any

import pytest
import torch

from torch_utils.cuda import on_device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_arrive_in_order_and_whole(device: str):
    batches = [(torch.full([2, 3], i), torch.full([2], -i)) for i in range(5)]
    if device == "cuda":
        batches = [(images.pin_memory(), labels.pin_memory()) for images, labels in batches]
    total = torch.zeros([2, 3], device=device)
    for index, (images, labels) in enumerate(on_device(iter(batches), torch.device(device))):
        assert images.device.type == labels.device.type == device
        total += images
        assert int(labels[0]) == -index
    assert torch.equal(total.cpu(), torch.full([2, 3], 10.0))


def test_on_a_gpu_the_copy_has_a_stream_that_the_caller_waits_for(monkeypatch):
    """The order of calls, without a GPU: copy, wait, keep, hand out."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: "Stream") -> None:
            calls.append("wait")

    class Entered:
        def __init__(self, stream: Stream) -> None:
            pass

        def __enter__(self) -> None:
            calls.append("enter")

        def __exit__(self, *args: object) -> None:
            calls.append("exit")

    class Fake:
        def to(self, device: torch.device, non_blocking: bool) -> "Fake":
            assert non_blocking
            calls.append("copy")
            return self

        def record_stream(self, stream: Stream) -> None:
            calls.append("keep")

    current = Stream(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    given: Any = [(Fake(), Fake()), (Fake(), Fake())]
    batches = on_device(given, torch.device("cuda"))
    one = ["enter", "copy", "copy", "exit", "wait", "keep", "keep"]
    next(batches)
    assert calls == one
    next(batches)
    assert calls == 2 * one
