"""Damage to checkpoints: every flipped bit is noticed or harmless; files of older layouts are read."""

import io
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.errors import ConfigError
from dnnlib.util import EasyDict
from tests.helpers.tiny import assert_same_state, flat_state
from torch_utils.checkpoints.checkpoint import (
    DamagedCheckpoint,
    DigestWriter,
    checkpoint_bytes,
    digest_of,
    load_checkpoint,
    read_digest,
    remove_older,
    save_checkpoint,
    set_aside,
)

STATE = {
    "state": {"cur_nimg": 4096, "total_elapsed_time": 12.5},
    "net": OrderedDict(weight=torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), bias=torch.zeros(3)),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(64, 3)}}, "param_groups": [{"lr": 1}]},
    "ema": {"stds": [0.05, 0.1], "emas": [{"weight": torch.ones(64, 3).half()}]},
}


def same(a: object, b: object) -> bool:
    first, second = flat_state(a), flat_state(b)
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k] for k, v in first.items()
    )


def outcome(path: Path, content: bytes) -> str:
    """Outcome of reading a file with this content: 'refused', 'same' or 'other'."""
    path.write_bytes(content)
    try:
        return "same" if same(load_checkpoint(path), STATE) else "other"
    except DamagedCheckpoint as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "refused"


def test_any_bit_flipped_and_any_truncation_of_a_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    rng = random.Random(0)
    # Every region: anywhere, and as often in the last records, where the digest and the directory are.
    bits = [rng.randrange(len(whole) * 8) for _ in range(250)]
    bits += [rng.randrange((len(whole) - 2000) * 8, len(whole) * 8) for _ in range(150)]
    bits += [rng.randrange((len(whole) - 98) * 8, len(whole) * 8) for _ in range(100)]
    found = []
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        found.append(outcome(path, bytes(damaged)))
    lengths = [rng.randrange(len(whole)) for _ in range(40)] + [len(whole) - n for n in range(1, 11)]
    found += [outcome(path, whole[:length]) for length in lengths]
    assert found == ["refused"] * 550
    assert outcome(path, whole + b"\0") == "refused"
    assert outcome(path, whole) == "same"


def test_a_file_without_a_digest_is_refused_or_read_as_it_was(tmp_path: Path):
    # The published layout has the checksums of its ZIP records at least, which torch.load itself doesn't compare.
    path = tmp_path / "state.pt"
    torch.save(STATE, path)
    whole = path.read_bytes()
    rng = random.Random(1)
    found = []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        found.append(outcome(path, bytes(damaged)))
    assert set(found) <= {"refused", "same"}
    assert found.count("refused") > 100
    record = whole.index(STATE["net"]["weight"].numpy().tobytes())
    assert outcome(path, whole[: record + 9] + b"\x7f" + whole[record + 10 :]) == "refused"


def test_a_checkpoint_that_lost_its_digest_is_not_taken_for_one_that_never_had_any(tmp_path: Path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    end = len(whole) - 76
    bare = whole[: end - 2] + b"\0\0"
    assert zipfile.ZipFile(io.BytesIO(bare)).testzip() is None
    assert outcome(path, bare) == "refused"


def test_others_read_a_checkpoint_as_the_zip_file_of_torch_save_that_it_is(tmp_path: Path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, STATE)
    for mmap in (False, True):
        data = torch.load(path, weights_only=True, mmap=mmap)
        assert data.pop("format") == {"name": "edm2-training-state", "version": 1}
        assert_same_state(data, STATE)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.comment == b"edm2 sha256 " + digest_of(path).encode()
    assert read_digest(path) == digest_of(path) == digest_of(path, from_disk=True)
    other = tmp_path / "elsewhere.pt"
    save_checkpoint(other, STATE)
    assert other.read_bytes() == path.read_bytes()


def test_the_digest_doesnt_depend_on_how_the_bytes_come(tmp_path: Path):
    content = io.BytesIO()
    torch.save(STATE, content)
    files = []
    for size in (1, 5, 21, 22, 23, 1000, 1 << 20):
        target = io.BytesIO()
        writer = DigestWriter(target)
        for start in range(0, len(content.getvalue()), size):
            writer.write(memoryview(content.getvalue())[start : start + size])
        writer.finish()
        files.append(target.getvalue())
    assert len(set(files)) == 1
    (tmp_path / "state.pt").write_bytes(files[0])
    assert read_digest(tmp_path / "state.pt") == digest_of(tmp_path / "state.pt")


def test_what_the_disk_gives_back_otherwise_never_becomes_a_checkpoint(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    monkeypatch.setattr("torch_utils.checkpoints.checkpoint.digest_of", lambda path, from_disk: "0" * 64)
    with pytest.raises(OSError, match="does not give back"):
        save_checkpoint(path, {**STATE, "more": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_plain_torch_save_load(tmp_path: Path, zipped: bool):
    path = tmp_path / "state.pt"
    state = EasyDict(cur_nimg=np.int64(4096), total_elapsed_time=np.float64(12.5))
    torch.save(EasyDict(STATE, state=state), path, _use_new_zipfile_serialization=zipped)
    data = load_checkpoint(path)
    assert type(data) is dict and type(data["state"]) is dict
    assert_same_state(data, STATE)


def test_a_sound_file_that_finds_no_memory_is_not_called_damaged(tmp_path: Path, monkeypatch):
    def load(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    save_checkpoint(tmp_path / "state.pt", STATE)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ConfigError, match=r"undamaged, but cannot be read here: .*not enough memory") as failure:
        load_checkpoint(tmp_path / "state.pt")
    assert not isinstance(failure.value, DamagedCheckpoint)


def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path: Path):
    data = {"many": [torch.zeros(1) for _ in range(100)], "large": {"a": torch.zeros(1_000_000).half()}, "n": "x"}
    save_checkpoint(tmp_path / "state.pt", data)
    size = (tmp_path / "state.pt").stat().st_size
    assert size <= checkpoint_bytes(data) <= size * 1.02


def test_a_checkpoint_of_a_later_kind_is_not_called_damaged(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torch_utils.checkpoints.checkpoint._FORMAT", {"name": "edm2-training-state", "version": 2})
    save_checkpoint(tmp_path / "state.pt", STATE)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="newer version") as failure:
        load_checkpoint(tmp_path / "state.pt")
    assert not isinstance(failure.value, DamagedCheckpoint)


def test_only_the_newest_are_kept_and_strangers_are_left_alone(tmp_path: Path):
    paths = [tmp_path / f"state-{number}.pt" for number in range(5)]
    for path in paths:
        save_checkpoint(path, {"n": 1})
    torch.save({"n": 1}, paths[0])
    remove_older(paths, keep=2)
    assert [path.exists() for path in paths] == [True, False, False, True, True]


def test_what_is_set_aside_never_takes_the_place_of_something(tmp_path: Path):
    names = []
    for number in range(3):
        (tmp_path / "state.pt").write_text(str(number))
        names.append(set_aside(tmp_path / "state.pt").name)
    assert names == ["state.pt.damaged", "state.pt.damaged-2", "state.pt.damaged-3"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]


def test_a_scalar_takes_no_more_memory_than_its_file(tmp_path: Path):
    # What NumPy's own pickle of a scalar says, with a type of 4 GB.
    content = (
        b"\x80\x02}X\x01\x00\x00\x00acnumpy._core.multiarray\nscalar\n"
        b"cnumpy\ndtype\nX\x0b\x00\x00\x00V4000000000\x89\x88\x87RX\x00\x00\x00\x00\x86Rs."
    )
    path = tmp_path / "training-state-0000001.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", data)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(path)
    scalars = {"a": np.float64(0.5), "b": np.int64(3), "c": np.float32(2)}
    torch.save(scalars, path)
    assert load_checkpoint(path) == scalars
