"""Compare two processes of one thread each with one process of one thread: whole commands, and sampling alone.

A network of five million parameters with random weights: 64 channels, multipliers 1 and 2, three blocks, attention at
16x16, 32x32 pixels, ten classes. Whole commands include the start of the processes, of which each imports torch;
"sampling" lasts from when all processes have loaded the network until all have written their images.

    python -m benchmarks.ranks --images=64 --steps=8
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.cli import PATH
from torch_utils import distributed
from training.images.png_files import read_png
from training.networks_edm2 import Precond
from training.sampling.generation import generate_images
from training.snapshot import Snapshot, save_snapshot

ROOT = Path(__file__).parents[1]


def write_network(path: Path) -> int:
    """Write the network to `path`, and return its number of parameters."""
    torch.manual_seed(0)
    net = Precond(32, 3, 10, model_channels=64, channel_mult=[1, 2], num_blocks=3, attn_resolutions=[16])
    torch.nn.init.constant_(net.unet.out_gain, 1)
    save_snapshot(Snapshot(net=net.eval()), path)
    return sum(parameter.numel() for parameter in net.parameters())


def launch(ranks: int, *command: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` by torchrun in `ranks` processes, or by Python in one, with one thread for each process."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def work(net: Path, outdir: Path, num: int, steps: int, batch: int) -> None:
    """Run one process of a measured run; the first one prints the seconds between the barriers."""
    world = distributed.init("cpu")
    options: dict[str, Any] = {"max_batch_size": batch, "num_steps": steps, "world": world}
    images = generate_images(str(net), seeds=range(num), outdir=outdir, on_demand=True, **options)
    for _ in generate_images(images.net, seeds=range(batch), **(options | {"num_steps": 1})):  # warm up
        pass
    world.barrier()
    start = time.perf_counter()
    counts = sum(len(step.seeds) for step in images)
    world.barrier()
    elapsed = time.perf_counter() - start
    shares = world.all_gather_objects(counts)
    if world.is_main:
        click.echo(json.dumps({"sec": elapsed, "shares": shares}))
    world.close()


@click.command()
@click.option("--images", "num", default=64, show_default=True, help="Images")
@click.option("--steps", default=8, show_default=True, help="Heun steps")
@click.option("--batch", default=8, show_default=True, help="Images at once for each process")
@click.option("--repeats", default=2, show_default=True, help="Runs of each way, of which the fastest counts")
@click.option("--worker", "worker", nargs=2, type=PATH, hidden=True)
def main(num: int, steps: int, batch: int, repeats: int, worker: tuple[Path, Path] | None) -> None:
    """Print the times of one and of two processes."""
    if worker is not None:
        work(*worker, num, steps, batch)
        return
    click.echo(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net = folder / "net.safetensors"
        click.echo(
            f"{write_network(net) / 1e6:.2f} million parameters, {num} images, {steps} Heun steps, batch {batch}"
        )
        options = [f"--images={num}", f"--steps={steps}", f"--batch={batch}"]
        sampling, whole = {1: float("inf"), 2: float("inf")}, {1: float("inf"), 2: float("inf")}
        for _ in range(repeats):
            for ranks in (1, 2):
                outdir = folder / f"out{ranks}"
                done = launch(ranks, "-m", "benchmarks.ranks", *options, "--worker", net, outdir)
                record = json.loads(done.stdout.strip().splitlines()[-1])
                sampling[ranks] = min(sampling[ranks], record["sec"])
                start = time.perf_counter()
                command = [f"--net={net}", f"--outdir={outdir}", f"--seeds=0-{num - 1}", "--device=cpu"]
                launch(ranks, "generate_images.py", *command, *options[1:])
                whole[ranks] = min(whole[ranks], time.perf_counter() - start)
                click.echo(f"{ranks} processes: images of each {record['shares']}")
        largest = max(
            int(np.abs(read_png(folder / "out1" / f"{seed:06d}.png").astype(int)
                       - read_png(folder / "out2" / f"{seed:06d}.png")).max())
            for seed in range(num)
        )  # fmt: skip
        assert largest <= 1, f"images differ by {largest} gray levels"
        for what, times in (("sampling and files", sampling), ("whole command", whole)):
            click.echo(f"{what:<20}1 process {times[1]:7.2f} s   2 processes {times[2]:7.2f} s   "
                       f"ratio {times[1] / times[2]:.2f}")  # fmt: skip
        click.echo(f"largest difference of two images: {largest} gray levels")


if __name__ == "__main__":
    main()
