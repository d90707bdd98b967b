"""A conversion as a whole: pixels, order and labels whatever the number of processes, and what it refuses."""

import collections
import errno
import io
import json
import multiprocessing
import os
import struct
import zipfile
import zlib

import numpy as np
import PIL
import PIL.Image
import pytest

from dnnlib.errors import ConfigError
from training.conversion import archive
from training.conversion.convert import ConvertOptions, DatasetConversion
from training.conversion.image_source import Source, choose_images
from training.dataset import ImageFolderDataset

RNG = np.random.default_rng(7)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def convert(source, dest, **options):
    """Convert, and give the steps and the data set."""
    conversion = DatasetConversion(ConvertOptions(source=source, dest=dest, **options))
    steps = list(conversion)
    assert sum(step.num_images for step in steps) == len(conversion)
    return steps, ImageFolderDataset(dest)


def refused(source, dest, **options):
    """The one line that a conversion ends with; nothing may be left of it."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        convert(source, dest, **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before
    return str(caught.value)


def pixels(dataset):
    return np.stack([dataset[i][0] for i in range(len(dataset))])


def labels(dataset):
    return [int(dataset.get_details(i).raw_label) for i in range(len(dataset))]


@pytest.fixture
def folder(tmp_path):
    """Forty images of various sizes in three classes, named so that their order is not that of making."""
    for i in RNG.permutation(40):
        write(tmp_path / "source", {f"{'cab'[i % 3]}/{i:02d}.png": png(noise(*RNG.integers(20, 60, 2), 3))})
    return tmp_path / "source"


def expected(folder, size=16):
    """What the spec says: sorted paths, RGB, Lanczos; labels from the sorted top-level names."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    images = [PIL.Image.open(path).convert("RGB").resize((size, size), PIL.Image.Resampling.LANCZOS) for path in paths]
    return np.stack(images).transpose(0, 3, 1, 2), [ord(path.parent.name) - ord("a") for path in paths]


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_pixels_order_and_labels_are_those_of_the_plain_way(folder, tmp_path, dest):
    _, dataset = convert(folder, tmp_path / dest, resolution=(16, 16))
    images, classes = expected(folder)
    assert np.array_equal(pixels(dataset), images)
    assert labels(dataset) == classes
    with zipfile.ZipFile(tmp_path / dest) if dest.endswith("zip") else open(tmp_path / dest / "dataset.json") as file:
        content = json.loads(file.read("dataset.json") if dest.endswith("zip") else file.read())
    assert content["classes"] == ["a", "b", "c"]


def test_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.conversion.convert._MAX_CHUNK", 3)
    write(folder, {"b/00.png": b"damaged"})
    found = []
    for workers in (1, 2, 3):
        options = {"resolution": (16, 16), "on_error": "skip", "workers": workers}
        steps, _ = convert(folder, tmp_path / f"{workers}.zip", **options)
        found.append((steps, (tmp_path / f"{workers}.zip").read_bytes()))
    assert found[0] == found[1] == found[2]


def test_images_that_fit_keep_their_pixels(tmp_path):
    images = [noise(8, 8, 3) for _ in range(3)]
    source = write(tmp_path / "source", {f"{i}.png": png(image) for i, image in enumerate(images)})
    _, dataset = convert(source, tmp_path / "out.zip")
    assert np.array_equal(pixels(dataset), np.stack(images).transpose(0, 3, 1, 2)) and not dataset.has_labels
    _, again = convert(tmp_path / "out.zip", tmp_path / "again.zip")
    assert np.array_equal(pixels(again), pixels(dataset))
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


def test_vector_labels_stay_as_they_are(tmp_path):
    vectors = [["0.png", [0.1, 1e-30]], ["1.png", [2, -3.5]]]
    files = {f"{i}.png": png(noise(8, 8)) for i in range(2)}
    source = write(tmp_path / "source", {**files, "dataset.json": {"labels": vectors}})
    convert(source, tmp_path / "out")
    found = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [label for _, label in found["labels"]] == [label for _, label in vectors]


def test_max_images_are_the_first_in_sorted_order(folder, tmp_path):
    _, dataset = convert(folder, tmp_path / "out.zip", resolution=(16, 16), max_images=17)
    images, classes = expected(folder)
    assert np.array_equal(pixels(dataset), images[:17]) and labels(dataset) == classes[:17]


def balanced(counts, max_images):
    """How many of each class are taken when class i has counts[i] images, in any order."""
    classes = RNG.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    names = [f"{i:04d}" for i in range(len(classes))]
    source = Source(path="x", names=names, keys=names, reader=None, labels=classes)
    rows = [int(name) for name in choose_images(source, max_images, balanced=True).names]
    assert rows == sorted(set(rows))
    for number in range(len(counts)):  # within a class, the first
        mine = [row for row, label in enumerate(classes) if label == number]
        chosen = [row for row in rows if classes[row] == number]
        assert chosen == mine[: len(chosen)]
    found = collections.Counter(classes[row] for row in rows)
    return [found[number] for number in range(len(counts))]


def test_balanced_takes_evenly_over_the_classes():
    assert balanced([10, 20, 30], 12) == [4, 4, 4]
    assert balanced([10, 20, 30], 14) == [5, 5, 4]
    assert balanced([2, 20, 30], 12) == [2, 5, 5]
    assert balanced([2, 20, 30], 13) == [2, 6, 5]
    assert balanced([1, 0, 3, 30], 20) == [1, 0, 3, 16]
    assert balanced([3, 3], 100) == [3, 3]
    assert balanced([5, 5, 5], 2) == [1, 1, 0]


def test_balanced_is_as_even_as_can_be():
    for _ in range(50):
        counts = RNG.integers(0, 20, RNG.integers(1, 8))
        counts[0] += 1
        wanted = int(RNG.integers(1, counts.sum() + 5))
        taken = np.array(balanced(counts, wanted))
        assert taken.sum() == min(wanted, counts.sum()) and (taken <= counts).all()
        # Whoever gives less than another by more than one has no more to give.
        assert (taken[taken < taken.max() - 1] == counts[taken < taken.max() - 1]).all()


def test_balanced_needs_classes(tmp_path):
    source = write(tmp_path / "source", {"a.png": png(noise(8, 8))})
    assert "has no labels" in refused(source, tmp_path / "out", balanced=True, max_images=1)
    assert "add --max-images=N" in refused(source, tmp_path / "out", balanced=True)
    write(source, {"dataset.json": {"labels": [["a.png", [0.5]]]}})
    assert "labels that are vectors" in refused(source, tmp_path / "out", balanced=True, max_images=1)


@pytest.mark.parametrize("options", [{"shards": 3}, {"shard_size": 12_000}])
def test_shards_are_one_data_set(folder, tmp_path, options):
    convert(folder, tmp_path / "set.zip", resolution=(16, 16), **options)
    shards = sorted(tmp_path.glob("set-*.zip"))
    assert len(shards) >= 3 and not (tmp_path / "set.zip").exists()
    assert all(shard.stat().st_size <= options.get("shard_size", 1 << 20) for shard in shards)
    images, classes = expected(folder)
    for place in (tmp_path / "set.zip", tmp_path / "set-*.zip"):
        dataset = ImageFolderDataset(place)
        assert np.array_equal(pixels(dataset), images) and labels(dataset) == classes


def test_what_is_left_out_leaves_a_gap_in_the_numbers(tmp_path):
    sizes = [(64, 64), (20, 64), (64, 64), (64, 20), (80, 70)]
    source = write(tmp_path / "source", {f"{i}.png": png(noise(h, w, 3)) for i, (w, h) in enumerate(sizes)})
    steps, dataset = convert(source, tmp_path / "out", resolution=(64, 32), transform="center-crop-wide")
    assert sum(step.num_images - step.num_written - len(step.unreadable) for step in steps) == 2
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert names == [f"img{i:08d}.png" for i in (0, 2, 4)]
    assert dataset.resolution == 64


def test_an_empty_shard_does_no_harm(tmp_path):
    sizes = [64, 64, 20, 20, 64, 64]
    files = {f"{i}.png": png(noise(size, size, 3)) for i, size in enumerate(sizes)}
    labelled = {"labels": [[name, i] for i, name in enumerate(files)]}
    source = write(tmp_path / "source", {**files, "dataset.json": labelled})
    options = {"resolution": (64, 64), "transform": "center-crop-wide", "shards": 3}
    DatasetConversion(ConvertOptions(source=source, dest=tmp_path / "set.zip", **options))
    list(DatasetConversion(ConvertOptions(source=source, dest=tmp_path / "set.zip", **options)))
    assert labels(ImageFolderDataset(tmp_path / "set.zip")) == [0, 1, 4, 5]


# Files that cannot be read.


def test_unreadable_files_are_listed_with_their_reason_or_stop_it_all(folder, tmp_path):
    write(folder, {"a/empty.png": b"", "b/text.jpg": b"text", "c/cut.png": png(noise(64, 64, 3))[:3000]})
    message = refused(folder, tmp_path / "out.zip", resolution=(16, 16))
    assert "a/empty.png cannot be read: the file is empty; --on-error=skip leaves such files out" in message
    steps, dataset = convert(folder, tmp_path / "out.zip", resolution=(16, 16), on_error="skip")
    listed = [line for step in steps for line in step.unreadable]
    reasons = {"a/empty.png": "the file is empty", "b/text.jpg": "it is not a BMP, GIF", "c/cut.png": "image file is"}
    for line, (name, reason) in zip(listed, reasons.items(), strict=True):
        assert line.startswith(f"{folder}: {name} cannot be read: {reason}")
    images, classes = expected_without(folder, ["empty", "text", "cut"])
    assert np.array_equal(pixels(dataset), images) and labels(dataset) == classes


def expected_without(folder, names):
    for name in names:
        for path in folder.rglob(f"{name}.*"):
            path.unlink()
    return expected(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_entry_of_a_zip(folder, tmp_path, workers):
    _, dataset = convert(folder, tmp_path / "whole.zip", resolution=(16, 16))
    data = bytearray((tmp_path / "whole.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.zip") as file:
        name = file.namelist()[30]
        data[file.getinfo(name).header_offset + 30 + len(name) + 60] ^= 255
    (tmp_path / "bad.zip").write_bytes(data)
    message = refused(tmp_path / "bad.zip", tmp_path / "out.zip", workers=workers)
    assert message.startswith(f"{tmp_path / 'bad.zip'}: {name} cannot be read: ")
    steps, found = convert(tmp_path / "bad.zip", tmp_path / "out.zip", workers=workers, on_error="skip")
    assert len(found) == len(dataset) - 1 and sum(len(step.unreadable) for step in steps) == 1


def test_a_small_file_with_an_absurd_size(tmp_path):
    bomb = bytearray(png(noise(8, 8)))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    source = write(tmp_path / "source", {"a.png": png(noise(8, 8)), "b.png": bytes(bomb)})
    message = refused(source, tmp_path / "out.zip")
    assert "b.png cannot be read" in message and "10000000000 pixels" in message


def test_nothing_that_can_be_read(tmp_path):
    source = write(tmp_path / "source", {"a.png": b"text", "b.png": b""})
    assert "none of the 2 images can be used; " in refused(source, tmp_path / "out.zip", on_error="skip")
    source = write(tmp_path / "small", {"a.png": png(noise(8, 8))})
    message = refused(source, tmp_path / "out", resolution=(64, 64), transform="center-crop-wide")
    assert "all 1 images are smaller than --resolution=64x64" in message


# Sizes.


def test_mixed_sizes_are_refused_with_the_files_and_what_to_do(tmp_path):
    files = {f"{i}.png": png(noise(8, 8, 3)) for i in range(5)}
    source = write(tmp_path / "source", {**files, "3.png": png(noise(16, 32, 3))})
    for dest in ("out.zip", "out", "new/out"):
        message = refused(source, tmp_path / dest)
        assert "3.png is 32x16, but " in message and "0.png is 8x8; " in message
        assert "--resolution=8x8, with --transform=center-crop" in message
    assert "3.png is 32x16" in refused(source, tmp_path / "out.zip", on_error="skip")


@pytest.mark.parametrize(("size", "told"), [((40, 60), "not square"), ((28, 28), "not a power of two")])
def test_sizes_that_cannot_be_trained_on(tmp_path, size, told):
    source = write(tmp_path / "source", {"a.png": png(noise(*size, 3))})
    message = refused(source, tmp_path / "out.zip")
    assert f"a.png is {size[1]}x{size[0]}, which is {told}; add --resolution=" in message


# Places.


def test_the_destination_may_not_lie_in_the_source(folder):
    for dest in (folder, folder / "out", folder / "a/out.zip", folder / "../source/out"):
        assert "lies inside of --source=" in refused(folder, dest, resolution=(16, 16))
    archive_path = folder.parent / "same.zip"
    convert(folder, archive_path, resolution=(16, 16))
    assert "lies inside of" in refused(archive_path, archive_path, overwrite=True)


def test_what_is_there_is_not_written_over(folder, tmp_path):
    write(tmp_path / "full", {"notes.txt": b"x"})
    assert "is not empty, it has notes.txt" in refused(folder, tmp_path / "full", resolution=(16, 16), overwrite=True)
    old = write(tmp_path, {"old.zip": b"x"}) / "old.zip"
    assert "exists already; choose another --dest, or add --overwrite" in refused(folder, old, resolution=(16, 16))
    assert old.read_bytes() == b"x"
    _, dataset = convert(folder, old, resolution=(16, 16), overwrite=True)
    assert len(dataset) == 40
    (tmp_path / "folder.zip").mkdir()
    assert "is a folder" in refused(folder, tmp_path / "folder.zip", resolution=(16, 16), overwrite=True)
    (tmp_path / "empty").mkdir()
    assert len(convert(folder, tmp_path / "empty", resolution=(16, 16))[1]) == 40


def test_shards_replace_all_older_shards_or_none(folder, tmp_path):
    convert(folder, tmp_path / "set.zip", resolution=(16, 16), shards=5)
    before = {path: path.read_bytes() for path in tmp_path.glob("set-*.zip")}
    assert "set-00000.zip exists already" in refused(folder, tmp_path / "set.zip", resolution=(16, 16), shards=2)
    write(folder, {"a/99.png": b"text"})
    refused(folder, tmp_path / "set.zip", resolution=(16, 16), shards=2, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("set-*.zip")} == before
    (folder / "a/99.png").unlink()
    convert(folder, tmp_path / "set.zip", resolution=(16, 16), shards=2, overwrite=True)
    assert [path.name for path in sorted(tmp_path.glob("set-*"))] == ["set-00000.zip", "set-00001.zip"]
    message = refused(tmp_path / "set-*.zip", tmp_path / "set.zip", shards=3, overwrite=True)
    assert "set-00000.zip is part of --source" in message


def test_places_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be made" in refused(folder, tmp_path / "file/out.zip", resolution=(16, 16))
    assert "is a folder, but shards are ZIP files" in refused(folder, tmp_path / "out", resolution=(16, 16), shards=2)
    assert "give one of them" in refused(folder, tmp_path / "o.zip", resolution=(16, 16), shards=2, shard_size=9)
    assert "neither a ZIP file nor a folder" in refused(folder, tmp_path / "out.tar", resolution=(16, 16))
    assert "neither a ZIP file nor a folder" in refused(folder, tmp_path / "out.JPG", resolution=(16, 16))


def test_a_disk_that_is_too_small_is_known_before_the_work_begins(folder, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6, 0))
    message = refused(folder, tmp_path / "out.zip", resolution=(16, 16))
    assert "are free there" in message and "No space left on device" in message
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 0))  # of some network file systems
    convert(folder, tmp_path / "out.zip", resolution=(16, 16))


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"workers": 2}])
def test_a_disk_that_fills_up(folder, tmp_path, monkeypatch, options):
    class Full(zipfile.ZipFile):
        def writestr(self, entry, data):
            if entry.filename.endswith("20.png"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().writestr(entry, data)

    monkeypatch.setattr(archive.zipfile, "ZipFile", Full)
    message = refused(folder, tmp_path / "new/out.zip", resolution=(16, 16), **options)
    assert "cannot be written: No space left on device" in message


# Ends before its time.


def test_a_killed_worker_is_said_so_and_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.conversion.convert._MAX_CHUNK", 1)  # so that most of the work is still to be done
    conversion = DatasetConversion(
        ConvertOptions(source=folder, dest=tmp_path / "out.zip", resolution=(16, 16), workers=2)
    )
    with pytest.raises(ConfigError, match=r"a worker process was killed.*try --workers=1"):
        for _ in conversion:
            for worker in multiprocessing.active_children():
                worker.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_an_abandoned_conversion_leaves_nothing(folder, tmp_path, dest):
    steps = iter(DatasetConversion(ConvertOptions(source=folder, dest=tmp_path / dest, resolution=(16, 16))))
    next(steps)
    steps.close()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_skip_existing_goes_on_with_the_shards_that_are_missing(folder, tmp_path):
    options = {"resolution": (16, 16), "shards": 4, "skip_existing": True}
    convert(folder, tmp_path / "whole.zip", **options)
    steps = iter(DatasetConversion(ConvertOptions(source=folder, dest=tmp_path / "set.zip", **options)))
    while not (tmp_path / "set-00001.zip").exists():
        next(steps)
    steps.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert "set-00002.zip" not in names and not any(name.endswith(".tmp") for name in names)
    with pytest.raises(ConfigError, match="there are 2 of 4 shards"):
        ImageFolderDataset(tmp_path / "set.zip")
    left = tmp_path / ".set-00002.zip.0123456789ab.tmp"  # of a process that was killed
    left.write_bytes(b"half")
    conversion = DatasetConversion(ConvertOptions(source=folder, dest=tmp_path / "set.zip", **options))
    assert [part.number for part in conversion.parts] == [2, 3] and conversion.num_kept == 2
    list(conversion)
    for number in range(4):
        name = f"-{number:05d}.zip"
        assert (tmp_path / f"set{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    assert (
        not left.exists()
        and not DatasetConversion(ConvertOptions(source=folder, dest=tmp_path / "set.zip", **options)).parts
    )


def test_a_conversion_that_continues_with_another_pillow_says_so(folder, tmp_path, monkeypatch):
    options = ConvertOptions(source=folder, dest=tmp_path / "d.zip", resolution=(16, 16), shards=2, skip_existing=True)
    with monkeypatch.context() as patched:
        patched.setattr(PIL, "__version__", "10.4.0")
        list(DatasetConversion(options))
    with zipfile.ZipFile(tmp_path / "d-00000.zip") as file:
        assert json.loads(file.read("dataset.json"))["made_with"] == {"pillow": "10.4.0"}
    complete = DatasetConversion(options)
    assert list(complete) == [] and complete.notes() == []
    (tmp_path / "d-00001.zip").unlink()
    again = DatasetConversion(options)
    list(again)
    (note,) = again.notes()
    assert f"d-00000.zip was made with pillow 10.4.0, and this is pillow {PIL.__version__}" in note


def test_skip_existing_refuses_what_was_made_otherwise(folder, tmp_path):
    options = {"resolution": (16, 16), "skip_existing": True}
    convert(folder, tmp_path / "set.zip", **options)
    old = (tmp_path / "set.zip").read_bytes()
    other = {**options, "resolution": (8, 8)}
    assert "made from another source or with other options" in refused(folder, tmp_path / "set.zip", **other)
    assert (tmp_path / "set.zip").read_bytes() == old
    convert(folder, tmp_path / "set.zip", **other, overwrite=True)
    convert(folder, tmp_path / "plain.zip", resolution=(16, 16))
    assert "does not say what it was made from" in refused(folder, tmp_path / "plain.zip", **options)
    convert(folder, tmp_path / "set.zip", shards=3, **options)
    assert "of a data set of more shards" in refused(folder, tmp_path / "set.zip", shards=2, **options)


def test_transparent_images_are_counted_and_put_on_a_background_or_kept(tmp_path):
    pixels = noise(8, 8, 4)
    pixels[:, :, 3] = 255
    opaque = png(pixels)
    pixels[:4, :, 3] = 0
    source = write(tmp_path / "images", {"0.png": opaque, "1.png": png(pixels), "2.png": png(pixels[:, :, 2:])})

    def converted(name, **options):
        conversion = DatasetConversion(ConvertOptions(source=source, dest=tmp_path / name, **options))
        assert sum(step.num_written for step in conversion) == 3
        (note,) = conversion.notes()
        assert note.startswith("2 of the images have transparent pixels")
        return note, [image for image, _ in ImageFolderDataset(tmp_path / name)]

    note, dropped = converted("a.zip")
    assert "--background=white" in note and np.array_equal(dropped[1], pixels[:, :, :3].transpose(2, 0, 1))
    note, white = converted("b.zip", background="white")
    assert "now on white" in note and (white[1][:, :4] == 255).all()
    assert np.array_equal(white[1][:, 4:], dropped[1][:, 4:]) and np.array_equal(white[0], dropped[0])
    note, kept = converted("c.zip", background="none")
    assert "kept" in note and np.array_equal(kept[1], pixels.transpose(2, 0, 1))
    assert kept[0].shape == (4, 8, 8) and (kept[0][3] == 255).all()
    small = converted("d.zip", background="none", resolution=(4, 4), transform="center-crop")[1]
    assert small[2].shape == (4, 4, 4) and small[2][3, 0].max() < 64
    assert "--background=mauvish is not a color" in refused(source, tmp_path / "e.zip", background="mauvish")


def test_dark_images_with_sixteen_bits_get_a_note_and_a_range(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    source = write(tmp_path / "images", {"0.png": png(values), "1.png": png(noise(8, 8))})
    conversion = DatasetConversion(ConvertOptions(source=source, dest=tmp_path / "a.zip"))
    list(conversion)
    assert conversion.notes() == [
        "1 of the images have 16 bits, but no value above 4095 of 65535, and come out dark; --range=0,4095 makes that"
        " value white"
    ]
    ranged = DatasetConversion(ConvertOptions(source=source, dest=tmp_path / "b.zip", value_range=(0, 4095)))
    list(ranged)
    assert ranged.notes() == []
    assert np.array_equal(ImageFolderDataset(tmp_path / "b.zip")[0][0][0], np.round(values / 4095 * 255))
    assert "--range=9,3 must begin with the smaller" in refused(source, tmp_path / "c.zip", value_range=(9, 3))
