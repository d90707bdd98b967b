"""Measure images per second of each detector against a plain loop, whose features must agree.

The plain loop takes one image at a time through the network as it was trained: batch norms on their own, PyTorch's
default memory layout. DINOv2 has no batch norms; there the loop shows the gain from batches. Weights that
are not on the machine are replaced by random ones, with the same time. benchmarks/metrics.py prints these lines too.

    python -m benchmarks.detectors --num=64 --num-dinov2=4
"""

import datetime
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from training.metrics.detectors import DETECTORS, Detector, make_detector
from training.metrics.detectors.common import filled, read_tensors, resize_antialiased
from training.metrics.detectors.efflite0 import EfficientNetLite0, own_name
from training.metrics.detectors.inception import InceptionV3, resize_tf1

Loop = Callable[[torch.Tensor], torch.Tensor]


def random_weights(name: str, folder: Path) -> Path:
    """Write random weights for the detector `name`, and return their file or folder."""
    if name == "inception":
        torch.save(InceptionV3().state_dict(), folder / "inception.pth")
        return folder / "inception.pth"
    import transformers

    config = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def plain_loop(detector: Detector, device: str) -> Loop:
    """Return the same features from one image at a time."""
    if detector.name == "dinov2":
        return lambda images: torch.cat([detector._compute(image[None]).features for image in images])
    tensors = read_tensors(detector.weights_path)
    if detector.name == "inception":
        inception = filled(InceptionV3, tensors, detector.weights_path, detector.name).eval().to(device)
        return lambda images: torch.cat(
            [inception.outputs((resize_tf1(image[None], 299) - 128) / 128).features for image in images]
        )
    tensors = {own_name(name): value for name, value in tensors.items()}
    efflite0 = filled(EfficientNetLite0, tensors, detector.weights_path, detector.name).eval().to(device)
    return lambda images: torch.cat(
        [efflite0((resize_antialiased(image[None], 224, "bilinear") - 127) / 128).features for image in images]
    )


def seconds(loops: Sequence[Loop], images: torch.Tensor, repeat: int) -> list[float]:
    """Return the seconds of each loop's fastest run; loops take turns, so that other work on the machine hits all."""
    fastest = [float("inf")] * len(loops)
    for _ in range(repeat):
        for i, loop in enumerate(loops):
            start = time.perf_counter()
            loop(images).cpu()
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest


def compare(name: str, num: int, resolution: int, device: str, repeat: int, folder: Path) -> None:
    """Print the line of one detector."""
    weights = None if DETECTORS[name].has_weights() else random_weights(name, folder)
    detector = make_detector(name, device, weights)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, [num, 3, resolution, resolution], dtype=torch.uint8, generator=generator).to(device)
    with torch.no_grad():
        plain = plain_loop(detector, device)
        expected = plain(images[:4])
        difference = float((detector(images[:4]) - expected).abs().max() / expected.abs().max())
        assert difference < 1e-4, f"{name}: the features differ by {difference:.1e} of the largest"
        ours_sec, plain_sec = seconds([detector, plain], images, repeat)
    click.echo(
        f"{name:<10}{num:>4} images of {resolution}x{resolution}{num / ours_sec:9.2f} images/s   plain"
        f"{num / plain_sec:9.2f} images/s   ratio {plain_sec / ours_sec:5.2f}   differ {difference:.0e}"
        f"{'   random weights' if weights else ''}"
    )


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of PyTorch")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps")
@click.option("--num", default=64, show_default=True, help="Images")
@click.option("--num-dinov2", default=4, show_default=True, help="Images for DINOv2, the slow one; 0 leaves it out")
@click.option("--resolution", default=64, show_default=True, help="Size of the images")
@click.option("--repeat", default=3, show_default=True, help="Runs, of which the fastest counts")
def main(threads: int, device: str, num: int, num_dinov2: int, resolution: int, repeat: int) -> None:
    """Print images per second and the ratio for each detector."""
    torch.set_num_threads(threads)
    click.echo(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {threads} threads")
    click.echo(f"torch {torch.__version__}, device {device}")
    compare_all(device, num, num_dinov2, resolution, repeat)


def compare_all(device: str, num: int, num_dinov2: int, resolution: int, repeat: int) -> None:
    """Print a line for each detector."""
    for name in DETECTORS:
        count = num_dinov2 if name == "dinov2" else num
        if count:
            with tempfile.TemporaryDirectory() as folder:
                compare(name, count, resolution, device, repeat, Path(folder))


if __name__ == "__main__":
    main()
