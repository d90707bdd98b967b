"""What can be converted: every kind of source gives its images in order, with labels, or one line of why not."""

import gc
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from dnnlib.errors import ConfigError
from tests.helpers.sources import pack
from training.conversion import unpacked_tar
from training.conversion.open_source import open_source
from training.images.decode import DecodeOptions, Unreadable, decode_image

RNG = np.random.default_rng(5)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pixels_of(source):
    """All images, through a pickled copy of the reader as a worker has it."""
    reader = pickle.loads(pickle.dumps(source.reader))
    found = []
    for key in source.keys:
        data = reader.read(pickle.loads(pickle.dumps(key)))
        found.append(np.asarray(decode_image(data, DecodeOptions()).image))
    return found


def refused(path, **options):
    with pytest.raises(ConfigError) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(found, expected):
    assert len(found) == len(expected)
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# Folders and ZIP files.


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_classes_are_the_top_level_folders_in_sorted_order_at_any_depth(tmp_path, name):
    images = {key: noise(4, 4, 3) for key in ("b/2.png", "a/x/y/1.png", "c/0.png", "a/0.png")}
    files = {key: png(pixels) for key, pixels in images.items()}
    others = {"a/notes.txt": b"x", "__MACOSX/a/._0.png": b"x", "a/.hidden.png": b"x", "d/readme.md": b"x"}
    source = open_source(pack(tmp_path / name, {**files, **others}))
    assert source.names == sorted(images)
    assert (source.labels, source.classes) == ([0, 0, 1, 2], ["a", "b", "c"])
    assert same(pixels_of(source), [images[key] for key in sorted(images)])


def test_folders_that_are_called_like_the_files_of_other_sources(tmp_path):
    files = {f"{name}/0.png": png(noise(4, 4)) for name in ("train", "test", "meta", "data")}
    assert open_source(pack(tmp_path / "set", {**files, "state.json": {}})).classes == [
        "data",
        "meta",
        "test",
        "train",
    ]


def test_one_folder_is_no_class(tmp_path):
    source = open_source(pack(tmp_path / "set", {"a/0.png": png(noise(4, 4)), "1.png": png(noise(4, 4))}))
    assert (source.names, source.labels, source.classes) == (["1.png", "a/0.png"], None, None)


@pytest.mark.parametrize("name", ["set", "set.zip"])
@pytest.mark.parametrize("labels", [[5, 0], [[0.25, 1], [2.5, -3]]])
def test_a_dataset_json_wins_over_the_folders(tmp_path, name, labels):
    pairs = list(zip(["a/0.png", "b/0.png"], labels, strict=True))
    files = {key: png(noise(4, 4)) for key, _ in pairs}
    assert open_source(pack(tmp_path / name, {**files, "dataset.json": {"labels": pairs[::-1]}})).labels == labels


def test_a_dataset_json_without_labels_means_none(tmp_path):
    files = {"a/0.png": png(noise(4, 4)), "b/0.png": png(noise(4, 4))}
    assert open_source(pack(tmp_path / "set", {**files, "dataset.json": {"labels": None}})).labels is None


def test_shards_are_one_source(tmp_path):
    images = [noise(4, 4, 3) for _ in range(4)]
    for i in range(2):
        files = {f"{j}.png": png(images[j]) for j in (2 * i, 2 * i + 1)}
        labels = {"labels": [[name, 7 + i] for name in files]}
        pack(tmp_path / f"set-{i:05d}.zip", {**files, "dataset.json": labels})
    for place in (tmp_path, tmp_path / "set.zip", tmp_path / "set-*.zip"):
        source = open_source(place)
        assert source.labels == [7, 7, 8, 8]
        assert same(pixels_of(source), images)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{labels", "dataset.json is not JSON"),
        ({"labels": [["a.png", 0]]}, "no label for 1 of 2 images, first b.png"),
        ({"labels": [["a.png", 0], ["b.png", [1.0]]]}, "mixes kinds of labels"),
        ({"labels": [["a.png", 0], ["b.png", 0], ["../c.png", 0]]}, "'../c.png', which leads out of its folder"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, content, told):
    files = {"a.png": png(noise(4, 4)), "b.png": png(noise(4, 4)), "dataset.json": content}
    assert told in refused(pack(tmp_path / "set", files))


def test_images_outside_of_the_class_folders_have_no_label(tmp_path):
    files = {key: png(noise(4, 4)) for key in ("a/0.png", "b/0.png", "stray.png")}
    assert "1 images outside of them without a label, first stray.png" in refused(pack(tmp_path / "set", files))


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/a.png", "C:\\a.png", "..\\a.png", "c:a.png"])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    for kind in ("set.zip", "set.tar"):
        message = refused(pack(tmp_path / kind, {"ok.png": png(noise(4, 4)), name: png(noise(4, 4))}))
        assert "leads out of its folder" in message and kind in message


def test_places_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images; it is empty" in refused(tmp_path / "empty")
    assert "holds no images; it has 1 other files" in refused(pack(tmp_path / "text", {"a.txt": b"x"}))
    assert "holds no images" in refused(pack(tmp_path / "text.zip", {"a.txt": b"x"}))
    assert "does not exist" in refused(tmp_path / "missing")
    assert "does not exist" in refused(tmp_path / "missing.zip")
    assert "give the folder" in refused(pack(tmp_path / "one", {"a.png": b""}) / "a.png")


def test_truncated_archives(tmp_path):
    for name, kind in (("set.zip", "readable ZIP"), ("set.tar", "readable uncompressed tar")):
        path = pack(tmp_path / name, {f"{i}.png": png(noise(16, 16, 3)) for i in range(9)})
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert f"not a {kind} file" in refused(path)


# CIFAR.


def cifar_batch(count, **labels):
    return {b"data": noise(count, 3072), b"batch_label": b"x", **{k.encode(): v for k, v in labels.items()}}


def cifar_pixels(batch):
    return list(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def python2_pickle(pixels, labels):
    """The opcodes that Python 2 wrote for {'data': uint8 array, 'labels': list}."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    rows, columns = pixels.shape
    shape = b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    raw = b"T" + struct.pack("<I", pixels.size) + pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R"
        + shape
        + dtype
        + b"\x89"
        + raw
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"labels") + numbers + text(b"data") + array + b"u."


@pytest.fixture
def cifar10():
    batches = {f"data_batch_{i}": cifar_batch(3, labels=[i, 0, 9]) for i in range(1, 6)}
    batches["test_batch"] = cifar_batch(2, labels=[4, 5])
    files = {name: pickle.dumps(batch, protocol=2) for name, batch in batches.items()}
    names = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    return batches, {**files, "batches.meta": pickle.dumps(names, protocol=2), "readme.html": b"<html>"}


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10.tar", "cifar-10-batches-py"])
def test_cifar10_in_the_order_of_its_files(tmp_path, cifar10, name):
    batches, files = cifar10
    folder = "" if name.endswith("py") else "cifar-10-batches-py/"
    path = pack(tmp_path / name, {folder + key: data for key, data in files.items()})
    source = open_source(path)
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    assert source.labels == [label for batch in train for label in batch[b"labels"]]
    assert source.classes == [f"class{i}" for i in range(10)]
    assert same(pixels_of(source), [pixels for batch in train for pixels in cifar_pixels(batch)])
    test = open_source(path, split="test")
    assert test.labels == [4, 5] and same(pixels_of(test), cifar_pixels(batches["test_batch"]))
    assert "no split 'val'; choose one by --split=test|train" in refused(path, split="val")


def test_a_single_batch_of_cifar(tmp_path, cifar10):
    batches, files = cifar10
    path = pack(tmp_path / "set", {"data_batch_3": files["data_batch_3"]}) / "data_batch_3"
    assert same(pixels_of(open_source(path)), cifar_pixels(batches["data_batch_3"]))


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    batch = cifar_batch(3, fine_labels=[99, 1, 2], coarse_labels=[19, 0, 1])
    meta = {b"fine_label_names": [b"f"] * 100, b"coarse_label_names": [b"c"] * 20}
    files = {"train": batch, "test": cifar_batch(1, fine_labels=[0], coarse_labels=[0]), "meta": meta}
    path = pack(tmp_path / "cifar-100-python", {k: pickle.dumps(v, protocol=2) for k, v in files.items()})
    assert open_source(path).labels == [99, 1, 2] and len(open_source(path).classes) == 100
    coarse = open_source(path, label="coarse")
    assert coarse.labels == [19, 0, 1] and coarse.classes == ["c"] * 20
    assert "no odd labels; choose by --label=fine|coarse" in refused(path, label="odd")


def test_pickles_of_python_2(tmp_path):
    pixels = noise(2, 3072)
    data = python2_pickle(pixels, [7, 8])
    (reference,) = [pickle.loads(data, encoding="bytes")]  # the assembled opcodes are sound
    assert np.array_equal(reference[b"data"], pixels) and reference[b"labels"] == [7, 8]
    source = open_source(pack(tmp_path / "set", {"train": data}) / "train")
    assert source.labels == [7, 8]
    assert same(pixels_of(source), cifar_pixels({b"data": pixels}))


class _Runs:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def test_nothing_in_a_pickle_is_run(tmp_path):
    bait = tmp_path / "bait"
    batch = {**cifar_batch(1, labels=[0]), b"x": _Runs(f"open({str(bait)!r}, 'w')")}
    path = pack(tmp_path / "set", {"train": pickle.dumps(batch, protocol=2)}) / "train"
    assert "not read, and nothing in it was run" in refused(path)
    assert not bait.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], "is not a CIFAR batch"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "must be uint8"),
        ({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, "must be uint8 [N, 3072]"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "1 labels for 2 images"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "labels"),
    ],
)
def test_pickles_that_are_no_cifar(tmp_path, content, told):
    assert told in refused(pack(tmp_path / "set", {"train": pickle.dumps(content, protocol=2)}) / "train")


def test_a_cut_pickle(tmp_path, cifar10):
    data = cifar10[1]["test_batch"]
    for size in (len(data) - 9, len(data) // 2, 40):
        message = refused(pack(tmp_path / "set", {"test_batch": data[:size]}) / "test_batch")
        assert "test_batch" in message and "cut short" in message


# MNIST.


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    images, labels = noise(5, 28, 28), np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    files = {"train-images-idx3-ubyte": idx(images), "train-labels-idx1-ubyte": idx(labels)}
    files |= {"t10k-images-idx3-ubyte": idx(images[:2]), "t10k-labels-idx1-ubyte": idx(labels[:2])}
    if suffix:
        files = {name + suffix: gzip.compress(data) for name, data in files.items()}
    path = pack(tmp_path / "mnist", files)
    source = open_source(path)
    assert source.labels == labels.tolist()
    assert same(pixels_of(source), [np.stack([image] * 3, axis=2) for image in images])
    assert len(open_source(path, split="test").names) == 2
    assert open_source(path / f"t10k-images-idx3-ubyte{suffix}").labels == [3, 1]


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (idx(noise(3, 4, 4))[:-1], None, "cut short: 47 of 48 bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), None, "cut short: 0 of"),
        (b"text" * 9, None, "does not begin as idx data of 3 axes"),
        (idx(noise(3, 4, 4)), idx(noise(2)), "2 labels for 3 images"),
        (idx(noise(0, 4, 4)), None, "is empty"),
    ],
)
def test_idx_files_that_cannot_be_used(tmp_path, images, labels, told):
    files = {"train-images-idx3-ubyte": images} | ({"train-labels-idx1-ubyte": labels} if labels else {})
    assert told in refused(pack(tmp_path / "mnist", files))


# LMDB.


def test_lmdb_values_are_images_in_the_order_of_their_keys(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    images = {f"{i:02x}".encode(): noise(4, 4, 3) for i in (200, 3, 77)}
    with (
        lmdb.open(str(tmp_path / "bedroom_train_lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as txn,
    ):
        for key, pixels in images.items():
            txn.put(key, png(pixels))
    source = open_source(tmp_path / "bedroom_train_lmdb")
    assert (source.names, source.labels) == (["03", "4d", "c8"], None)
    assert same(pixels_of(source), [images[key] for key in sorted(images)])
    assert same(
        pixels_of(open_source(tmp_path / "bedroom_train_lmdb" / "data.mdb")), [images[k] for k in sorted(images)]
    )


def test_lmdbs_that_cannot_be_used(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    lmdb.open(str(tmp_path / "empty"), map_size=1 << 20).close()
    assert "the LMDB is empty" in refused(tmp_path / "empty")
    assert "not a readable LMDB" in refused(pack(tmp_path / "text", {"data.mdb": b"text" * 9999}))


# Hugging Face data sets.


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Six images of two classes, as `datasets` writes them."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [noise(4, 4, 3) for _ in range(6)]
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "id": datasets.Value("int32"),
    }
    rows = {"image": [PIL.Image.fromarray(p) for p in images], "label": [0, 1, 0, 1, 1, 0], "id": range(6)}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    path = tmp_path_factory.mktemp("tables")
    data.save_to_disk(path / "arrow", num_shards=2)
    parts = {"train": data, "test": data.select([5, 2])}
    datasets.DatasetDict(parts).save_to_disk(path / "dict")
    for i in range(2):
        part = data.shard(2, i, contiguous=True)
        for place in (path / "hub/data", path / "plain"):
            place.mkdir(parents=True, exist_ok=True)
        part.to_parquet(path / f"hub/data/train-{i:05d}-of-00002.parquet", batch_size=2)
        part.to_parquet(path / f"plain/{i}.parquet")
    parts["test"].to_parquet(path / "hub/data/test-00000-of-00001.parquet")
    return path, images


@pytest.mark.parametrize("name", ["arrow", "dict", "dict/train", "hub", "plain"])
def test_hugging_face_data_sets(tables, name):
    path, images = tables
    source = open_source(path / name)
    assert (source.labels, source.classes) == ([0, 1, 0, 1, 1, 0], ["cat", "dog"])
    assert len(set(source.names)) == 6
    assert same(pixels_of(source), images)


@pytest.mark.parametrize("name", ["dict", "hub"])
def test_splits_of_hugging_face_data_sets(tables, name):
    path, images = tables
    source = open_source(path / name, split="test")
    assert source.labels == [0, 0] and same(pixels_of(source), [images[5], images[2]])
    assert "no split 'dev'; choose one by --split=" in refused(path / name, split="dev")


def test_a_parquet_file_and_another_column_of_labels(tables):
    path, images = tables
    source = open_source(path / "plain/1.parquet", label="id")
    assert source.labels == [3, 4, 5] and source.classes is None
    assert same(pixels_of(source), images[3:])
    assert "no column 'odd'; choose one by --label=image|label|id" in refused(path / "plain", label="odd")


def test_tables_that_cannot_be_used(tmp_path, tables):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert "no readable tables" in refused(pack(tmp_path / "text", {"a.parquet": b"PAR1 text"}))
    (tmp_path / "flat").mkdir()
    parquet.write_table(pa.table({"x": [1, 2]}), tmp_path / "flat/a.parquet")
    assert "0 columns of images among x" in refused(tmp_path / "flat")
    assert "leads out of its folder" in refused(
        pack(tmp_path / "out", {"state.json": {"_data_files": [{"filename": "../x.arrow"}]}, "dataset_info.json": {}})
    )
    assert "is not JSON" in refused(pack(tmp_path / "json", {"state.json": b"{", "dataset_info.json": {}}))
    parquet.write_table(pa.table({"image": [png(noise(4, 4)), None], "label": [0, -1]}), tmp_path / "flat/a.parquet")
    assert "no label for 1 of 2 images, first a.parquet[1]" in refused(tmp_path / "flat")


# WebDataset tars.


@pytest.mark.parametrize("kind", ["cls", "json", "vectors", "none"])
def test_webdataset_tars(tmp_path, kind):
    images = {f"{i:03d}": noise(4, 4, 3) for i in range(4)}
    labels = {"cls": [2, 0, 1, 0], "json": [2, 0, 1, 0], "vectors": [[0.5, i] for i in range(4)], "none": None}[kind]
    for part in range(2):
        files = {}
        for i in (2 * part + 1, 2 * part):  # samples come in any order
            if kind == "cls":
                files[f"s/{i:03d}.cls"] = str(labels[i]).encode()
            elif labels is not None:
                files[f"s/{i:03d}.json"] = {"label": labels[i], "caption": "x"}
            files[f"s/{i:03d}.seg.txt"] = b"x"
            files[f"s/{i:03d}.png"] = png(images[f"{i:03d}"])
        (tmp_path / "shards").mkdir(exist_ok=True)
        pack(tmp_path / "shards" / f"train-{part:06d}.tar", files)
    source = open_source(tmp_path / "shards")
    assert source.names[0] == "train-000000.tar/s/000.png" and source.labels == labels
    assert same(pixels_of(source), list(images.values()))
    assert same(pixels_of(open_source(tmp_path / "shards/train-000001.tar")), list(images.values())[2:])


def test_a_tar_of_a_data_set_has_its_dataset_json(tmp_path):
    files = {"00000/a.png": png(noise(4, 4)), "00000/a-b.png": png(noise(4, 4))}
    labels = {"labels": [["00000/a-b.png", 2], ["00000/a.png", 1]]}
    source = open_source(pack(tmp_path / "set.tar", {**files, "dataset.json": labels}))
    assert (source.names, source.labels) == (["00000/a.png", "00000/a-b.png"], [1, 2])  # in the order of samples


def test_tars_that_cannot_be_used(tmp_path):
    image = png(noise(4, 4))
    half = {"a.png": image, "a.cls": b"0", "b.png": image}
    assert "no label for 1 of 2 images, first b.png" in refused(pack(tmp_path / "half.tar", half))
    assert "a.cls holds no label" in refused(pack(tmp_path / "cls.tar", {"a.png": image, "a.cls": b"cat\ndog"}))
    assert "a.jpg and a.png in one sample" in refused(pack(tmp_path / "two.tar", {"a.png": image, "a.jpg": image}))
    assert "holds no images" in refused(pack(tmp_path / "none.tar", {"a.txt": b"x"}))
    (tmp_path / "text.tar").write_bytes(b"text" * 999)
    assert "not a readable tar file" in refused(tmp_path / "text.tar")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz"])
def test_a_compressed_tar_is_the_tar_in_it(tmp_path, temporary, name):
    files = {f"{i:02d}.png": png(noise(4, 4)) for i in range(9)}
    files |= {f"{i:02d}.cls": b"%d" % (i % 2) for i in range(9)}
    plain = pack(tmp_path / "set.tar", files)
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    expected, found = open_source(plain), open_source(tmp_path / name)
    assert list(found.names) == list(expected.names) and list(found.labels) == list(expected.labels)
    assert all(map(np.array_equal, pixels_of(found), pixels_of(expected)))
    assert len(list(temporary.iterdir())) == 1
    del found
    gc.collect()
    assert not list(temporary.iterdir())


def test_compressed_tars_that_cannot_be_used_leave_nothing(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(unpacked_tar, "_ALWAYS_ALLOWED", 0)
    bomb = pack(tmp_path / "bomb.tar.gz", {"a.png": bytes(1 << 22)})
    assert "unpacks to more than 100 times its size" in refused(bomb)
    whole = pack(tmp_path / "cut.tar.gz", {"a.png": png(noise(64, 64))})
    whole.write_bytes(whole.read_bytes()[:-900])
    assert "cut.tar.gz is not a readable" in refused(whole)
    (tmp_path / "text.tar.gz").write_bytes(gzip.compress(b"text" * 999))
    assert "not a readable" in refused(tmp_path / "text.tar.gz")
    pointer = tmp_path / "pointer.tar.gz"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    assert "git lfs pull" in refused(pointer)
    gc.collect()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_of_samples(tmp_path, name, channels):
    images = noise(5, 4, 4, channels)
    if name == "a.npz":
        np.savez(tmp_path / name, images, np.arange(5) % 2)
    else:
        np.save(tmp_path / name, images)
    source = open_source(tmp_path / name)
    assert list(source.names) == [f"{name}[{i}]" for i in range(5)]
    assert source.labels == ([0, 1, 0, 1, 0] if name == "a.npz" else None)
    assert all(map(np.array_equal, pixels_of(source), np.broadcast_to(images, (5, 4, 4, 3))))


@pytest.mark.parametrize(("name", "target"), [("b.png", "/etc/passwd"), ("b.png", "../x.png"), ("cats", "/data/cats")])
def test_links_that_lead_out_of_a_tar_are_refused_by_name(tmp_path, name, target):
    path = pack(tmp_path / "links.tar", {"a.png": png(noise(4, 4))})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        archive.addfile(member)
    assert f"{name} is a link to" in refused(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_inside_of_a_tar_lead_to_their_image(tmp_path, kind):
    image = noise(4, 4, 3)
    path = pack(tmp_path / "links.tar", {"x/a.png": png(image)})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("y/b.png")
        member.type, member.linkname = kind, "../x/a.png" if kind == tarfile.SYMTYPE else "x/a.png"
        archive.addfile(member)
    source = open_source(path)
    assert (source.names, source.labels) == (["x/a.png", "y/b.png"], [0, 1])
    assert same(pixels_of(source), [image, image])


# Optional packages.


@pytest.mark.parametrize(("package", "file"), [("lmdb", "data.mdb"), ("pyarrow", "dataset_dict.json")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, file):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install -e '.[formats]'" in refused(pack(tmp_path / "set", {file: {"splits": []}}))


def test_workers_need_no_torch():
    code = (
        "import sys, training.conversion.workers;"
        "print(sorted({'torch', 'pyarrow', 'lmdb', 'click'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("left", [0.3, 0.6, 0.95])
def test_an_lmdb_that_is_or_gets_shorter_is_one_line(tmp_path, left):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "set_lmdb"), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for number in range(30):
            transaction.put(b"%03d" % number, png(noise(4, 4, 3)))
            transaction.put(b"x%03d" % number, bytes(30_000))
    file = tmp_path / "set_lmdb" / "data.mdb"
    whole = file.read_bytes()
    source = open_source(tmp_path / "set_lmdb")
    source.reader.read(source.keys[0])
    os.truncate(file, int(len(whole) * left))
    with pytest.raises(Unreadable, match="it is cut short"):
        source.reader.read(source.keys[0])
    del source  # a process can open a database only once
    gc.collect()
    with pytest.raises(ConfigError, match="it is cut short"):
        open_source(tmp_path / "set_lmdb")


def test_what_is_compressed_is_not_unpacked_without_bound(tmp_path):
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 100_000, 28, 28) + bytes(1000))
    with pytest.raises(ConfigError, match="more than 100 times"):
        open_source(tmp_path / "train-images-idx3-ubyte.gz")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz", compresslevel=1) as archive:
        for number in (1, 2):
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{number}")
            member.size = 140 << 20
            archive.addfile(member, Zeros())
    with pytest.raises(ConfigError, match="CIFAR has 186 MB"):
        open_source(tmp_path / "cifar.tar.gz")


class Zeros:
    """A file of zeros without an end."""

    def read(self, count: int) -> bytes:
        return bytes(count)


@pytest.mark.parametrize("name", ["a.tar.xz", "a.txz", "a.tar.bz2", "a.TBZ2", "a.tar.zst"])
def test_other_compressed_tars_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert "pack it as .tar.gz" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path, name, temporary):
    """Long names and their like are read at once, however long."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 4 << 30
    header = member.tobuf(tarfile.GNU_FORMAT)
    with gzip.open(tmp_path / name, "wb") if name.endswith("gz") else open(tmp_path / name, "wb") as file:
        file.write(header)
        file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        assert "more than is possible" in refused(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
