"""ImageFolderDataset: what it reads, in which order, and what it says about data that cannot be trained on."""

import io
import json
import pickle
import threading
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.errors import ConfigError
from training.dataset import ImageFolderDataset

RNG = np.random.default_rng(1)


def png(pixels):
    """Encode uint8 [H, W] or [H, W, C]."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path, files):
    """Write {name: bytes or JSON value} to a ZIP if `path` ends so, to a folder otherwise."""
    files = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def refused(path, **options):
    """The one line that opening `path` and reading everything ends with."""
    with pytest.raises(ConfigError) as caught:
        dataset = ImageFolderDataset(path, **options)
        for i in range(len(dataset)):
            dataset[i]
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message or options
    return message


@pytest.fixture
def colors():
    return [noise(8, 8, 3) for _ in range(12)]


@pytest.fixture
def archive(tmp_path, colors):
    """Twelve color images in two folders, stored in descending order, labels 0, 1, 2 and 4."""
    names = [f"{i // 6:05d}/img{i:08d}.png" for i in range(12)]
    labels = [[name, [0, 1, 2, 4][i % 4]] for i, name in enumerate(names)]
    files = {name: png(pixels) for name, pixels in list(zip(names, colors, strict=True))[::-1]}
    return write(tmp_path / "colors.zip", {**files, "dataset.json": {"labels": labels}})


def test_folder_and_zip_give_the_same_items_in_sorted_order(archive, tmp_path, colors):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder")
    for path in (archive, tmp_path / "folder"):
        dataset = ImageFolderDataset(path, resolution=8)
        assert len(dataset) == 12
        assert (dataset.name, dataset.image_shape) == (path.stem, (3, 8, 8))
        assert (dataset.num_channels, dataset.resolution) == (3, 8)
        for i, pixels in enumerate(colors):
            image, label = dataset[i]
            assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
            assert np.array_equal(image, pixels.transpose(2, 0, 1))
            assert label.dtype == np.float32 and label.tolist() == np.eye(5)[[0, 1, 2, 4][i % 4]].tolist()
        dataset.close()


def test_class_indices_become_one_hot_vectors_as_wide_as_the_largest_of_all(archive):
    dataset = ImageFolderDataset(archive, max_size=1)
    assert (dataset.label_dim, dataset.label_shape, dataset.has_labels) == (5, [5], True)
    assert dataset.has_onehot_labels
    details = dataset.get_details(0)
    assert details.raw_label.dtype == np.int64 and dataset.get_label(0).argmax() == details.raw_label


def test_vector_labels_come_as_they_are(tmp_path):
    files = {f"{i}.png": png(noise(4, 4)) for i in range(3)}
    labels = [["0.png", [0.5, 1]], ["1.png", [2, 3]], ["2.png", [-1, 0]]]
    dataset = ImageFolderDataset(write(tmp_path / "d", {**files, "dataset.json": {"labels": labels}}))
    assert (dataset.label_dim, dataset.has_labels, dataset.has_onehot_labels) == (2, True, False)
    assert [dataset.get_label(i).tolist() for i in range(3)] == [[0.5, 1], [2, 3], [-1, 0]]


@pytest.mark.parametrize("extra", [{}, {"dataset.json": {"labels": None}}])
def test_without_labels_the_label_is_empty(tmp_path, extra):
    dataset = ImageFolderDataset(write(tmp_path / "d.zip", {"a.png": png(noise(4, 4)), **extra}))
    assert (dataset.label_dim, dataset.has_labels, dataset.has_onehot_labels) == (0, False, False)
    assert dataset[0][1].shape == (0,) and dataset[0][1].dtype == np.float32


def test_labels_can_be_left_unread(archive):
    assert not ImageFolderDataset(archive, use_labels=False).has_labels


@pytest.mark.parametrize(("axes", "channels"), [((), 1), ((2,), 2), ((3,), 3), ((4,), 4)])
def test_channels_are_those_of_the_file(tmp_path, axes, channels):
    pixels = noise(4, 4, *axes)
    dataset = ImageFolderDataset(write(tmp_path / "d", {"a.png": png(pixels)}))
    assert dataset.num_channels == channels
    assert np.array_equal(dataset[0][0], pixels.reshape(4, 4, channels).transpose(2, 0, 1))


def test_raw_latents_are_float32_as_stored(tmp_path):
    latents = RNG.standard_normal((8, 4, 4)).astype(np.float32)
    dataset = ImageFolderDataset(write(tmp_path / "d.zip", {"00000/img-mean-std-00000000.npy": npy(latents)}))
    assert (dataset.num_channels, dataset.resolution) == (8, 4)
    assert dataset[0][0].dtype == np.float32 and np.array_equal(dataset[0][0], latents)


def test_max_size_keeps_the_published_choice(archive):
    dataset = ImageFolderDataset(archive, max_size=5, random_seed=2**31 + 3)
    # np.random.RandomState(3) shuffles 0..11 to 5, 4, 1, 2, 11, ...
    assert [dataset.get_details(i).raw_idx for i in range(len(dataset))] == [1, 2, 4, 5, 11]
    assert len(ImageFolderDataset(archive, max_size=100)) == 12


def test_mirrored_copies_follow_all_images(archive):
    plain, both = ImageFolderDataset(archive, max_size=4), ImageFolderDataset(archive, max_size=4, xflip=True)
    assert len(both) == 8
    for i in range(4):
        assert np.array_equal(both[i][0], plain[i][0])
        assert np.array_equal(both[4 + i][0], plain[i][0][:, :, ::-1])
        assert np.array_equal(both[4 + i][1], plain[i][1])
        assert [both.get_details(j).xflip for j in (i, 4 + i)] == [False, True]
        assert both.get_details(i).raw_idx == both.get_details(4 + i).raw_idx


@pytest.mark.parametrize("cache", [False, True])
def test_an_item_is_the_callers_own(archive, cache):
    dataset = ImageFolderDataset(archive, cache=cache)
    first = dataset[0][0].copy()
    dataset[0][0][:] = 0
    assert np.array_equal(dataset[0][0], first)


def test_a_cached_data_set_reads_each_file_once(tmp_path):
    path = write(tmp_path / "d", {"a.png": png(noise(4, 4))})
    dataset = ImageFolderDataset(path, cache=True, xflip=True)
    image = dataset[0][0]
    (path / "a.png").unlink()
    assert np.array_equal(dataset[1][0], image[:, :, ::-1])


def test_opening_decodes_no_pixels(archive, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PIL.Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    dataset = ImageFolderDataset(archive)
    assert (dataset.resolution, dataset.num_channels, dataset.label_dim) == (8, 3, 5)
    dataset.get_label(3)


def test_pickles_leave_the_open_file_and_the_cache_behind(archive):
    dataset = ImageFolderDataset(archive, cache=True)
    dataset[0]
    before = len(pickle.dumps(ImageFolderDataset(archive, cache=True)))
    data = pickle.dumps(dataset)
    assert len(data) == before
    assert np.array_equal(pickle.loads(data)[3][0], dataset[3][0])


def test_a_closed_data_set_opens_again(archive):
    dataset = ImageFolderDataset(archive)
    first = dataset[0][0]
    dataset.close()
    assert np.array_equal(dataset[0][0], first)
    dataset.close()


@pytest.mark.parametrize("context", sorted({"fork", "spawn"} & set(torch.multiprocessing.get_all_start_methods())))
def test_workers_read_what_the_main_process_reads(archive, context):
    dataset = ImageFolderDataset(archive)
    expected = np.stack([dataset[i][0] for i in range(12)])  # the file is open when workers start
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=context)
    images = torch.cat([batch for batch, _ in loader])
    assert np.array_equal(images.numpy(), expected)


def test_threads_read_what_one_reads(archive):
    dataset = ImageFolderDataset(archive)
    expected = [dataset[i][0] for i in range(12)]
    dataset.close()
    wrong = []

    def read():
        for i in list(range(12)) * 20:
            if not np.array_equal(dataset[i][0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_previews_and_hidden_files_are_no_images(tmp_path):
    files = {"a.png": png(noise(4, 4)), "__MACOSX/._a.png": b"resource fork", ".thumbs/a.png": b"?", "notes.txt": b"x"}
    assert len(ImageFolderDataset(write(tmp_path / "d.zip", files))) == 1


def test_places_that_hold_no_data_set(tmp_path):
    assert "does not exist" in refused(tmp_path / "missing.zip")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(tmp_path / "empty")
    assert "no images" in refused(write(tmp_path / "text.zip", {"readme.txt": b"hello"}))
    (tmp_path / "fake.zip").write_bytes(b"this is not an archive")
    assert "ZIP" in refused(tmp_path / "fake.zip")


def test_a_truncated_zip(archive, tmp_path):
    data = archive.read_bytes()
    (tmp_path / "half.zip").write_bytes(data[: len(data) // 2])
    assert "ZIP" in refused(tmp_path / "half.zip")


def test_a_zip_with_a_damaged_entry(archive, tmp_path):
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        name = "00001/img00000007.png"
        data[file.getinfo(name).header_offset + 30 + len(name) + 60] ^= 255
    (tmp_path / "bad.zip").write_bytes(data)
    assert name in refused(tmp_path / "bad.zip")


def test_images_that_cannot_be_decoded(tmp_path):
    whole = png(noise(64, 64))
    assert "a.png is not a readable image" in refused(write(tmp_path / "text", {"a.png": b"text"}))
    assert "b.png is damaged" in refused(write(tmp_path / "cut", {"a.png": whole, "b.png": whole[:2000]}))
    assert "a.png is damaged" in refused(write(tmp_path / "cut-first.zip", {"a.png": whole[:2000]}))


def test_images_that_differ_from_the_first(tmp_path):
    first = png(noise(8, 8, 3))
    sizes = refused(write(tmp_path / "sizes", {"a.png": first, "b.png": png(noise(16, 16, 3))}))
    assert "b.png is 16x16 with 3 channels" in sizes and "a.png, is 8x8" in sizes
    assert "1 channel," in refused(write(tmp_path / "gray", {"a.png": first, "b.png": png(noise(8, 8))}))
    assert "mixes" in refused(write(tmp_path / "kinds", {"a.png": first, "b.npy": npy(np.zeros((8, 4, 4)))}))


def test_an_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    bomb = bytearray(png(noise(8, 8)))
    bomb[16:24] = (12000).to_bytes(4, "big") * 2  # width and height in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    path = write(tmp_path / "bomb", {"a.png": png(noise(8, 8)), "b.png": bytes(bomb)})
    with pytest.warns(PIL.Image.DecompressionBombWarning):
        assert "b.png is not a readable image: its header claims 12000x12000" in refused(path)


def test_shapes_and_pixels_that_no_network_takes(tmp_path, archive):
    assert "6x4" in refused(write(tmp_path / "wide", {"a.png": png(noise(4, 6))}))
    assert "8x8, not 16x16" in refused(archive, resolution=16)
    buffer = io.BytesIO()
    PIL.Image.new("P", (4, 4)).save(buffer, "png")
    assert "kind P" in refused(write(tmp_path / "palette", {"a.png": buffer.getvalue()}))
    assert "float64" in refused(write(tmp_path / "double", {"a.npy": npy(np.zeros((8, 4, 4)))}))
    assert "float32" in refused(write(tmp_path / "flat", {"a.npy": npy(np.zeros(8, dtype=np.float32))}))
    assert ".npy" in refused(write(tmp_path / "text", {"a.npy": b"text"}))
    cut = npy(np.zeros((8, 4, 4), dtype=np.float32))[:-5]
    assert "a.npy is damaged" in refused(write(tmp_path / "cut", {"a.npy": cut}))
    assert "max_size=0" in refused(archive, max_size=0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{labels", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([["a.png", 0]], "must read"),
        ({"labels": 3}, "must read"),
        ({"labels": ["a.png"]}, "pairs"),
        ({"labels": [["a.png", 0]]}, "no label for 1 of 2 images, first b.png"),
        ({"labels": [["a.png", 0], ["b.png", [1.0]]]}, "mixes kinds"),
        ({"labels": [["a.png", [1, 2]], ["b.png", [1.0]]]}, "mixes kinds"),
        ({"labels": [["a.png", 0], ["b.png", -1]]}, "no label for 1 of 2 images, first b.png"),
        ({"labels": [["a.png", 0], ["b.png", 1.5]]}, "b.png is 1.5"),
        ({"labels": [["a.png", 0], ["b.png", True]]}, "b.png is true"),
        ({"labels": [["a.png", 0], ["b.png", None]]}, "no label for 1 of 2 images, first b.png"),
        ({"labels": [["a.png", "cat"], ["b.png", " "]]}, 'b.png is " "'),
        ({"labels": [["a.png", "cat"], ["b.png", 1]]}, "mixes kinds of labels: a class index for b.png, a class name"),
        ({"classes": ["dog"], "labels": [["a.png", "dog"], ["b.png", "cat"]]}, 'b.png is "cat", which is not one of'),
        ({"classes": "dog", "labels": [["a.png", "dog"], ["b.png", "cat"]]}, '"classes" that is not a list'),
        ({"label": [["a.png", 0], ["b.png", 1]]}, 'the key "label" and no "labels"; it must read {"labels": [['),
        ({}, "no keys and no"),
        ({"labels": [["a.png", 0], ["b.png", 1], ["./a.png", 1]]}, "gives a.png two labels, 0 and 1"),
        (b'{"a.png": 0, "b.png": 1, "a.png": 1}', '"a.png" stands there twice, with the values 0 and 1'),
        ({"a.png": 0}, "no label for 1 of 2 images, first b.png"),
        ({"labels": [["a.png", 10**30], ["b.png", 0]]}, "a.png is 1000"),
        ({"labels": [["a.png", []], ["b.png", []]]}, "a.png is []"),
        ({"labels": [["a.png", [float("nan")]], ["b.png", [0.0]]]}, "a.png is [NaN]"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, content, told):
    pixels = png(noise(4, 4))
    path = write(tmp_path / "d", {"a.png": pixels, "b.png": pixels, "dataset.json": content})
    message = refused(path)
    assert told in message and "dataset.json" in message
    assert len(ImageFolderDataset(path, use_labels=False)) == 2
