"""Images to be measured: where they may come from, which are chosen, and what is refused."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.dataset.image_set import ImageSet, ImageSetBatches, choose_images

NAMES = ["000000/a.png", "000000/b.png", "001000/c.png", "d.png", "e.bmp"]


def pixels(index, shape=(6, 9, 3)):
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, name="a.png"):
    data = io.BytesIO()
    PIL.Image.fromarray(array).save(data, format=name.rpartition(".")[2])
    return data.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def image_files(shape=(6, 9, 3)):
    return {name: encoded(pixels(i, shape), name) for i, name in enumerate(NAMES)} | {"notes.txt": b"not an image"}


@pytest.mark.parametrize("place", ["folder", "set.zip"])
@pytest.mark.parametrize("shape", [(6, 9, 3), (5, 5)])
def test_images_of_any_size_from_folders_within_folders_and_zip_files(tmp_path, place, shape):
    found = ImageSet(write(tmp_path / place, image_files(shape)))
    assert len(found) == 5
    for i in range(5):
        expected = np.atleast_3d(pixels(i, shape)).transpose(2, 0, 1)
        assert found[i].dtype == torch.uint8 and np.array_equal(found[i].numpy(), expected)


def test_latents_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"z\.npy holds latents, and metrics compare images"):
        ImageSet(write(tmp_path / "folder", {**image_files(), "z.npy": b""}))


def test_places_without_images_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        ImageSet(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no images; it has 1 other files"):
        ImageSet(write(tmp_path / "other", {"notes.txt": b""}))


def read_all(found, batch=2, workers=0, choice=None):
    choice = np.arange(len(found)) if choice is None else choice
    return list(ImageSetBatches(found, choice, batch=batch, workers=workers, world=World()))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_and_modes_are_read_one_by_one(tmp_path, workers):
    odd = {"d.png": pixels(7, (9, 6)), "c.png": pixels(8, (4, 4, 4)), "f.png": pixels(9, (4, 4, 2))}
    files = {"0.png": encoded(pixels(0)), **{name: encoded(array) for name, array in odd.items()}}
    palette = PIL.Image.fromarray(pixels(3)).quantize(8)
    data = io.BytesIO()
    palette.save(data, "PNG")
    found = ImageSet(write(tmp_path / "set.zip", {**files, "p.png": data.getvalue()}))
    (batch,) = read_all(found, batch=8, workers=workers)
    read = dict(zip(found.names, batch.images, strict=True))
    assert isinstance(batch.images, list)
    assert {name: tuple(image.shape) for name, image in read.items()} == {
        "0.png": (3, 6, 9),
        "c.png": (4, 4, 4),
        "d.png": (1, 9, 6),
        "f.png": (2, 4, 4),
        "p.png": (3, 6, 9),
    }
    for name, array in odd.items():
        assert np.array_equal(read[name], np.atleast_3d(array).transpose(2, 0, 1))
    assert np.array_equal(read["p.png"], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_refused_in_one_line_that_names_the_file(tmp_path, workers):
    found = ImageSet(write(tmp_path / "set.zip", {**image_files(), "d.png": encoded(pixels(0))[:60]}))
    with pytest.raises(ConfigError, match=r"^\S+set.zip: d.png cannot be read: ") as caught:
        read_all(found, workers=workers)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_choice_is_random_disjoint_and_the_seed_determines_it(tmp_path):
    found = ImageSet(write(tmp_path / "folder", {f"{i:03d}.png": encoded(pixels(i, (2, 2))) for i in range(40)}))
    parts = choose_images(found, 12, seed=1, repeat=3)
    assert [len(part) for part in parts] == [12, 12, 12] and len(set(np.concatenate(parts).tolist())) == 36
    assert np.array_equal(parts[0], choose_images(found, 12, seed=1)[0])
    assert not np.array_equal(parts[0], choose_images(found, 12, seed=2)[0])
    assert parts[0].tolist() != sorted(parts[0].tolist())
    assert sorted(choose_images(found, 40, seed=0)[0].tolist()) == list(range(40))


def test_too_few_images_are_an_error_unless_fewer_are_allowed(tmp_path):
    found = ImageSet(write(tmp_path / "folder", image_files()))
    with pytest.raises(ConfigError, match=r"holds 5 images and 6 are asked for; .*--allow-fewer"):
        choose_images(found, 6, seed=0)
    with pytest.raises(ConfigError, match="holds 5 images and 3 times 2 are asked for"):
        choose_images(found, 2, seed=0, repeat=3)
    assert [len(part) for part in choose_images(found, 50000, seed=0, allow_fewer=True)] == [5]
    assert [len(part) for part in choose_images(found, 50000, seed=0, repeat=2, allow_fewer=True)] == [2, 2]
    with pytest.raises(ConfigError, match="3 x 1 images"):
        choose_images(found, 50000, seed=0, repeat=3, allow_fewer=True)


def test_batches_of_all_processes_are_the_choice(tmp_path):
    found = ImageSet(write(tmp_path / "folder", image_files()))
    choice = np.array([3, 0, 4, 1])
    for size in (1, 2, 3):
        images = {}
        for rank in range(size):
            world = World(rank=rank, size=size)
            batches = ImageSetBatches(found, choice, batch=2, workers=0, world=world)
            assert len(batches) == len(list(batches))
            for batch in batches:
                assert len(batch.images) <= 2
                images |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        assert sorted(images) == [0, 1, 2, 3]
        assert all(torch.equal(images[position], found[int(index)]) for position, index in enumerate(choice))


def test_reading_draws_from_no_global_generator(tmp_path):
    found = ImageSet(write(tmp_path / "folder", image_files()))
    before = torch.get_rng_state()
    read_all(found)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_give_the_same_images(tmp_path):
    found = ImageSet(write(tmp_path / "set.zip", image_files()))
    alone, spawned = read_all(found), read_all(found, workers=1)
    assert os.environ.get("OMP_NUM_THREADS") and len(alone) == len(spawned) == 3
    for a, b in zip(alone, spawned, strict=True):
        assert torch.equal(a.images, b.images) and np.array_equal(a.indices, b.indices)
