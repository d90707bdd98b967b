"""Checkpoints that are folders: data round-trips, damage is noticed, and nothing in them is executed."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_same_state
from torch_utils.checkpoints import read_whole
from torch_utils.checkpoints.checkpoint import MANIFEST, DamagedCheckpoint, remove_older
from torch_utils.checkpoints.sharded import open_sharded, read_into, save_sharded
from torch_utils.checkpoints.stored import StoredTensor
from torch_utils.distributed import World
from training.run.resuming import find_resumption
from training.run.run_folder import RunFolder

DATA: dict[str, Any] = {
    "state": {"cur_nimg": 2048, "seconds": 0.1},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "groups": [{"betas": (0.9, 0.99), "foreach": None}],
    },
    "net": {"a.weight": torch.arange(12.0).reshape(3, 4), "gain": torch.tensor(0.5, dtype=torch.float64)},
    "empty": {"$tensor": "a text, not a tensor", "nothing": torch.zeros(0, 4)},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "training-state-0000002.dcp"
    save_sharded(folder, DATA, World())
    return folder


def test_what_was_written_is_read_again_and_nothing_else_is_left(path: Path):
    opened = open_sharded(path)
    assert isinstance(opened["net"]["a.weight"], StoredTensor) and opened["net"]["a.weight"].shape == (3, 4)
    assert opened["optimizer"]["groups"] == DATA["optimizer"]["groups"]
    assert_same_state(read_whole(opened), DATA)
    assert read_whole({"no": ["tensor"]}) == {"no": ["tensor"]}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    save_sharded(path, {"net": {"other": torch.ones(2)}}, World())  # replaces the existing one
    assert read_whole(open_sharded(path))["net"]["other"].tolist() == [1, 1]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_tensors_are_read_into_their_places(path: Path):
    target = {"a.weight": torch.zeros(3, 4), "gain": torch.zeros([], dtype=torch.float64)}
    read_into(open_sharded(path)["net"], target)
    assert_same_state(target, DATA["net"])
    with pytest.raises(ValueError, match=r"a\.weight"):
        read_into(open_sharded(path)["net"], {**target, "a.weight": torch.zeros(4, 4)})


def test_every_flipped_byte_is_seen(path: Path):
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in range(0, len(content), max(len(content) // 15, 1)):
            file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(ConfigError, match=path.name):
                open_sharded(path)
        file.write_bytes(content)
    assert_same_state(read_whole(open_sharded(path)), DATA)


@pytest.mark.parametrize("lost", [MANIFEST, ".metadata", "__0_0.distcp"])
def test_a_missing_file_is_damage(path: Path, lost: str):
    (path / lost).unlink()
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path)


def test_the_index_can_name_no_function_to_call(path: Path, tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path, verify=False)
    assert not (tmp_path / "executed").exists()


POISON = b"cpathlib\nPosixPath\nN}S'name'\nS'../evil'\ns\x86b0ctorch.distributed.checkpoint.metadata\nMetadata\n(}NNtR."


@pytest.mark.parametrize(
    "index",
    [
        POISON,
        b"\x80\x04Nr\xff\xff\xff\x0f.",  # a place in the memo, for which Python's reader takes 4 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fabc.",  # text of 2**60 bytes
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"",
        pickle.dumps(None),
    ],
    ids=["class", "memo", "text", "marks", "empty", "none"],
)
def test_a_hostile_index_is_damage_and_changes_no_class(path: Path, index: bytes):
    (path / ".metadata").write_bytes(index)
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path, verify=False)
    assert Path("/a/b").name == "b"


@pytest.mark.parametrize(
    ("found", "put"),
    [
        (b"__0_0.distcp", b"../../../etc"),
        (b"__0_0.distcp", b"..\\..\\a.pt__"),
        (b"K\x03K\x04\x86", b"K\xffK\xff\x86"),
        (b"float32", b"complex"),
    ],
)
def test_an_index_that_asks_for_more_than_the_files_hold_is_damage(path: Path, found: bytes, put: bytes):
    content = (path / ".metadata").read_bytes()
    assert found in content and len(put) == len(found)
    (path / ".metadata").write_bytes(content.replace(found, put))
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path, verify=False)


@pytest.mark.parametrize("name", ["/dev/zero", "..", "../outside", "a\0b"])
def test_a_manifest_names_files_in_its_folder_only(path: Path, name: str):
    (path.parent / "outside").write_text("")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = "x"
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\udcff"])
def test_a_manifest_that_is_none_is_damage(path: Path, text: str):
    (path / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(DamagedCheckpoint):
        open_sharded(path)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch_utils.checkpoints.sharded.digest_of_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_sharded(tmp_path / "training-state-0000002.dcp", DATA, World())
    assert list(tmp_path.iterdir()) == []


def test_folders_count_as_checkpoints_are_set_aside_and_removed_when_old(tmp_path: Path):
    paths = [tmp_path / f"training-state-{kimg:07d}.dcp" for kimg in (1, 2, 3)]
    for path in paths:
        save_sharded(path, DATA, World())
    folder = RunFolder(tmp_path)
    assert folder.checkpoints() == paths
    (paths[2] / ".metadata").write_bytes(b"damaged")
    resumption = find_resumption(folder, World())
    assert resumption.path == paths[1] and "is damaged" in resumption.notes[0]
    assert folder.checkpoints() == paths[:2]
    remove_older(folder.checkpoints(), keep=1)
    assert folder.checkpoints() == [paths[1]]
    assert [path.name for path in folder.damaged_checkpoints()] == ["training-state-0000003.dcp.damaged"]


def test_an_old_folder_that_was_half_deleted_is_gone_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [tmp_path / f"training-state-{kimg:07d}.dcp" for kimg in (1, 2)]
    for path in paths:
        save_sharded(path, DATA, World())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))  # stands for a kill
        remove_older(paths, keep=1)
    folder = RunFolder(tmp_path)
    assert folder.checkpoints() == paths[1:]
    with folder.held(World(), say=lambda text: None):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", paths[1].name]
