"""Temporary files of killed processes are swept away, and nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

from dnnlib import leftovers
from dnnlib.atomic import atomic_path
from dnnlib.leftovers import sweep, temporary_name


def made(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"half")
    return folder / name


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    code = f"""
import os
from dnnlib.atomic import atomic_path
with atomic_path(r"{tmp_path / "net.pkl"}"):
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60)
    (left,) = tmp_path.iterdir()
    assert sweep(tmp_path) == [left]
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_writes_stays(tmp_path: Path, monkeypatch):
    ours = temporary_name("net.pkl")
    theirs = made(tmp_path, ours.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    assert sweep(tmp_path) == []
    # Older than the process of that number, so another one's that is gone.
    os.utime(theirs, (1e9, 1e9))
    assert sweep(tmp_path) == [theirs]


def test_what_another_machine_left_is_removed_by_the_next_in_the_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(leftovers.socket, "gethostname", lambda: "another")
    left = made(tmp_path, temporary_name("net.pkl").replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    monkeypatch.undo()
    assert sweep(tmp_path) == [left]


def test_other_files_stay(tmp_path: Path):
    kept = {made(tmp_path, name) for name in ("net.pkl", ".hidden.tmp", ".a.b.tmp", "x.abcdef-1-000000000000.tmp")}
    assert sweep(tmp_path) == []
    assert set(tmp_path.iterdir()) == kept


def test_files_are_written_under_such_a_name(tmp_path: Path):
    with atomic_path(tmp_path / "net.pkl") as temp:
        assert leftovers._NAME.fullmatch(temp.name)
