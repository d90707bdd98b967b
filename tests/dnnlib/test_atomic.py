"""Files appear whole or not at all."""

import os
import stat
import sys
from pathlib import Path

import pytest

from dnnlib import atomic
from dnnlib.atomic import atomic_folder, atomic_path, write_text


def test_the_file_appears_when_the_block_ends(tmp_path: Path):
    dest = tmp_path / "file.bin"
    with atomic_path(dest) as temp:
        temp.write_bytes(b"new")
        assert not dest.exists()
        assert temp.parent == tmp_path  # a rename across file systems would be a copy
    assert dest.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [dest]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    dest = tmp_path / "file.bin"
    dest.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_path(dest) as temp:
        temp.write_bytes(b"half")
        raise RuntimeError
    assert dest.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [dest]


def test_text_is_utf8_with_unix_line_ends(tmp_path: Path):
    write_text(tmp_path / "text", "σ\n")
    assert (tmp_path / "text").read_bytes() == b"\xcf\x83\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_permissions_are_those_of_any_new_file(tmp_path: Path):
    with atomic_path(tmp_path / "ours") as temp:
        temp.unlink()  # as safetensors does: it writes a private file of its own and renames it
        os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "file", "")


def _unfinished(dest: Path) -> Path:
    """Stands for what a killed process left: nobody holds its lock."""
    with pytest.raises(RuntimeError), atomic_path(dest) as temp:
        raise RuntimeError
    return temp


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path):
    left = _unfinished(tmp_path / "file")
    left.write_bytes(b"half")
    write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    left = _unfinished(tmp_path / "folder")
    (left / "half").mkdir(parents=True)
    with atomic_folder(tmp_path / "folder") as temp:
        (temp / "new").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("locks", [True, False])
def test_two_may_write_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool):
    if not locks:
        monkeypatch.setattr(atomic, "fcntl", None)
    dest = tmp_path / "file"
    with atomic_path(dest) as first:
        first.write_text("first")
        with atomic_path(dest) as second:
            second.write_text("second")
            assert first != second and first.read_text() == "first"
        assert dest.read_text() == "second"
    assert dest.read_text() == "first"
    assert list(tmp_path.iterdir()) == [dest]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    for text in ("first", "second"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "content").write_text(text)
        atomic.replace_folder(tmp_path / "new", tmp_path / "dest")
        assert (tmp_path / "dest" / "content").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["dest"]


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges names by Linux's own call")
def test_the_place_of_a_folder_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("new", "dest"):
        (tmp_path / name).mkdir()
    if not atomic._exchange(tmp_path / "new", tmp_path / "dest"):
        pytest.skip("this file system cannot exchange names")
    monkeypatch.setattr(Path, "rename", lambda *args: pytest.fail("the old folder was moved away"))
    atomic.replace_folder(tmp_path / "new", tmp_path / "dest")
    assert (tmp_path / "dest").is_dir()


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "a" * 240 + ".safetensors"])
def test_a_name_that_the_file_system_takes_is_never_too_long_for_us(name: str, tmp_path: Path):
    dest = tmp_path / name
    write_text(dest, "one")
    write_text(dest, "two")
    assert dest.read_text() == "two"
    leftover, other = atomic.temporary_path(dest), atomic.temporary_path(tmp_path / ("b" * 255))
    leftover.touch()
    other.touch()
    atomic.remove_leftovers(dest)
    assert sorted(tmp_path.iterdir()) == sorted([dest, other])
    dest.unlink()
    with atomic_folder(dest) as folder:
        (folder / "content").touch()
    assert (dest / "content").exists()
