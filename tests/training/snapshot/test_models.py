"""The shipped networks: what is in the files, and that their samples look like what they were asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.paths import ROOT
from training.dataset import ImageFolderDataset
from training.presets import GENERATION, TRAINING, locate
from training.sampling.generation import generate_images
from training.snapshot import load_snapshot

DEMO = GENERATION["demo"]


@pytest.mark.parametrize("network", [DEMO.net, DEMO.gnet])
def test_a_shipped_network_is_small_and_says_where_it_comes_from(network: str) -> None:
    path = Path(locate(network))
    assert path.stat().st_size < 4_000_000
    snapshot = load_snapshot(path)
    assert snapshot.info["license"] == "Apache-2.0"
    assert snapshot.nimg is not None and snapshot.ema_std is not None
    assert (snapshot.net.img_resolution, snapshot.net.img_channels, snapshot.net.label_dim) == (32, 1, 10)


def test_the_fashion_preset_trains_the_shipped_network_and_the_guide_is_smaller_and_less_trained() -> None:
    net, guide = load_snapshot(locate(DEMO.net)), load_snapshot(locate(DEMO.gnet))
    config = TRAINING["fashion"]
    for name, value in config.network.arguments().items():
        assert net.net.init_kwargs[name] == value, name
    assert net.nimg == config.duration
    assert guide.nimg < net.nimg
    sizes = [sum(p.numel() for p in snapshot.net.parameters()) for snapshot in (guide, net)]
    assert sizes[0] < sizes[1]


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as float32 [N, 1024] and class indices [N] of a shipped data set."""
    dataset = ImageFolderDataset(ROOT / "data" / name)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return np.stack(images).reshape(len(images), -1).astype(np.float32), np.stack(labels).argmax(axis=1)


def test_samples_resemble_the_real_images_of_their_class() -> None:
    """The class whose mean real image is nearest is the wanted one about as often as for real images."""
    pixels, classes = load("fashion-mnist-32.zip")
    means = np.stack([pixels[classes == c].mean(axis=0) for c in range(10)])

    def share_recognized(images: np.ndarray, wanted: np.ndarray) -> float:
        return float((np.square(images[:, None] - means).sum(axis=2).argmin(axis=1) == wanted).mean())

    real = share_recognized(*load("fashion-mnist-32-heldout.zip"))
    assert 0.6 < real < 0.8
    generated = generate_images(
        locate(DEMO.net),
        locate(DEMO.gnet or ""),
        seeds=range(60),
        class_idx="all",
        device="cpu",
        num_steps=8,
        guidance=DEMO.guidance,
    )
    images = torch.cat([batch.images for batch in generated if batch.images is not None])
    samples = images.flatten(1).numpy().astype(np.float32)
    assert share_recognized(samples, np.repeat(np.arange(10), 6)) > real - 0.1
