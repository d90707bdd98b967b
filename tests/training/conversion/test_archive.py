"""The files of a data set: the same bytes for the same images, whole or not there at all, readable by any unzip."""

import errno
import json
import os
import shutil
import subprocess
import zipfile

import pytest

from dnnlib.errors import ConfigError
from training.conversion import archive
from training.conversion.archive import (
    entry_bytes,
    existing_shards,
    images_per_shard,
    is_unfinished,
    plan_parts,
    shard_path,
    writing,
)
from training.dataset.zip_index import read_index

HEAD: dict[str, list[int]] = {"labels": []}


def fill(writers, parts, size=10):
    for writer, part in zip(writers, parts, strict=True):
        for index in range(part.start, part.stop):
            writer.add(index, bytes([index % 256]) * size, index % 3)
        writer.finish()


def below(path):
    """Everything under `path`, as relative paths."""
    return sorted(place.relative_to(path).as_posix() for place in path.rglob("*"))


def test_a_zip_holds_numbered_files_without_compression_and_their_labels(tmp_path):
    parts = plan_parts(tmp_path / "set.zip", 1001, num_shards=None, per_shard=None)
    with writing(parts, HEAD) as writers:
        fill(writers, parts)
        assert not (tmp_path / "set.zip").exists()
    assert below(tmp_path) == ["set.zip"]
    with zipfile.ZipFile(tmp_path / "set.zip") as file:
        names = file.namelist()
        assert names[0] == "00000/img00000000.png" and names[1000] == "00001/img00001000.png"
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
        assert file.read(names[1]) == b"\1" * 10
        labels = json.loads(file.read("dataset.json"))
    assert labels == {"labels": [[name, i % 3] for i, name in enumerate(names[:-1])]}


def test_a_folder_holds_the_same_files(tmp_path):
    for dest in ("set.zip", "set"):
        parts = plan_parts(tmp_path / dest, 1001, num_shards=None, per_shard=None)
        with writing(parts, HEAD) as writers:
            fill(writers, parts)
    with zipfile.ZipFile(tmp_path / "set.zip") as file:
        expected = {name: file.read(name) for name in file.namelist()}
    found = {
        p.relative_to(tmp_path / "set").as_posix(): p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()
    }
    assert found == expected
    assert "set/.tmp" not in "".join(below(tmp_path))


def test_the_same_images_make_the_same_bytes(tmp_path):
    for name in ("a.zip", "b.zip"):
        parts = plan_parts(tmp_path / name, 5, num_shards=None, per_shard=None)
        with writing(parts, HEAD) as writers:
            fill(writers, parts)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(("limit", "value"), [("ZIP_FILECOUNT_LIMIT", 5), ("ZIP64_LIMIT", 2000)])
def test_more_than_an_old_zip_can_count(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(zipfile, limit, value)  # for 65,535 entries, and 2 GiB
    path = tmp_path / "set.zip"
    parts = plan_parts(path, 9, num_shards=None, per_shard=None)
    with writing(parts, HEAD) as writers:
        fill(writers, parts, size=500)
    monkeypatch.undo()
    assert b"PK\x06\x06" in path.read_bytes()[-200:]  # the end record of ZIP64
    assert len(read_index(path).names) == 10
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tqq", path], capture_output=True, timeout=120).returncode == 0


def test_what_unzip_makes_can_be_read(tmp_path):
    if not shutil.which("unzip"):
        pytest.skip("unzip is not installed")
    parts = plan_parts(tmp_path / "set.zip", 2, num_shards=None, per_shard=None)
    with writing(parts, HEAD) as writers:
        fill(writers, parts)
    subprocess.run(["unzip", "-q", tmp_path / "set.zip", "-d", tmp_path / "out"], check=True, timeout=120)
    assert (tmp_path / "out/00000/img00000001.png").stat().st_mode & 0o777 == 0o644


def test_shards_share_the_images_out_in_order(tmp_path):
    parts = plan_parts(tmp_path / "set.zip", 10, num_shards=4, per_shard=None)
    assert [part.stop - part.start for part in parts] == [2, 3, 2, 3]
    assert [part.path.name for part in parts] == [f"set-{i:05d}.zip" for i in range(4)]
    with writing(parts, HEAD) as writers:
        fill(writers, parts)
    names, labels = [], []
    for number, part in enumerate(parts):
        with zipfile.ZipFile(part.path) as file:
            content = json.loads(file.read("dataset.json"))
            assert content["shard"] == [number, 4]
            names += file.namelist()[:-1]
            labels += content["labels"]
    assert names == [f"00000/img{i:08d}.png" for i in range(10)]
    assert labels == [[name, i % 3] for i, name in enumerate(names)]
    assert existing_shards(tmp_path / "set.zip") == [part.path for part in parts]


@pytest.mark.parametrize("label", [None, 7, [0.5] * 20])
def test_shards_of_a_size_are_filled_but_not_over_it(tmp_path, label):
    head = {"labels": None if label is None else [], "classes": ["cat"] * 40}
    each, limit = entry_bytes(3000, label), 100_000
    count = images_per_shard(limit, each, head)
    parts = plan_parts(tmp_path / "set.zip", 3 * count, num_shards=None, per_shard=count)
    with writing(parts, head) as writers:
        for writer, part in zip(writers, parts, strict=True):
            for index in range(part.start, part.stop):
                writer.add(index, bytes(3000), label)
            writer.finish()
    sizes = [part.path.stat().st_size for part in parts]
    assert len(sizes) == 3 and all(limit - 2 * each < size <= limit for size in sizes)


def test_shards_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="--shards=4 are more than the 3 images; try --shards=3"):
        plan_parts(tmp_path / "set.zip", 3, num_shards=4, per_shard=None)
    with pytest.raises(ConfigError, match="more than the 100000"):
        plan_parts(tmp_path / "set.zip", 200_000, num_shards=None, per_shard=1)
    with pytest.raises(ConfigError, match="does not hold one image, which takes 5000"):
        images_per_shard(1000, 5000, HEAD)


def test_other_files_are_no_shards(tmp_path):
    for name in ("set.zip", "set-1.zip", "set-00001.tar", "set-x-00001.zip", "other-00001.zip", "set-00012.zip"):
        (tmp_path / name).touch()
    assert existing_shards(tmp_path / "set.zip") == [shard_path(tmp_path / "set.zip", 12)]


@pytest.mark.parametrize("dest", ["new/deep/set.zip", "new/deep/set", "there"])
@pytest.mark.parametrize("error", [ConfigError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_nothing_is_left_of_what_was_not_finished(tmp_path, dest, error):
    (tmp_path / "there").mkdir()
    parts = plan_parts(tmp_path / dest, 5, num_shards=3 if dest.endswith(".zip") else None, per_shard=None)
    with pytest.raises(type(error)), writing(parts, HEAD) as writers:
        for writer in writers[:2]:
            writer.add(0, b"x", 0)
        writers[0].finish()
        raise error
    assert below(tmp_path) == ["there"]


@pytest.mark.parametrize("dest", ["set.zip", "set"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, dest, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = plan_parts(tmp_path / dest, 5, num_shards=None, per_shard=None)
    told = pytest.raises(ConfigError, match=f"{dest} cannot be written: No space left on device")
    with told, writing(parts, HEAD) as writers:
        writers[0].add(0, b"x", 0)
        monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        writers[0].add(1, b"x", 0)
    assert below(tmp_path) == []
    assert capfd.readouterr().err == ""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=120).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True, timeout=120)


@pytest.mark.parametrize("dest", ["set.zip", "set", "."])
def test_a_disk_that_is_really_full(small_disk, dest, capfd):
    parts = plan_parts(small_disk / dest, 300, num_shards=None, per_shard=None)
    with pytest.raises(ConfigError, match="No space left on device"), writing(parts, HEAD) as writers:
        fill(writers, parts, size=10_000)
    assert below(small_disk) == []
    assert capfd.readouterr().err == ""


def test_a_mounted_folder_can_be_filled(small_disk):
    parts = plan_parts(small_disk, 3, num_shards=None, per_shard=None)
    with writing(parts, HEAD) as writers:
        fill(writers, parts)
    assert below(small_disk) == ["00000", *(f"00000/img{i:08d}.png" for i in range(3)), "dataset.json"]


def test_an_unfinished_file_is_no_archive(tmp_path):
    parts = plan_parts(tmp_path / "set.zip", 1, num_shards=None, per_shard=None)
    with pytest.raises(KeyboardInterrupt), writing(parts, HEAD) as writers:
        writers[0].add(0, b"x", 0)
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.name.startswith(".") and not zipfile.is_zipfile(unfinished)
        raise KeyboardInterrupt
    assert archive.is_zip(tmp_path / "set.zip") and not archive.is_zip(tmp_path / "set.zipped")


def test_a_folder_of_images_without_labels_is_not_mistaken_for_unfinished_work(tmp_path):
    (tmp_path / "set" / "00000").mkdir(parents=True)
    (tmp_path / "set" / "00000" / "00001.png").write_bytes(b"mine")
    assert not is_unfinished(tmp_path / "set")
    (tmp_path / "set" / ".dataset.json.0123456789ab.tmp").mkdir()
    assert is_unfinished(tmp_path / "set")
