"""The files of a data set: memory-mapped ZIPs, their index, and several ZIPs as one data set."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import write_dataset
from training.condition.source_images import FileImages
from training.conversion.inspect import Inspection
from training.conversion.open_source import open_source
from training.dataset import BatchReader, ImageFolderDataset
from training.dataset import zip_index as dataset_index
from training.dataset.image_set import ImageSet
from training.dataset.item_files import ZipFiles, open_files
from training.dataset.zip_index import NameTable, read_index

RNG = np.random.default_rng(5)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def latents(count):
    return [RNG.standard_normal((8, 4, 4)).astype(np.float32) for _ in range(count)]


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    return path


def shards(folder, items, labels=None, sizes=(3, 4)):
    """Write `items` as set-00000.zip, ..., numbered through as dataset_tool.py numbers them."""
    start = 0
    for number, size in enumerate(sizes):
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(start, start + size)]
        files = {name: npy(items[start + i]) for i, name in enumerate(names)}
        if labels is not None:
            files["dataset.json"] = {"labels": [[name, labels[start + i]] for i, name in enumerate(names)]}
        write_zip(folder / f"set-{number:05d}.zip", files)
        start += size
    return folder / "set.zip"


def test_names_keep_their_order_and_are_found():
    names = sorted(["b/ä.png", "a.png", "b/a.png", "", "𝄞.png", "\udc80.png"])
    table = NameTable(names)
    assert list(table) == names and table[1:3] == names[1:3] and table[-1] == names[-1]
    assert [table.find(name) for name in names] == list(range(len(names)))
    assert table.find("c.png") is None and NameTable([]).find("a") is None


def test_a_stored_entry_is_a_view_of_the_file(tmp_path):
    data = RNG.bytes(100_000)
    files = ZipFiles(write_zip(tmp_path / "a.zip", {"x": data}))
    tracemalloc.start()
    view = files.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(view, memoryview) and view == data and view.readonly
    assert peak < 20_000


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_stored_or_deflated_read_as_zipfile_reads_them(tmp_path, method):
    contents = {f"{i}.bin": RNG.bytes(50 * i) + bytes(1000) for i in range(20)}
    files = open_files(write_zip(tmp_path / "a.zip", contents, compression=method))
    assert {name: bytes(files.read(row)) for row, name in enumerate(files.names)} == contents
    copy = pickle.loads(pickle.dumps(files))
    files.close()
    assert [bytes(copy.read(row)) for row in range(20)] == [bytes(files.read(row)) for row in range(20)]


def test_the_last_of_two_entries_of_one_name_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a", b"old")
        archive.writestr("a", b"new")
    files = ZipFiles(tmp_path / "a.zip")
    assert list(files.names) == ["a"] and files.read(0) == b"new"


def test_damage_is_found_by_the_checksum_although_nothing_decodes_wrongly(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{i}.npy": npy(item) for i, item in enumerate(latents(3))})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo("1.npy").header_offset + 30 + 5 + 200] ^= 1  # in the numbers
    path.write_bytes(data)
    dataset = ImageFolderDataset(path)
    dataset[0], dataset[2]
    for read in (lambda: dataset[1], lambda: dataset.read_batch([0, 1])):
        with pytest.raises(ConfigError, match=r"a\.zip: 1\.npy cannot be read: its checksum does not fit"):
            read()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression_is_named(tmp_path, method):
    path = write_zip(tmp_path / "a.zip", {"a.npy": npy(latents(1)[0])}, compression=method)
    with pytest.raises(ConfigError, match=r"a\.npy cannot be read: it is encrypted, or compressed in an unusual way"):
        ImageFolderDataset(path)


def test_a_bomb_is_refused_by_its_size(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": bytes(100)}, compression=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    entry = data.index(b"PK\1\2")  # in the central directory: the unpacked size
    path.write_bytes(data[: entry + 24] + (2**31).to_bytes(4, "little") + data[entry + 28 :])
    with pytest.raises(ConfigError, match=r"a\.png cannot be read: it claims 2147483648 bytes unpacked"):
        ImageFolderDataset(path)


def test_a_file_cut_off_after_its_index_was_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{i}.npy": npy(item) for i, item in enumerate(latents(8))})
    dataset = ImageFolderDataset(path)
    dataset.close()
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ConfigError, match=r"7\.npy cannot be read: it would begin outside of the file"):
        dataset[7]


def test_any_byte_of_an_archive_may_be_wrong(tmp_path):
    """Whatever is damaged: the right item, or one line about the archive."""
    items = latents(2)
    whole = write_zip(tmp_path / "a.zip", {f"{i}.npy": npy(item) for i, item in enumerate(items)}).read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (tmp_path / "a.zip").write_bytes(data)
        try:
            dataset = ImageFolderDataset(tmp_path / "a.zip")
            for i in range(len(dataset)):
                assert any(np.array_equal(dataset[i][0], item) for item in items)
        except ConfigError as error:
            assert "a.zip" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("field", ["size", "packed size", "offset"])
@pytest.mark.parametrize("value", [1 << 40, 1 << 63, (1 << 64) - 1])
def test_numbers_that_no_file_can_have(tmp_path, field, value):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", b"x" * 50)
    data = path.read_bytes()
    entry, end = data.rfind(b"PK\1\2"), data.rfind(b"PK\5\6")
    header = bytearray(data[entry:end])
    place = {"size": 24, "packed size": 20, "offset": 42}[field]
    header[place : place + 4] = b"\xff" * 4  # it stands in the ZIP64 field
    header[30:32] = struct.pack("<H", 12)
    header += struct.pack("<HHQ", 1, 8, value)
    tail = bytearray(data[end:])
    tail[12:16] = struct.pack("<I", len(header))
    path.write_bytes(data[:entry] + header + tail)
    with pytest.raises(ConfigError, match=r"is not a readable ZIP file|cannot be read"):
        files = ZipFiles(path)
        files.read(0)


def test_an_entry_without_a_name(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"1")
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2")
    data[entry + 28 : entry + 30] = struct.pack("<H", 0)
    data[entry + 30 : entry + 32] = struct.pack("<H", 1)
    path.write_bytes(data)
    try:
        names = list(ZipFiles(path).names)
    except ConfigError as error:
        assert "is not a readable ZIP file" in str(error)
    else:
        assert names == [""]


def test_a_huge_archives_index_is_kept_next_to_it_while_it_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_index, "_KEEP_ENTRIES", 3)
    path = write_zip(tmp_path / "a.zip", {f"{i}.npy": npy(item) for i, item in enumerate(latents(3))})
    first = read_index(path)
    copy = tmp_path / "a.zip.index"
    assert copy.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(dataset_index, "_read_directory", None)  # the archive is not looked at
        again = read_index(path)
    assert list(again.names) == list(first.names)
    for name in dataset_index._ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(first, name))
    # Another archive of this name, and a damaged copy: read again.
    write_zip(path, {"other.npy": b"", "b.npy": b""})
    assert list(read_index(path).names) == ["b.npy", "other.npy"]
    write_zip(path, {"x": b"", "y": b"", "z": b""})
    for damage in (copy.read_bytes()[:200], b"text", b""):
        copy.write_bytes(damage)
        assert list(read_index(path).names) == ["x", "y", "z"]


def test_twenty_thousand_images_hold_no_more_than_their_index_in_memory(tmp_path):
    empty = npy(np.zeros((1, 1, 1), dtype=np.float32))
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(20_000)]
    labels = {"labels": [[name, i % 10] for i, name in enumerate(names)]}
    path = write_zip(tmp_path / "a.zip", {**dict.fromkeys(names, empty), "dataset.json": labels})
    tracemalloc.start()
    dataset = ImageFolderDataset(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(dataset) == 20_000 and dataset.label_dim == 10
    assert held < 120 * 20_000  # 35 bytes of name and offset, 29 of sizes and checksum, 25 of order and label


@pytest.mark.parametrize("spelling", ["set.zip", "set-*.zip", "."])
def test_shards_are_one_data_set(tmp_path, spelling):
    items, labels = latents(7), [3, 1, 2, 0, 1, 1, 2]
    shards(tmp_path, items, labels)
    dataset = ImageFolderDataset(tmp_path / spelling)
    assert len(dataset) == 7 and dataset.label_dim == 4
    for i, item in enumerate(items):
        assert np.array_equal(dataset[i][0], item) and dataset.get_details(i).raw_label == labels[i]
    batch, onehot = pickle.loads(pickle.dumps(dataset)).read_batch([6, 0, 3])
    assert np.array_equal(batch, np.stack([items[i] for i in (6, 0, 3)])) and onehot.argmax(1).tolist() == [2, 3, 0]
    dataset.close()


def test_shards_that_do_not_belong_together(tmp_path):
    path = shards(tmp_path, latents(9), sizes=(3, 3, 3))
    (tmp_path / "set-00001.zip").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=r"set\.zip: shard 00001 is missing of 3"):
        ImageFolderDataset(path)
    write_zip(tmp_path / "set-00001.zip", {"00000/img-mean-std-00000002.npy": npy(latents(1)[0])})
    with pytest.raises(ConfigError, match=r"both hold 00000/img-mean-std-00000002\.npy"):
        ImageFolderDataset(path)
    (tmp_path / "aside").rename(tmp_path / "set-00001.zip")
    files = {"00000/img-mean-std-00000006.npy": npy(latents(1)[0])}
    labels = {"labels": [["00000/img-mean-std-00000006.npy", 0]]}
    write_zip(tmp_path / "set-00002.zip", {**files, "dataset.json": labels})
    with pytest.raises(ConfigError, match=r"set-00000\.zip has no labels, and .*set-00002\.zip has"):
        ImageFolderDataset(path)


def test_missing_last_shards_are_noticed(tmp_path):
    for number in range(2):
        name = f"00000/img{number:08d}.npy"
        head = {"shard": [number, 3], "labels": None}
        write_zip(tmp_path / f"set-{number:05d}.zip", {name: npy(latents(1)[0]), "dataset.json": head})
    with pytest.raises(ConfigError, match=r"set\.zip: there are 2 of 3 shards; the last ones are missing"):
        ImageFolderDataset(tmp_path / "set.zip")
    assert len(ImageFolderDataset(tmp_path / "set-00001.zip")) == 1  # asked for by its own name


def test_a_batch_holds_what_single_items_hold(tmp_path):
    arrays = [RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(6)]
    for i, pixels in enumerate(arrays):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    labels = {"labels": [[f"{i}.png", [i, 0.5]] for i in range(6)]}
    (tmp_path / "dataset.json").write_text(json.dumps(labels))
    dataset = ImageFolderDataset(tmp_path, xflip=True)
    indices = [11, 0, 3, 3, 8]
    images, vectors = dataset.read_batch(indices)
    assert images.flags.c_contiguous and images.dtype == np.uint8
    for image, vector, idx in zip(images, vectors, indices, strict=True):
        assert np.array_equal(image, dataset[idx][0]) and np.array_equal(vector, dataset[idx][1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_out_of_workers_as_they_are_read(tmp_path, num_workers):
    items = latents(7)
    dataset = ImageFolderDataset(shards(tmp_path, items, [0, 1, 2, 3, 0, 1, 2]))
    order = [[0, 5], [6, 6], [1, 2]]
    loader = torch.utils.data.DataLoader(
        BatchReader(dataset),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    for indices, (images, labels) in zip(order, loader, strict=True):
        assert np.array_equal(images.numpy(), np.stack([items[i] for i in indices]))
        assert torch.equal(labels.argmax(1), torch.tensor([[0, 1, 2, 3, 0, 1, 2][i] for i in indices]))


def test_no_data_set_is_named(tmp_path):
    for name in ("none.zip", "none", "none-*.zip"):
        with pytest.raises(ConfigError, match="does not exist"):
            open_files(Path(tmp_path, name))


@pytest.mark.parametrize("field", [32, 46])
def test_labels_that_damage_has_hidden_are_missed(field: int, tmp_path: Path) -> None:
    """A wrong length or name in the table of contents must not make a data set without labels of one with them."""
    path = write_dataset(tmp_path / "set.zip", num=4)
    content = bytearray(path.read_bytes())
    entries = [place for place in range(len(content)) if content.startswith(b"PK\1\2", place)]
    place = entries[-2] if field == 32 else entries[-1]  # the length of the comment before it, or its own name
    content[place + field] ^= 0x7F
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="4 of 5 entries" if field == 32 else "another name"):
        ImageFolderDataset(path)


def test_names_out_of_files_are_printed_on_one_line() -> None:
    assert str(ConfigError("a\nb\x1b[2J \ud800c ä")) == "a b?[2J ?c ä"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["a/x.png", "dataset.json", "notes.txt", "link.png", ""])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    """By all who read a folder of images: training, inspect, metrics, conditioning images, convert, encode."""
    folder = tmp_path / "set"
    if name:
        (folder / "a").mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8)).save(folder / "a" / "y.png")
        os.mkfifo(folder / ".hidden")  # of a program that runs there; not one of the images
    readers = [ImageFolderDataset, ImageSet, open_source, Inspection, lambda path: FileImages(path, 3)]
    if name:
        for read in readers:
            read(folder)
    if name == "link.png":
        (folder / name).symlink_to(folder / ".hidden")
    else:
        os.mkfifo(folder / name)
    for read in readers:
        with pytest.raises(ConfigError, match="is a pipe, a device or a socket"):
            read(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "name", ["x.tar", "x.tar.gz", "data_batch_1", "x.parquet", "x.npz", "x.lmdb", "x.zip", "train-images-idx3-ubyte.gz"]
)
def test_a_pipe_in_place_of_an_archive(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="is a pipe"):
        open_source(tmp_path / name)
    for other in ("data_batch_2", "state.json", "data.mdb", "x.parquet"):
        if not (tmp_path / other).exists():
            os.mkfifo(tmp_path / other)
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is a pipe|no images"):
        open_source(tmp_path)
