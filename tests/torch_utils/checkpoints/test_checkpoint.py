"""Checkpoints: what comes back, what is refused, which is the newest."""

import pickle
from pathlib import Path

import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_same_state
from torch_utils.checkpoints.checkpoint import load_checkpoint, numbered, save_checkpoint


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def test_values_come_back_bitwise(tmp_path: Path):
    data = {"n": 3, "x": 0.1, "t": torch.randn(3), "half": torch.ones(2).half(), "list": [{"a": torch.arange(3)}, None]}
    save_checkpoint(tmp_path / "state.pt", data)
    assert_same_state(load_checkpoint(tmp_path / "state.pt"), data)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path):
    save_checkpoint(tmp_path / "state.pt", {"n": 1})
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "state.pt", {"n": lambda: 2})
    assert load_checkpoint(tmp_path / "state.pt") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 500, -1])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, keep: int):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"t": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"state\.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02.", b"PK\x03\x04", pickle.dumps({"a": 1}, 2)])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"state\.pt"):
        load_checkpoint(path)


def test_missing_and_foreign_values_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_checkpoint(tmp_path / "state.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")


def test_nothing_from_the_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Exploit()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(tmp_path / "state.pt")
    assert not Path("exploited").exists()


def test_the_newest_has_the_highest_number(tmp_path: Path):
    assert numbered(tmp_path / "missing", "state-", ".pt") == []
    for name in (
        "state-0000009.pt",
        "state-10000000.pt",
        "state-x.pt",
        "state-.pt",
        "other-99999999.pt",
        "state-9.tmp",
    ):
        (tmp_path / name).touch()
    assert numbered(tmp_path, "state-", ".pt")[-1] == tmp_path / "state-10000000.pt"
