"""Writing in the background: order, full disks, failures, ends; copies in the host's memory."""

import errno
import gc
import io
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dnnlib.atomic import LineFile
from dnnlib.background import BackgroundWriter, Write, map_in_order
from dnnlib.disk import DiskFull
from dnnlib.errors import ConfigError
from dnnlib.text import format_bytes
from tests.helpers.paths import ROOT
from torch_utils.checkpoints import host_copy
from torch_utils.checkpoints.host_copy import HostCopy, on_host


def write(path: Path, work, num_bytes: int = 0) -> Write:
    return Write(path=path, num_bytes=num_bytes, work=work)


def test_files_are_written_in_order_by_another_thread_and_waited_for(tmp_path: Path):
    writer, go, seen = BackgroundWriter(), threading.Event(), []

    def work(path: Path) -> None:
        go.wait(60)
        seen.append((path.name, threading.current_thread() is threading.main_thread()))

    writes = [write(tmp_path / name, work) for name in "abc"]
    for each in writes:
        writer.submit(each)
    assert not writer.wait(0.0)
    assert writer.news() == ([], [])
    go.set()
    assert writer.wait()
    assert seen == [("a", False), ("b", False), ("c", False)]
    assert writer.news() == ([], writes)
    assert writer.news() == ([], [])
    writer.submit(writes[0])
    assert writer.wait()
    assert seen[-1] == ("a", False)


def test_a_failure_is_kept_and_nothing_is_written_after_it(tmp_path: Path):
    written: list[Path] = []
    writer = BackgroundWriter()

    def fail(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    writer.submit(write(tmp_path / "a", fail))
    writer.submit(write(tmp_path / "b", written.append))
    assert writer.wait()
    writer.submit(write(tmp_path / "c", written.append))
    assert writer.wait()
    assert written == []
    assert isinstance(writer.failure, ConfigError)
    assert str(writer.failure) == f"cannot write {tmp_path / 'a'}: Read-only file system"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_waited_for_where_that_is_wished(tmp_path: Path, code: int):
    writer, room, attempts = BackgroundWriter(wait_for_space=True, poll_sec=0.01), threading.Event(), []

    def work(path: Path) -> None:
        attempts.append(path)
        if len(attempts) >= 3:
            room.set()
        if not room.is_set():
            raise OSError(code, "full")

    writer.submit(write(tmp_path / "a", work))
    assert writer.wait()
    assert len(attempts) == 3 and writer.failure is None
    notes, finished = writer.news()
    assert [note.split("; ")[-1] for note in notes] == ["waiting for room.", "There is room again: wrote a."]
    assert len(finished) == 1


def test_nobody_waits_for_room_after_giving_up(tmp_path: Path):
    def work(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    writer = BackgroundWriter(wait_for_space=True, advice="; advice")
    writer.submit(write(tmp_path / "a", work))
    assert not writer.wait(0.05)
    writer.give_up()
    assert writer.wait(60)
    assert isinstance(writer.failure, ConfigError) and str(writer.failure).endswith("; advice")


def test_room_is_looked_for_before_a_file_is_begun(tmp_path: Path):
    written: list[Path] = []
    writer = BackgroundWriter(advice="; advice")
    writer.submit(write(tmp_path / "a", written.append, num_bytes=1 << 60))
    assert writer.wait()
    assert written == [] and isinstance(writer.failure, DiskFull)
    assert "it needs 1.15e+09 GB, and the disk has" in str(writer.failure) and str(writer.failure).endswith("; advice")


def test_a_program_that_ends_without_waiting_loses_no_file(tmp_path: Path):
    program = f"""
import threading
from pathlib import Path
from dnnlib.background import BackgroundWriter, Write
def work(path):
    threading.main_thread().join()
    path.write_text("whole")
BackgroundWriter().submit(Write(path=Path({str(tmp_path / "a")!r}), num_bytes=0, work=work))
raise RuntimeError("an end like any")
"""
    root = ROOT
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "an end like any" in ended.stderr
    assert (tmp_path / "a").read_text() == "whole"


def test_a_copy_is_of_its_moment_and_its_memory_is_used_again():
    net = torch.nn.Linear(3, 2)
    data = {"net": net.state_dict(), "list": [torch.arange(3), {"n": 1}], "t": torch.ones(4, 6).t()}
    copy = HostCopy()
    copy.reserve(data)
    first = copy.take(data)
    copy.wait()
    assert list(first) == ["net", "list", "t"] and first["list"][1] == {"n": 1}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net.weight.add_(1)
    assert all(torch.equal(first["net"][name], before[name]) for name in before)
    assert first["t"].stride() == data["t"].stride()
    second = copy.take(data)
    assert torch.equal(second["net"]["weight"], net.weight)
    assert second["net"]["weight"].data_ptr() == first["net"]["weight"].data_ptr()
    reserved = HostCopy()
    reserved.reserve(data)
    assert reserved._reserving is not None
    reserved._reserving.join()
    places = [view.data_ptr() for view, _ in reserved._buffers]
    reserved.take(data)
    assert places == [view.data_ptr() for view, _ in reserved._buffers]
    half = HostCopy().take(dict(net.state_dict()), dtype=torch.float16)
    assert torch.equal(half["weight"], net.weight.detach().half())
    other = copy.take([torch.zeros(5), torch.ones(7, dtype=torch.int64)])
    assert torch.equal(other[0], torch.zeros(5)) and torch.equal(other[1], torch.ones(7, dtype=torch.int64))


def test_copies_share_a_few_slabs_and_are_stored_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_copy, "_SLAB_BYTES", 1024)
    allocated: list[int] = []
    real = torch.empty

    def empty(size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        allocated.append(size)
        return real(size, *args, **kwargs)

    monkeypatch.setattr(host_copy.torch, "empty", empty)
    data = {n: torch.randn(n) for n in (100, 130, 300, 0, 4, 60)} | {
        "half": torch.randn(3, 5).half(),
        "one": torch.ones([]),
    }
    copy = HostCopy()
    taken = copy.take(data)
    assert allocated == [448 + 576, 1216, 64 + 256 + 64 + 64]  # for 400 and 520 bytes; 1200; 16, 240, 30 and 4
    for key, value in data.items():
        assert torch.equal(taken[key], value)
        assert taken[key].untyped_storage().nbytes() == value.nbytes
    files = [io.BytesIO(), io.BytesIO()]
    for file, content in zip(files, (taken, data), strict=True):
        torch.save(content, file)
    assert files[0].getvalue() == files[1].getvalue()


def test_memory_that_a_gpu_still_writes_to_is_not_dropped():
    """The event of the last copy comes before the end of its slab; a copy that is held outlives its HostCopy."""
    copy = HostCopy()
    first = copy.take([torch.arange(5.0)])
    assert copy._buffers[0][0].untyped_storage()._cdata != first[0].untyped_storage()._cdata
    waited = []
    copy._copied = SimpleNamespace(synchronize=lambda: waited.append(len(copy._buffers)))
    copy.take([torch.arange(5.0) + 1])
    assert waited == [] and first[0].tolist() == [1, 2, 3, 4, 5]  # into the same memory, in the GPU's order
    copy._copied = SimpleNamespace(synchronize=lambda: waited.append(len(copy._buffers)))
    copy.take([torch.arange(6.0)])
    assert waited == [1]
    gc.collect()
    other = torch.full([5], 9.0)
    assert first[0].tolist() == [1, 2, 3, 4, 5] and other.data_ptr() != first[0].data_ptr()


@pytest.mark.gpu
def test_a_copy_from_a_gpu_waits_for_nothing_and_is_of_its_moment():
    values = torch.arange(1 << 24, device="cuda", dtype=torch.float32)
    copy = HostCopy()
    taken = copy.take({"a": values, "b": values})
    halves = HostCopy()
    half = halves.take([values], dtype=torch.float16)
    values.zero_()
    copy.wait()
    halves.wait()
    assert taken["a"].is_pinned() and taken["a"].device.type == "cpu"
    assert torch.equal(taken["a"], torch.arange(1 << 24, dtype=torch.float32))
    assert torch.equal(half[0], taken["b"].half())


def test_what_is_in_the_hosts_memory_is_copied_only_where_it_is_part_of_more():
    whole = torch.arange(10.0)
    kept = on_host({"a": whole, "b": [whole[2:4]], "c": 3})
    assert kept["a"].data_ptr() == whole.data_ptr()
    assert torch.equal(kept["b"][0], whole[2:4]) and kept["b"][0].untyped_storage().nbytes() == 8
    assert on_host(whole, dtype=torch.float16).dtype == torch.float16


class FullFile:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return self.file.write(part)


@pytest.mark.parametrize("room", [0, 3])
def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch, room: int):
    path = tmp_path / "log.txt"
    LineFile(path).append("first")
    patient = LineFile(path, patient=True)
    monkeypatch.setattr("builtins.open", lambda *args, real=open, **kwargs: FullFile(real(*args, **kwargs), room))
    with pytest.raises(DiskFull, match=r"log\.txt: No space left"):
        LineFile(path).append("second")
    patient.append("third")
    monkeypatch.undo()
    assert path.read_text() == "first\n"
    patient.append("fourth")
    assert path.read_text() == "first\nthird\nfourth\n"
    with pytest.raises(ConfigError, match="is gone"):
        LineFile(tmp_path / "gone" / "log.txt", patient=True).append("x")


def test_sizes_are_told_in_units():
    assert [format_bytes(n) for n in (999, 12_345, 2_510_000_000)] == ["999 bytes", "12.3 kB", "2.51 GB"]


def test_results_come_in_order_and_few_are_computed_ahead():
    started = []

    def double(number):
        started.append(number)
        return 2 * number

    for index, number in enumerate(map_in_order(ThreadPoolExecutor(1), double, iter(range(20)), max_pending=4)):
        assert number == 2 * index
        time.sleep(0.002)
        assert len(started) <= index + 4
    assert started == list(range(20))


def test_an_error_ahead_is_raised_where_the_item_is_due():
    numbers = map_in_order(ThreadPoolExecutor(1), lambda number: 1 // number, [1, 1, 0, 1], max_pending=4)
    assert [next(numbers), next(numbers)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(numbers)
