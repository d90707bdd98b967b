"""Images in one array: what is read from .npz and .npy files, and what is refused."""

import pickle
import zipfile

import numpy as np
import pytest

from dnnlib.errors import ConfigError
from training.dataset.image_set import ImageSet
from training.dataset.sample_array import SampleArray

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def saved(path, array, *, compressed=False, **more):
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        (np.savez_compressed if compressed else np.savez)(path, array, **more)
    return path


@pytest.mark.parametrize(("name", "compressed"), [("a.npz", False), ("a.npz", True), ("a.npy", False)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_in_an_array_are_those_that_were_saved(tmp_path, name, compressed, order):
    path = saved(tmp_path / name, np.asarray(PIXELS, order=order), compressed=compressed)
    array = pickle.loads(pickle.dumps(SampleArray(path)))  # as a worker gets it
    assert np.array_equal(array.pixels, PIXELS)
    images = ImageSet(path)
    assert len(images) == 5 and images.names[3] == f"{name}[3]"
    assert all(np.array_equal(images[i].numpy(), PIXELS[i].transpose(2, 0, 1)) for i in range(5))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PIXELS.astype(np.float32), "holds float32 [5, 4, 6, 3]; images are uint8 [N, H, W, 3]"),
        (PIXELS.transpose(0, 3, 1, 2), "holds uint8 [5, 3, 4, 6]"),
        (PIXELS[0], "holds uint8 [4, 6, 3]"),
        (PIXELS[:0], "holds uint8 [0, 4, 6, 3]"),
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_other_arrays_are_refused_with_their_shape(tmp_path, name, array, words):
    with pytest.raises(ConfigError) as caught:
        SampleArray(saved(tmp_path / name, array))
    assert words in str(caught.value)


def refused(path):
    with pytest.raises(ConfigError) as caught:
        SampleArray(path)
    return str(caught.value)


def test_files_without_images_are_refused(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert "holds the arrays mu, sigma; give statistics by --ref" in refused(tmp_path / "stats.npz")
    np.savez(tmp_path / "other.npz", samples=PIXELS)
    assert "holds the arrays samples; images are in an array arr_0" in refused(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    assert "arr_0.npy is damaged, or not an array of numbers" in refused(tmp_path / "objects.npz")
    (tmp_path / "text.npz").write_text("text")
    assert "text.npz is not a readable ZIP file" in refused(tmp_path / "text.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_files_cut_short_are_refused(tmp_path, name):
    path = saved(tmp_path / name, PIXELS)
    path.write_bytes(path.read_bytes()[:200])
    assert "is not a readable" in refused(path)


def test_a_header_that_claims_too_much_costs_no_memory(tmp_path):
    path = saved(tmp_path / "a.npz", PIXELS)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy").replace(b"(5, 4, 6, 3), }", b"(5000000000, 4, 6, 3), }")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data)
    assert "arr_0.npy is damaged" in refused(path)
