"""Locks on folders: who gets one, who is refused, which locks are of the dead."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dnnlib.errors import ConfigError
from dnnlib.folder_lock import FolderLock
from tests.helpers.paths import ROOT

HOLD = """
import sys, time
from pathlib import Path
from dnnlib.folder_lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder until it is killed or its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_is_held_by_one_and_left_as_it_was(tmp_path: Path):
    folder = tmp_path / "new" / "run"
    lock = FolderLock(folder)
    lock.acquire()
    said = json.loads((folder / "run.lock").read_text())
    assert said["pid"] == os.getpid() and said["host"]
    assert [path.name for path in folder.iterdir()] == ["run.lock"]
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
        FolderLock(folder).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    FolderLock(folder).release()  # without effect
    again = FolderLock(folder)
    again.acquire()
    (folder / "result").touch()
    again.release()
    assert [path.name for path in folder.iterdir()] == ["result"]


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="there are no zombies")
def test_a_living_process_is_respected_and_a_killed_one_is_not(tmp_path: Path):
    process = hold(tmp_path)
    said: list[str] = []
    try:
        with pytest.raises(ConfigError, match=f"in use by process {process.pid} on "):
            FolderLock(tmp_path, say=said.append).acquire()
        assert said == []
        # Killed and not waited for: a zombie still has its number.
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lock = FolderLock(tmp_path, say=said.append)
        lock.acquire()
        assert len(said) == 1 and f"process {process.pid} on " in said[0] and "gone; taking over" in said[0]
        lock.release()
    finally:
        process.kill()
        process.wait(timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path: Path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    change(lock.path, started=1.0, token="other")
    said: list[str] = []
    second = FolderLock(tmp_path, say=said.append)
    second.acquire()
    assert len(said) == 1 and "which is gone; taking over" in said[0]
    second.require_held()
    with pytest.raises(ConfigError, match="taken over by"):
        lock.require_held()
    second.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entries", [{"host": "elsewhere"}, {"machine": "before the reboot"}])
def test_a_lock_of_another_machine_counts_while_it_is_touched(tmp_path: Path, entries: dict[str, str]):
    lock = FolderLock(tmp_path, refresh_sec=0.02)
    lock.acquire()
    change(lock.path, **entries)  # it goes on touching the file, with its token
    said: list[str] = []
    with pytest.raises(ConfigError, match="in use by"):
        FolderLock(tmp_path, say=said.append, refresh_sec=0.02).acquire()
    assert len(said) == 1 and "waiting up to 120 s for a sign of life" in said[0]
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"host": "elsewhere"}', "", "\x00", "[" * 100_000, '{"pid": 1e999}'])
def test_a_lock_without_a_sign_of_life_is_taken_over(tmp_path: Path, content: str):
    path = tmp_path / "run.lock"
    path.write_text(content)
    said: list[str] = []
    lock = FolderLock(tmp_path, say=said.append, refresh_sec=0.02, stale_sec=0.1)
    lock.acquire()
    assert "gave no sign of life; taking over" in said[-1]
    lock.release()
    path.write_text(content)
    os.utime(path, (1e9, 1e9))
    said.clear()
    lock = FolderLock(tmp_path, say=said.append, refresh_sec=0.02)
    lock.acquire()
    assert len(said) == 2 and "waiting up to 0 s" in said[0] and "taking over" in said[1]
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("touched", [1e9, 8e9], ids=["past", "future"])
def test_a_clock_that_jumped_neither_ends_a_living_lock_nor_keeps_a_dead_one(tmp_path: Path, touched: float):
    held = FolderLock(tmp_path, refresh_sec=0.1)
    held.acquire()
    change(held.path, host="elsewhere")
    os.utime(held.path, (touched, touched))
    with pytest.raises(ConfigError, match="in use by"):
        FolderLock(tmp_path, refresh_sec=1.0).acquire()
    text = held.path.read_text()
    held.release()
    held.path.write_text(text)
    os.utime(held.path, (touched, touched))
    said: list[str] = []
    lock = FolderLock(tmp_path, say=said.append, refresh_sec=0.02, stale_sec=0.1)
    lock.acquire()
    assert len(said) == 2 and "waiting up to 0 s" in said[0]
    lock.release()


def test_who_stood_still_and_lost_the_folder_is_told_and_leaves_the_new_lock_alone(tmp_path: Path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.require_held()
    change(lock.path, host="elsewhere", token="another")
    with pytest.raises(ConfigError, match=r"taken over by .* on elsewhere"):
        lock.require_held()
    lock.release()
    assert (tmp_path / "run.lock").exists()


def test_of_many_that_find_a_stale_lock_one_gets_the_folder(tmp_path: Path):
    (tmp_path / "run.lock").write_text("{}")
    os.utime(tmp_path / "run.lock", (1e9, 1e9))
    locks = [FolderLock(tmp_path, refresh_sec=0.05) for _ in range(8)]
    got: list[FolderLock] = []

    def take(lock: FolderLock) -> None:
        try:
            lock.acquire()
            got.append(lock)
        except ConfigError:
            pass

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].require_held()
    got[0].release()
    assert list(tmp_path.iterdir()) == []
