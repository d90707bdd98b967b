"""Compare post-hoc EMA with a plain loop over files and outputs.

Both read the same snapshots of a network the size of edm2-img512-xxs (31 million parameters) from a folder, and write
the same networks to another. The plain loop loads each file, adds it to each output in turn, and writes; the other way
is `reconstruct_phema` in training/posthoc/reconstruction.py. The results are compared. The time of a bare copy of the
same bytes is the lower bound of the disk.

    python -m benchmarks.phema
    python -m benchmarks.phema --format=safetensors --dir=/dev/shm --repeats=5
"""

import copy
import datetime
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from dnnlib.cli import SOURCE, main
from dnnlib.errors import ConfigError
from training import phema
from training.config import NetworkConfig
from training.networks_edm2 import Precond
from training.posthoc.reconstruction import Input, list_input_pickles, reconstruct_phema
from training.snapshot import Snapshot, load_snapshot, save_snapshot

NUM_TIMES, STDS = 6, (0.050, 0.100)
OUT_STDS = (0.040, 0.060, 0.070, 0.080, 0.090, 0.110, 0.120, 0.150)


def write_inputs(folder: Path, suffix: str) -> None:
    """Write snapshots of a network in a random walk, at 6 times and of 2 EMA lengths."""
    torch.manual_seed(0)
    arguments = NetworkConfig(channels=64).arguments()
    net = Precond(img_resolution=64, img_channels=4, label_dim=1000, **arguments).eval().requires_grad_(False)
    for index in range(NUM_TIMES):
        nimg = (index + 1) << 23
        for std in STDS:
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            save_snapshot(
                Snapshot(net=net, nimg=nimg, ema_std=std), folder / f"net-{nimg // 1000:07d}-{std:.3f}{suffix}"
            )


def plain_loop(inputs: Sequence[Input], folder: Path, suffix: str) -> None:
    """Load each file, add it to each output in turn, write."""
    nimg = inputs[-1].nimg
    profiles = ([file.nimg for file in inputs], [file.std for file in inputs])
    weights = phema.solve_posthoc_coefficients(*profiles, nimg, OUT_STDS)
    outputs: list[Snapshot] = []
    for file, row in zip(inputs, weights.tolist(), strict=True):
        snapshot = load_snapshot(file.path)
        if not outputs:
            outputs = [replace(snapshot, net=copy.deepcopy(snapshot.net).to(torch.float32)) for _ in OUT_STDS]
            for total in (total for output in outputs for total in output.net.parameters()):
                total.zero_()
        for output, weight in zip(outputs, row, strict=True):
            for total, parameter in zip(output.net.parameters(), snapshot.net.parameters(), strict=True):
                total.add_(weight * parameter.to(torch.float32))
    for output, std in zip(outputs, OUT_STDS, strict=True):
        save_snapshot(output, folder / f"phema-{nimg // 1000:07d}-{std:.3f}{suffix}")


def one_pass(inputs: Sequence[Input], folder: Path, suffix: str) -> None:
    """Reconstruct the same networks by the library."""
    for _ in reconstruct_phema(inputs, OUT_STDS, out_dir=folder, out_format=suffix[1:]):
        pass


def bare_copy(inputs: Sequence[Input], folder: Path, suffix: str) -> None:
    """Read the inputs and write as many bytes as the outputs have."""
    for file in inputs:
        data = Path(file.path).read_bytes()
    for std in OUT_STDS:
        (folder / f"phema-{std:.3f}{suffix}").write_bytes(data)


def seconds(work: Callable[..., None], inputs: Sequence[Input], folder: Path, suffix: str) -> float:
    """Return the wall time of one run into the emptied `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.perf_counter()
    work(inputs, folder, suffix)
    return time.perf_counter() - start


def largest_difference(one: Path, two: Path) -> float:
    """Return the largest difference of parameters in two folders, relative to the largest entry of the tensor."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in two.iterdir()) or len(names) != len(OUT_STDS):
        raise ConfigError(f"the two ways wrote different files: {names}")
    largest = 0.0
    for name in names:
        nets = [load_snapshot(folder / name).net.to(torch.float32) for folder in (one, two)]
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            largest = max(largest, float((a - b).abs().max() / a.abs().max()))
    return largest


@click.command()
@click.option(
    "--format",
    "formats",
    type=click.Choice(["pkl", "safetensors"]),
    multiple=True,
    default=["pkl", "safetensors"],
    show_default=True,
    help="File format of inputs and outputs",
)
@click.option(
    "--dir", "parent", metavar="DIR", type=SOURCE, help="Parent of the temporary folders  [default: the system's]"
)
@click.option(
    "--repeats", metavar="INT", type=click.IntRange(min=1), default=3, show_default=True, help="Runs; the median counts"
)
def compare(formats: tuple[str, ...], parent: str | None, repeats: int) -> None:
    """Time both ways of reconstructing 8 networks of 31 million parameters from 12 snapshots."""
    torch.set_grad_enabled(False)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{today}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        folders = {work: folder / work.__name__ for work in (bare_copy, plain_loop, one_pass)}
        for out_format in formats:
            suffix = f".{out_format}"
            (folder / out_format).mkdir()
            write_inputs(folder / out_format, suffix)
            inputs = list_input_pickles(folder / out_format)
            # In turn, so that other work on the machine hits all ways.
            times: dict[Callable[..., None], list[float]] = {work: [] for work in folders}
            for _ in range(repeats):
                for work, target in folders.items():
                    times[work].append(seconds(work, inputs, target, suffix))
            difference = largest_difference(folders[plain_loop], folders[one_pass])
            if difference > 2**-10:
                raise ConfigError(f"the results differ by {difference:.2g}; rounding to float16 explains {2**-10:.2g}")
            median = {work: statistics.median(values) for work, values in times.items()}
            for work, values in times.items():
                each = ", ".join(f"{value:.2f}" for value in values)
                print(f"{out_format:11}  {work.__name__:10}  {median[work]:6.2f} s   ({each})")
            ratio = median[plain_loop] / median[one_pass]
            print(f"{out_format:11}  {ratio:.1f} times as fast; the results differ by {difference:.2g} (relative)")


if __name__ == "__main__":
    main(compare)
