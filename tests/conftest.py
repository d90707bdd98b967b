"""What all tests share: one thread per process, signals, time limits, GPU tests skipped without a GPU, and the golden
numbers."""

import os
from collections.abc import Callable, Iterator
from functools import cache

# Before torch is imported, here and in the processes that tests start: the suite runs one worker per core, and small
# tensors gain nothing from threads. It also makes the order of float sums, and so the last digits, repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors import safe_open

from tests.helpers.interrupts import heeded_interrupts
from tests.helpers.paths import GOLDEN_DIR, Golden


def pytest_configure(config: pytest.Config) -> None:
    """Hold this process to one thread."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without CUDA, and leave out `faults` unless EDM2_FAULTS=long."""
    if os.environ.get("EDM2_FAULTS") != "long":
        long = [item for item in items if item.get_closest_marker("faults") is not None]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for item in items:
        if item.get_closest_marker("faults") is not None:
            item.add_marker(pytest.mark.timeout(3600))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_children() -> Iterator[None]:
    """The suite may run in the background of a script (`make test &`), and tests interrupt what they start."""
    with heeded_interrupts():
        yield


@cache
def _read_golden(name: str) -> Golden:
    with safe_open(GOLDEN_DIR / name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """golden("primitives.safetensors") -> (tensors by name, metadata), of a file in tests/golden.

    The tensors are copies, which a test may change; the file is read once.
    """

    def load(name: str) -> Golden:
        tensors, metadata = _read_golden(name)
        return {key: value.clone() for key, value in tensors.items()}, dict(metadata)

    return load
