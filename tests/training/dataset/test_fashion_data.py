"""The shipped data set is what its card says, and the script next to it makes data sets."""

import gzip
import hashlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from training.dataset import ImageFolderDataset

DATA = ROOT / "data"
FILES = {"fashion-mnist-32.zip": 600, "fashion-mnist-32-heldout.zip": 40}


@pytest.fixture(scope="module")
def images():
    found = {}
    for name in FILES:
        dataset = ImageFolderDataset(DATA / name)
        found[name] = np.stack([dataset[i][0] for i in range(len(dataset))])
        dataset.close()
    return found


@pytest.mark.parametrize(("name", "per_class"), FILES.items())
def test_images_are_gray_32x32_with_an_even_share_of_ten_classes(name, per_class):
    dataset = ImageFolderDataset(DATA / name, resolution=32)
    assert (dataset.num_channels, dataset.label_dim, dataset.has_onehot_labels) == (1, 10, True)
    labels = np.stack([dataset.get_label(i) for i in range(len(dataset))])
    assert labels.sum(axis=0).tolist() == [per_class] * 10
    dataset.close()


@pytest.mark.parametrize("name", FILES)
def test_the_border_is_black_and_the_inside_is_not(name, images):
    border = np.ones((32, 32), dtype=bool)
    border[2:-2, 2:-2] = False
    assert not images[name][..., border].any()
    assert (images[name].max(axis=(1, 2, 3)) > 100).all()


def test_no_image_occurs_in_both_sets(images):
    train, heldout = ({image.tobytes() for image in images[name]} for name in FILES)
    assert not train & heldout


def test_the_files_are_those_of_the_card_and_small():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        data = (DATA / name).read_bytes()
        row = re.search(rf"`{re.escape(name)}` \|.*", card)
        assert row and hashlib.sha256(data).hexdigest() in row[0] and f"{len(data):,}" in row[0]
    assert sum((DATA / name).stat().st_size for name in FILES) < 4_000_000


def test_the_script_keeps_pixels_and_labels_and_repeats_its_bytes(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    pixels[:20, :, 10:] = 200  # so that the row filters differ in what they achieve
    pixels[:10] = np.arange(28)[:, None] * 9
    labels = np.arange(30, dtype=np.uint8)[::-1] % 10
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))

    def make(dest, *options):
        script = [sys.executable, str(DATA / "make_fashion_mnist.py"), "--source", str(tmp_path)]
        return subprocess.run(
            [*script, "--dest", str(tmp_path / dest), *options], capture_output=True, text=True, timeout=120
        )

    assert make("a.zip", "--split", "test", "--per-class", "2").returncode == 0
    assert make("b.zip", "--split", "test", "--per-class", "2").returncode == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    dataset = ImageFolderDataset(tmp_path / "a.zip")
    assert len(dataset) == 20
    for i in range(20):  # the first two of each class are the first twenty images
        image, label = dataset[i]
        assert np.array_equal(image[0, 2:-2, 2:-2], pixels[i]) and label.argmax() == labels[i]
    dataset.close()

    assert make("c.zip", "--split", "test", "--per-class", "4").returncode != 0
    assert make("c.zip").returncode != 0  # no training files there
    assert not (tmp_path / "c.zip").exists()
