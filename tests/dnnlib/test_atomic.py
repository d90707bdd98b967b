"""Files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from dnnlib.atomic import atomic_path, write_text


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
