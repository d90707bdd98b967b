"""From seeds to images: reference images, independence of batches and processes, files, and what is refused."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR, Golden
from tests.helpers.sampling import collect, tiny_network
from torch_utils.distributed import World
from torch_utils.processes.dealing import split_batches
from training.images.png_files import ImageWriter, write_png
from training.images.sheet import contact_sheet
from training.networks_edm2 import Precond
from training.sampling.generation import generate_images

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
GUIDE = GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl"
CPU = {"device": "cpu"}


def identity_sampler(net, noise, labels, gnet, randn_like, **kwargs):
    """Shows what a sampler is given: the noise as the image, the class in the first pixel."""
    return (
        noise
        if labels is None
        else torch.cat([noise[..., 1:], labels.argmax(1)[:, None, None, None] / 10 + 0 * noise[..., :1]], -1)
    )


@pytest.mark.parametrize(
    ("case", "options"),
    [("plain", {}), ("class3", {"class_idx": 3}), ("auto", {"gnet": GUIDE, "guidance": "metadata"})],
)
def test_images_agree_with_reference_images(case: str, options: dict[str, Any], golden: Callable[[str], Golden]):
    tensors, metadata = golden("seed-to-image.safetensors")
    options = {key: float(metadata["guidance"]) if key == "guidance" else value for key, value in options.items()}
    seeds = json.loads(metadata["seeds"])
    images = generate_images(NET, seeds=seeds, num_steps=int(metadata["num_steps"]), max_batch_size=5, **CPU, **options)
    batches = list(images)
    assert len(images) == len(batches) == 2
    noise, labels, actual = (torch.cat([getattr(b, name) for b in batches]) for name in ("noise", "labels", "images"))
    assert torch.equal(noise, tensors["noise"])
    classes = labels.argmax(1)
    assert torch.equal(classes, torch.full_like(classes, 3) if case == "class3" else tensors["label_idx"])
    difference = (actual.int() - tensors[f"images.{case}"].int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) <= 0.03


def test_an_image_does_not_depend_on_its_batch():
    net, seeds = tiny_network(), list(range(7))
    options = {"num_steps": 4, "S_churn": 10, **CPU}
    together = collect(generate_images(net, seeds=seeds, **options)).astype(int)
    for max_batch_size in (1, 3):
        apart = collect(generate_images(net, seeds=seeds, max_batch_size=max_batch_size, **options)).astype(int)
        assert np.abs(apart - together).max() <= 1 and np.mean(apart != together) < 0.01
    alone = collect(generate_images(net, seeds=[5], **options)).astype(int)
    assert np.abs(alone[0] - together[5]).max() <= 1


def test_a_chosen_class_changes_neither_noise_nor_churn():
    churn = []

    def sampler(net, noise, labels, gnet, randn_like):
        churn.append(randn_like(noise))
        return noise

    options = {"net": tiny_network(), "seeds": [4, 5], "sampler_fn": sampler, **CPU}
    (drawn,), (chosen,) = generate_images(**options), generate_images(class_idx=1, **options)
    assert torch.equal(drawn.noise, chosen.noise)
    assert torch.equal(churn[0], churn[1])
    assert torch.equal(chosen.labels, torch.tensor([[0.0, 1.0, 0.0]] * 2))


def test_all_processes_together_make_what_one_makes():
    net, seeds = tiny_network(), list(range(100, 111))
    options = {"net": net, "seeds": seeds, "max_batch_size": 2, "sampler_fn": identity_sampler}
    alone = collect(generate_images(world=World(), **options))
    for size in (2, 3):
        shares = [generate_images(world=World(rank=rank, size=size), **options) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        merged = np.zeros_like(alone)
        seen = []
        for share in shares:
            for batch in share:
                assert batch.seeds == [seeds[i] for i in batch.indices]
                assert (batch.num_batches, len(batch.seeds) <= 2) == (len(share), True)
                merged[batch.indices] = batch.images
                seen.extend(batch.indices)
        assert sorted(seen) == list(range(len(seeds)))
        assert np.array_equal(merged, alone)


@pytest.mark.parametrize(
    ("num_images", "max_batch", "ranks"), [(10, 4, 1), (1000, 32, 8), (1, 32, 4), (7, 7, 1), (33, 1, 2)]
)
def test_batches_are_as_equal_as_can_be(num_images: int, max_batch: int, ranks: int):
    shares = [split_batches(num_images, max_batch, World(rank=rank, size=ranks)) for rank in range(ranks)]
    in_order = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert len(in_order) == math.ceil(num_images / (max_batch * ranks)) * ranks
    assert np.array_equal(np.concatenate(in_order), np.arange(num_images))
    sizes = [len(batch) for batch in in_order]
    assert max(sizes) <= max_batch and max(sizes) - min(sizes) <= 1


def test_a_process_without_images_has_an_empty_batch():
    (batch,) = generate_images(tiny_network(), seeds=[1], world=World(rank=1, size=2))
    assert (batch.images, batch.labels, batch.noise, batch.seeds, batch.num_batches) == (None, None, None, [], 1)


def test_records_are_frozen_and_a_second_loop_makes_the_same_images():
    images = generate_images(tiny_network(label_dim=0), seeds=[1, 2], num_steps=2, **CPU)
    batch = next(iter(images))
    with pytest.raises(FrozenInstanceError):
        batch.seeds = []
    assert batch.labels is None
    assert np.array_equal(collect(images), collect(images))


def test_classes_are_dealt_over_the_seeds():
    images = generate_images(tiny_network(), seeds=range(6), class_idx="all", max_batch_size=4, num_steps=1, **CPU)
    assert torch.cat([batch.labels for batch in images]).argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    one_each = generate_images(tiny_network(), seeds=range(3), class_idx=[2, 0, 1], num_steps=1, **CPU)
    assert torch.cat([batch.labels for batch in one_each]).argmax(1).tolist() == [2, 0, 1]


class FixedBatch(torch.nn.Module):
    """A network as one that is compiled for batches of one size; it takes note of the sizes."""

    fixed_batch = True

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net
        self.sizes: set[int] = set()
        self.img_channels, self.img_resolution, self.label_dim = net.img_channels, net.img_resolution, net.label_dim

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        self.sizes.add(len(x))
        return self.net(x, sigma, labels)


@pytest.mark.parametrize("class_idx", [None, [0, 1, 2, 0, 1, 2, 0]])
def test_a_network_of_one_batch_size_gets_padded_batches_and_the_same_images(class_idx: Any):
    prepared = []

    def prepare(net: Any, device: torch.device) -> FixedBatch:
        prepared.append((net, device))
        return FixedBatch(net)

    net, guide = tiny_network(), tiny_network(label_dim=0)
    options = {"net": net, "gnet": guide, "seeds": range(7), "guidance": 2, "num_steps": 3, "S_churn": 5}
    options |= {"max_batch_size": 3, "class_idx": class_idx, **CPU}  # batches of 3, 2 and 2
    plain = list(generate_images(**options))
    images = generate_images(prepare=prepare, **options)
    assert prepared == [(net, torch.device("cpu")), (guide, torch.device("cpu"))]
    for expected, actual in zip(plain, images, strict=True):
        assert torch.equal(expected.noise, actual.noise) and torch.equal(expected.labels, actual.labels)
        difference = (expected.images.int() - actual.images.int()).abs()
        assert difference.shape == expected.images.shape and difference.max() <= 1 and difference.float().mean() < 0.01
    assert images.net.sizes == images.gnet.sizes == {3}


def test_on_demand_one_process_makes_everything_in_order():
    options = {"net": tiny_network(), "seeds": range(7), "max_batch_size": 3, "num_steps": 1, **CPU}
    assert np.array_equal(collect(generate_images(on_demand=True, **options)), collect(generate_images(**options)))


def test_rectangular_images():
    images = collect(generate_images(tiny_network(resolution=(4, 6)), seeds=[0], num_steps=2, **CPU))
    assert images.shape == (1, 3, 4, 6) and images.dtype == np.uint8


@pytest.mark.parametrize(
    ("subdirs", "names"), [(False, ["000007.png", "012345.png"]), (True, ["000000/000007.png", "012000/012345.png"])]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_images_under_their_seeds(tmp_path: Path, subdirs: bool, names: list[str], channels: int):
    outdir = tmp_path / "new" / "out"
    images = generate_images(
        tiny_network(channels=channels), outdir=outdir, subdirs=subdirs, seeds=[7, 12345], num_steps=2, **CPU
    )
    expected = collect(images)
    assert sorted(path.relative_to(outdir).as_posix() for path in outdir.rglob("*") if path.is_file()) == names
    for name, image in zip(names, expected, strict=True):
        with PIL.Image.open(outdir / name) as file:
            assert file.mode == ("L" if channels == 1 else "RGB")
            assert np.array_equal(np.asarray(file).reshape(4, 4, channels), image.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_idx": 3}, "class 3 is out of range; the network knows classes 0 to 2"),
        ({"class_idx": -1}, "class -1 is out of range"),
        ({"class_idx": "all", "seeds": range(4)}, "4 seeds do not deal evenly over all 3 classes; .*--seeds=0-5"),
        ({"class_idx": [0, 1], "seeds": [1, 2, 3]}, "2 classes were given for 3 seeds"),
        ({"class_idx": [0, 1], "seeds": [8, 8]}, "seed 8 is asked for with two classes"),
        ({"net": tiny_network(label_dim=0), "class_idx": 0}, "unconditional"),
        ({"net": tiny_network(label_dim=0), "class_idx": "all"}, "unconditional"),
        ({"net": tiny_network(channels=5)}, "5 channels cannot be written as PNG"),
        ({"gnet": tiny_network(resolution=8), "guidance": 2}, "guide is for images of 3x8x8 .* main network for 3x4x4"),
        ({"gnet": tiny_network(channels=1), "guidance": 2}, "guide is for images of 1x4x4"),
        ({"gnet": tiny_network(label_dim=5), "guidance": 2}, "guide knows 5 classes and the main network 3"),
        ({"guidance": 2}, "guidance=2 needs a guiding network"),
        ({"gnet": tiny_network(), "guidance": math.inf}, "guidance=inf"),
        ({"seeds": []}, "no seeds"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"encoder_batch_size": -1}, "encoder_batch_size=-1"),
        ({"num_steps": 0}, "0 sampling steps"),
        ({"sigma_min": 100}, "sigma_min=100"),
        ({"net": "missing.pkl"}, "missing.pkl"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        generate_images(**{"net": tiny_network(), "outdir": tmp_path / "out", **CPU, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", "x" * 300, "deep/" + "x" * 300):
        with pytest.raises(ConfigError, match="cannot be made"):
            generate_images("never read.pkl", outdir=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_latents_without_a_decoder_can_be_had_as_tensors():
    assert collect(generate_images(tiny_network(channels=4), seeds=[0], num_steps=2, **CPU)).shape == (1, 4, 4, 4)


# By number; and by size, where two images of 128 MB are what may wait.
@pytest.mark.parametrize(("max_pending", "image_bytes", "num"), [(3, 12, 3), (None, 128 << 20, 2)])
def test_a_slow_disk_holds_sampling_back_and_a_fast_one_does_not(
    tmp_path: Path, max_pending: int | None, image_bytes: int, num: int
):
    disk = threading.Event()
    one_more_accepted = threading.Event()

    def slow_image() -> np.ndarray:
        disk.wait(10)
        return np.zeros([1, 2, 2], np.uint8)

    with ImageWriter(num_threads=1, max_pending=max_pending) as writer:
        for i in range(num):
            writer.write(tmp_path / f"{i}.png", slow_image, image_bytes=image_bytes)  # returns at once

        def write_one_more() -> None:
            writer.write(tmp_path / f"{num}.png", slow_image, image_bytes=image_bytes)
            one_more_accepted.set()

        waiting = threading.Thread(target=write_one_more)
        waiting.start()
        assert not one_more_accepted.wait(0.1) and not list(tmp_path.glob("*.png"))
        disk.set()
        waiting.join(10)
    assert len(list(tmp_path.iterdir())) == num + 1


def test_a_file_that_cannot_be_written_ends_the_run(tmp_path: Path):
    images = generate_images(tiny_network(), outdir=tmp_path, seeds=[1], num_steps=1, **CPU)
    (tmp_path / "000001.png").mkdir()
    with pytest.raises(ConfigError, match=r"000001\.png cannot be written"):
        list(images)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    write_png(path, np.zeros([3, 2, 2], np.uint8))
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_png(path, np.ones([3, 2, 2], np.uint8))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_contact_sheet_reads_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones([1, 3, 2, 4], np.uint8)
    sheet = contact_sheet(images, num_columns=3, gap=1)
    assert sheet.shape == (3, 2 * 3 + 1, 3 * 5 + 1)
    places = sheet[0, 1::3, 1::5]
    assert places.tolist() == [[0, 1, 2], [3, 4, 255]]
    assert (sheet[:, ::3] == 255).all() and (sheet[:, :, ::5] == 255).all()
