"""Compare the time of the metrics with the plain way of computing them, whose results must agree.

    python -m benchmarks.metrics

- Fréchet distance of 2048 features by symmetric eigenvalues, and by scipy's general matrix root;
- precision, recall, density and coverage in tiles, and with whole matrices of distances; KID with whole matrices;
- images per second of each detector, and of a plain loop (benchmarks/detectors.py).
"""

import datetime
import platform
import time
from collections.abc import Callable
from typing import TypeVar

import click
import numpy as np
import scipy.linalg
import torch

from benchmarks.detectors import compare_all
from training.metrics.distances import frechet_distance, kid
from training.metrics.manifold import Manifold, manifold

T = TypeVar("T")


def timed(function: Callable[[], T], repeat: int = 1) -> tuple[float, T]:
    """Return the seconds of the fastest of `repeat` calls, and the result."""
    fastest = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest, result


def features(num: int, dims: int, seed: int) -> np.ndarray:
    """Return correlated features [num, dims] whose variances fall off as those of image features do."""
    random = np.random.default_rng(seed)
    mix = np.eye(dims) + random.standard_normal((dims, dims)) * 0.01
    return (random.standard_normal((num, dims)) * np.exp(-np.arange(dims) / (dims / 7)) @ mix).astype(np.float32)


def report(what: str, ours: float, plain: float, difference: float) -> None:
    """Print one line; raises AssertionError if the results differ."""
    assert difference < 1e-6, f"{what}: the results differ by {difference:.1e}"
    click.echo(f"{what:<52}{ours:8.2f} s   plain {plain:8.2f} s   ratio {plain / ours:5.1f}   differ {difference:.0e}")


def compare_frechet(dims: int, num: int) -> None:
    """Compare with the formula as printed, by scipy.linalg.sqrtm."""
    parts = [features(num, dims, seed).astype(np.float64) for seed in (0, 1)]
    a, b = ((part.mean(0), np.cov(part, rowvar=False)) for part in parts)

    def plain() -> float:
        root = scipy.linalg.sqrtm(a[1] @ b[1])
        return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root.real))

    ours_sec, ours = timed(lambda: frechet_distance(*a, *b), repeat=3)
    plain_sec, expected = timed(plain)
    report(f"Fréchet, {num} samples of {dims} features", ours_sec, plain_sec, abs(ours / expected - 1))


def compare_manifold(dims: int, num: int) -> None:
    """Compare with three whole matrices of distances in memory."""
    real, generated = features(num, dims, 2), features(num, dims, 3)

    def plain() -> Manifold:
        a, b = torch.from_numpy(real).double(), torch.from_numpy(generated).double()
        radii_a, radii_b = (
            torch.cdist(x, x).kthvalue(6, dim=1).values for x in (a, b)
        )  # the first is the point itself
        distances = torch.cdist(b, a)
        near = distances <= radii_a
        return Manifold(
            precision=float(near.any(1).double().mean()),
            recall=float((distances <= radii_b[:, None]).any(0).double().mean()),
            density=float(near.double().sum() / (5 * len(b))),
            coverage=float(near.any(0).double().mean()),
        )

    ours_sec, ours = timed(lambda: manifold(real, generated, (5,))[5])
    plain_sec, expected = timed(plain)
    difference = max(abs(getattr(ours, name) - value) for name, value in vars(expected).items())
    report(f"precision ... coverage, {num} x {num} of {dims} features", ours_sec, plain_sec, difference)


def compare_kid(dims: int, num: int) -> None:
    """Compare with the whole kernel matrices."""
    a, b = features(num, dims, 4), features(num, dims, 5)

    def plain() -> float:
        x, y = a.astype(np.float64), b.astype(np.float64)
        xx, yy, xy = ((p @ q.T / dims + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        pairs = num * (num - 1)
        return float((xx.sum() - np.trace(xx)) / pairs + (yy.sum() - np.trace(yy)) / pairs - 2 * xy.mean())

    ours_sec, ours = timed(lambda: kid(a, b))
    plain_sec, expected = timed(plain)
    report(f"KID with standard error, {num} x {num} of {dims}", ours_sec, plain_sec, abs(ours.value - expected))


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of PyTorch")
@click.option("--dims", default=2048, show_default=True, help="Features of the Fréchet distance")
@click.option("--num", default=5000, show_default=True, help="Images per set")
@click.option("--images", default=64, show_default=True, help="Images for the detectors, a sixteenth for DINOv2")
def main(threads: int, dims: int, num: int, images: int) -> None:
    """Print seconds and ratios. For the plain ways, OMP_NUM_THREADS sets the threads."""
    torch.set_num_threads(threads)
    click.echo(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {threads} threads")
    click.echo(f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}")
    compare_frechet(dims, num)
    compare_manifold(dims // 4, num)
    compare_kid(dims // 4, num)
    compare_all("cpu", images, images // 16, resolution=64, repeat=3)


if __name__ == "__main__":
    main()
