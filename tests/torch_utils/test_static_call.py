"""Recorded calls, two computations side by side, and compilation: the logic around them, which is the same on a CPU."""

import gc
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
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
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "cache")
    monkeypatch.setattr(cuda, "missing_compiler", lambda device: None)
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
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == Path("cache", "compiled")
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    assert options == [{"fullgraph": True, "dynamic": False}]
    assert [line.split("...")[0] for line in told[::2]] == [
        "Compiling for batches of 2 ",
        "Compiling for batches of 3 ",
    ]
    assert len(told) == 4


def test_a_process_may_compile_many_shapes(monkeypatch):
    """The compiler's own limit is eight versions of one code, and all networks are versions of one."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    monkeypatch.setattr(cuda, "keep_compiled_code", lambda: None)
    monkeypatch.setattr(cuda, "missing_compiler", lambda device: None)
    call = compiled(product)
    for size in range(1, 13):
        assert torch.equal(call(torch.ones(size), None), torch.full([size], 2.0))


class FakeCuda:
    """Stands for torch.cuda: 32 streams that are handed out in turn, and a log of what happens on which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Any]] = []
        self.current: Any = "caller's"
        self.num_streams = 0
        monkeypatch.setattr(gc, "collect", lambda: self.log.append(("collect", None)))
        monkeypatch.setattr(cuda, "_recording_streams", type(cuda._recording_streams)())
        for name, value in {
            "Stream": self.stream,
            "stream": self.on,
            "graph": self.capture,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, device: torch.device, priority: int = 0) -> Any:
        self.num_streams += 1
        return FakeStream(self.num_streams % 32, priority)

    @contextmanager
    def on(self, stream: Any) -> Any:
        self.current, before = stream, self.current
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        self.log.append(("capture", stream.key))
        with self.on(stream):
            yield

    def function(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(("run", self.current.key))
        assert torch.backends.cudnn.benchmark
        return x * 2


class FakeStream:
    def __init__(self, number: int, priority: int) -> None:
        self.key = number, priority

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and self.key == other.key

    def wait_stream(self, other: Any) -> None:
        pass


def test_every_graph_warms_up_and_records_on_a_stream_of_its_own(monkeypatch):
    fake = FakeCuda(monkeypatch)
    calls = [StaticCall(fake.function) for _ in range(2)]
    for call in calls:
        call(torch.ones(2))
        assert not torch.backends.cudnn.benchmark
    steps = [fake.log[:6], fake.log[6:]]
    streams = []
    for step in steps:
        assert [name for name, _ in step] == ["collect", "run", "run", "run", "capture", "run"]
        assert len({stream for name, stream in step if name != "collect"}) == 1
        streams.append(step[1][1])
    assert streams[0] != streams[1]
    assert {priority for _, priority in streams} == {-1}  # apart from all streams that other work is queued on


def test_the_stream_of_a_living_graph_is_not_given_to_another(monkeypatch):
    """PyTorch has 32 streams: the 33rd network of a sweep would share the stream of the guide."""
    fake = FakeCuda(monkeypatch)
    guide = StaticCall(fake.function)
    guide(torch.ones(2))
    for _ in range(40):
        StaticCall(fake.function)(torch.ones(2))
    captured = [key for name, key in fake.log if name == "capture"]
    assert captured.count(captured[0]) == 1
    living = [StaticCall(fake.function) for _ in range(31)]
    for call in living:
        call(torch.ones(2))
    with pytest.raises(RuntimeError, match="32 CUDA graphs are in memory"):
        StaticCall(fake.function)(torch.ones(2))


def test_the_number_of_recordings_is_bounded_and_the_last_used_ones_stay():
    recorder = Recorder()
    call = StaticCall(product, recorder)
    for size in (1, 2, 3, 4, 1, 5, 1, 6, 1):
        assert torch.equal(call(torch.ones(size), None), torch.full([size], 2.0))
    assert len(recorder.buffers) == 6  # the first one, used in between, never again
    call(torch.ones(2), None)
    assert len(recorder.buffers) == 7


@pytest.mark.gpu
def test_a_graph_outlives_the_end_of_another():
    """Whose end frees the workspaces of the stream that it was recorded on."""
    weight = torch.randn(768, 768, device="cuda")
    kept, dropped = (StaticCall(lambda x: torch.nn.functional.linear(x, weight).relu()) for _ in range(2))
    x = torch.randn(32, 768, device="cuda")
    expected = kept(x)
    assert torch.equal(dropped(x), expected)
    del dropped
    gc.collect()
    torch.cuda.empty_cache()
    filled = [torch.full([1 << 20], float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(kept(x), expected) and len(filled) == 64


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
