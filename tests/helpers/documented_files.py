"""The files that a reader of the documentation would have: tiny ones, made when a command or example asks for them."""

import io
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from tests.helpers.documented_run import run_script
from tests.helpers.paths import GOLDEN_DIR, ROOT
from tests.helpers.stand_in_detector import StandInDetector, images
from tests.helpers.tiny import write_dataset
from training.metrics.reference import save_stats

SNAPSHOTS = GOLDEN_DIR / "snapshots"


def fashion(path: Path) -> None:
    """The first forty of the held-out pictures, with their labels."""
    with zipfile.ZipFile(ROOT / "data" / "fashion-mnist-32-heldout.zip") as source, zipfile.ZipFile(path, "w") as dest:
        labels = json.loads(source.read("dataset.json"))["labels"][::10]
        for name, _ in labels:
            dest.writestr(name, source.read(name))
        dest.writestr("dataset.json", json.dumps({"labels": labels}))


def small_pictures(path: Path) -> None:
    """A data set of colour pictures of 8x8, in ten classes."""
    write_dataset(path, num=40, num_classes=10)


def pictures(path: Path) -> None:
    """A data set of colour pictures of 32x32."""
    write_dataset(path, num=12, size=32)


def larger_pictures(path: Path) -> None:
    """A data set of colour pictures of 32x32."""
    write_dataset(path, num=12, size=32)


def latents(path: Path) -> None:
    """A data set of raw latents, as the published VAE makes them."""
    write_dataset(path, num=40, channels=8)


def photographs(path: Path) -> None:
    """Two folders of three JPEGs, larger than they are wanted."""
    for name in ("cats", "dogs"):
        (path / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, [40, 48, 3], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(path / name / f"{i}.jpg")


def cifar(path: Path) -> None:
    """CIFAR-10 as it is downloaded, with two pictures in each of its files."""
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            pixels = np.random.default_rng(0).integers(0, 256, [2, 3072], dtype=np.uint8)
            data = pickle.dumps({b"data": pixels, b"labels": [0, 1]}, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def grey_picture(path: Path) -> None:
    """One grey picture of 32x32, black on the left and white on the right."""
    PIL.Image.fromarray(np.repeat(np.uint8([[0, 255]]), 16, axis=1).repeat(32, axis=0)).save(path)


def folder_of_images(path: Path) -> None:
    """Sixteen PNG files."""
    path.mkdir()
    for i, pixels in enumerate(images(16).numpy()):
        PIL.Image.fromarray(pixels.transpose(1, 2, 0)).save(path / f"{i:06d}.png")


def reference(path: Path) -> None:
    """Reference statistics of 40 pictures by the detector that needs no download, with the features of 20."""
    data = path.with_name("data-of-reference.zip")
    fashion(data)
    options = "--metrics=fd_efflite0 --features=20 --workers=0"
    run_script("calculate_metrics.py", ["ref", f"--data={data}", f"--dest={path}", *options.split()])


def scores(path: Path) -> None:
    """What `calculate_metrics.py --json` writes."""
    reference(path.with_name("reference-of-scores.safetensors"))
    options = "--preset=demo --num-images=4 --steps=1 --metrics=fd_efflite0"
    args = [f"--ref={path.with_name('reference-of-scores.safetensors')}", f"--json={path}", *options.split()]
    run_script("calculate_metrics.py", ["gen", *args])


def published_statistics(path: Path) -> None:
    """Reference statistics in the published layout, by `StandInDetector`."""
    features = StandInDetector()(images(20)).double().numpy()
    moments = {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}
    save_stats({"num_images": 20, "fid": moments, "fd_dinov2": moments}, path)


def run_folder(path: Path, *more: str) -> None:
    """A finished training run of 2,048 images, with more options if any."""
    data = path.with_name(f"{path.name}-data.zip")
    write_dataset(data, num_classes=10)
    options = "--channel-mult=1,2 --attn-resolutions=4 --batch=256 --duration=2Ki --snapshot=1Ki --status=1Ki"
    run_script(
        "train_edm2.py",
        [f"--outdir={path}", f"--data={data}", "--preset=fashion", "--channels=4", *options.split(), *more],
    )


def conditioned_network(path: Path) -> None:
    """A network that makes small pictures large."""
    folder = path.with_name("run-of-conditioned")
    run_folder(folder, "--condition=lowres:4")
    shutil.copy(max(folder.glob("network-snapshot-*.pkl")), path)


def checkpoint(path: Path) -> None:
    """A checkpoint of a run."""
    folder = path.with_name("run-of-checkpoint")
    run_folder(folder)
    shutil.copy(max(folder.glob("training-state-*.pt")), path)


def vae(path: Path) -> None:
    """A VAE of four latent channels in the diffusers layout, which halves the resolution."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    model.save_pretrained(path)


def shipped_network(path: Path) -> None:
    """The file of this name in models/."""
    shutil.copy(ROOT / "models" / path.name, path)


def copy_of(source: Path) -> Callable[[Path], None]:
    """A file or folder of the repository."""

    def copy(path: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, path, dirs_exist_ok=True)
        else:
            shutil.copy(source, path)

    return copy


# Regular expression of a whole path, and what makes the file or folder there.
FILES: dict[str, Callable[[Path], None]] = {
    r"data/fashion-mnist-32(-heldout)?\.zip": fashion,
    r"models/fashion(-guide)?\.safetensors": shipped_network,
    r"tiny/pictures\.zip": small_pictures,
    r"((datasets|shared)/)?[\w-]+-(sd|z)\.zip": latents,
    r"datasets/mine\.zip": larger_pictures,
    r"(datasets/)?[\w-]+\.zip": pictures,
    r"imagenet/train|photos|my-pictures|my-images": photographs,
    r"cifar-10-python\.tar\.gz": cifar,
    r"out|small": folder_of_images,
    r"out/[\w-]*ref\.safetensors|ref\.safetensors": reference,
    r"result\.json": scores,
    r"training-state-\d+\.pt": checkpoint,
    r"(converted/)?net\.safetensors": copy_of(ROOT / "models" / "fashion.safetensors"),
    r"out/sweep\.json": copy_of(ROOT / "tests" / "runs" / "fashion" / "sweep.json"),
    r"training-runs/[\w-]+": run_folder,
    r"raw-snapshots/edm2-img512-xs": copy_of(SNAPSHOTS / "run"),
    r"net\.pkl|snapshots/\*\.pkl": copy_of(SNAPSHOTS / "rgb-cond.pkl"),
    r"conditioned\.pkl": conditioned_network,
    r"guide\.pkl": copy_of(SNAPSHOTS / "run" / "network-snapshot-0008388-0.100.pkl"),
    r"(image|mask)\.png": grey_picture,
    r"my-vae": vae,
    r"out/(main|guide)/iter\d+\.pkl": copy_of(SNAPSHOTS / "toy.pkl"),
}

# Regular expression of a URL, and the local file that takes its place in the download cache.
URLS: dict[str, Callable[[Path], None]] = {
    r"https://nvlabs-fi-cdn\.nvidia\.com/edm2/posthoc-reconstructions/.*(uncond|0134217).*\.pkl": copy_of(
        SNAPSHOTS / "rgb-cond-guide.pkl"
    ),
    r"https://nvlabs-fi-cdn\.nvidia\.com/edm2/posthoc-reconstructions/.*\.pkl": copy_of(SNAPSHOTS / "rgb-cond.pkl"),
    r"https://nvlabs-fi-cdn\.nvidia\.com/edm2/dataset-refs/.*\.pkl": published_statistics,
    r"https://nvlabs-fi-cdn\.nvidia\.com/edm2/toy-example/.*\.pkl": copy_of(SNAPSHOTS / "toy.pkl"),
}


def make_for(table: dict[str, Callable[[Path], None]], name: str, path: Path) -> bool:
    """Make what `name` stands for at `path`; whether the table knows it."""
    for pattern, make in table.items():
        if re.fullmatch(pattern, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
            return True
    return False
