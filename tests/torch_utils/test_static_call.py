"""Recorded calls, two computations side by side, and compilation: the logic around them, which is the same on a CPU."""

import os
from typing import Any

import pytest
import torch

from torch_utils import cuda
from torch_utils.cuda import SideBySide, StaticCall, compiled, record_graph, record_plainly


class Recorder:
    """Records as on a GPU: every replay overwrites the same result."""

    def __init__(self) -> None:
        self.buffers: list[Any] = []

    def __call__(self, function: Any, buffers: Any) -> Any:
        self.buffers.append(buffers)
        result = function(*buffers)
        return lambda: result.copy_(function(*buffers))


def product(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return x * 2 if y is None else x * y


@pytest.mark.parametrize("make", [Recorder, lambda: record_plainly])
def test_a_replay_sees_the_new_inputs_and_results_stay(make: Any):
    call = StaticCall(product, make())
    inputs = [(torch.randn(2, 3), torch.randn(1, 3)) for _ in range(3)]
    results = [call(*pair) for pair in inputs]
    for (x, y), result in zip(inputs, results, strict=True):
        assert torch.equal(result, x * y)


def test_one_recording_for_each_combination_of_shapes_and_absent_inputs():
    recorder = Recorder()
    call = StaticCall(product, recorder)
    x = torch.randn(2, 3)
    for y in (None, torch.ones(1, 3), torch.ones(2, 3), None, torch.ones(1, 3)):
        assert torch.equal(call(x, y), product(x, y))
    call(x.double(), None)
    assert len(recorder.buffers) == 4


def test_inputs_are_copied_not_kept():
    recorder = Recorder()
    x = torch.randn(3, 2).t()
    StaticCall(product, recorder)(x, None)
    assert recorder.buffers[0][0].data_ptr() != x.data_ptr() and recorder.buffers[0][0].is_contiguous()


def test_side_by_side_gives_both_results():
    both = SideBySide(lambda x, a: x + a, lambda x, a: x * a)
    first, second = both(torch.ones(2), 3)
    assert first.tolist() == [4, 4] and second.tolist() == [3, 3]


def test_compilation_is_told_once_a_shape_and_kept_in_the_cache_folder(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(cuda, "make_cache_dir_path", lambda *paths: "/".join(["cache", *paths]))
    options: list[dict[str, Any]] = []

    def compile_(function: Any, **kwargs: Any) -> Any:
        options.append(kwargs)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    told: list[str] = []
    try:
        call = compiled(product, told.append)
        for num in (2, 2, 3, 2):
            assert torch.equal(call(torch.ones(num), None), torch.full([num], 2.0))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "cache/compiled"
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    assert options == [{"fullgraph": True, "dynamic": False}]
    assert [line.split("...")[0] for line in told[::2]] == [
        "Compiling for batches of 2 ",
        "Compiling for batches of 3 ",
    ]
    assert len(told) == 4


@pytest.mark.gpu
def test_a_graph_is_replayed_on_a_gpu():
    call = StaticCall(product, record_graph)
    for _ in range(3):
        x, y = torch.randn(4, device="cuda"), torch.randn(4, device="cuda")
        assert torch.equal(call(x, y), x * y)


@pytest.mark.gpu
def test_side_by_side_on_a_gpu_hands_both_results_over():
    both = SideBySide(lambda x: (x @ x).relu(), lambda x: x * 2)
    for _ in range(20):
        x = torch.randn(512, 512, device="cuda")
        first, second = both(x)
        torch.testing.assert_close(first, (x @ x).relu())
        assert torch.equal(second, x * 2)
