"""Compare the time that training loses to a checkpoint written in the background and in the foreground.

The network has the shape of the XS model (128 channels, latents of 64x64x4, 1000 classes: 125 million parameters), and
the state includes two averages and Adam's moments. Time lost is the extra time of a number of iterations with a
checkpoint at their start. The iterations train on --batch images. On a CPU the writer and the training share the cores:
when all are busy, nothing is gained. With a GPU the cores wait for it; --wait simulates that by iterations in which the
process sleeps.

    python -m benchmarks.checkpoint --dir=/some/disk
"""

import datetime
import filecmp
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.cli import SOURCE, main
from dnnlib.errors import ConfigError
from torch_utils.checkpoints.checkpoint import checkpoint_bytes
from torch_utils.distributed import World, resolve_device
from training.config import NetworkConfig, TrainingConfig
from training.run.run_data import open_dataset
from training.run.run_folder import RunFolder
from training.run.saving import RunSaver
from training.run.state import TrainingState


def make_state(
    folder: Path, batch: int, channels: int, device: str | None, *, compiled: bool | None = None
) -> tuple[TrainingState, TrainingConfig]:
    """Return the training state of the network, for random latents written to the folder."""
    data = folder / "data"
    data.mkdir()
    np.save(data / "0.npy", np.random.default_rng(0).standard_normal([8, 64, 64], dtype=np.float32))
    (data / "dataset.json").write_text('{"labels": [["0.npy", 999]]}', encoding="utf-8")
    network = NetworkConfig(channels=channels)
    config = TrainingConfig(data=str(data), network=network, batch=batch, bench=False, compile=compiled)
    world = World(device=resolve_device(device))
    return TrainingState(config, open_dataset(config), world, resumed=False), config


def take_steps(state: TrainingState, num: int, batch: int, wait_sec: float = 0.0) -> None:
    """Train on random latents and wait for the device, or only wait this long per iteration."""
    if wait_sec:
        time.sleep(num * wait_sec)
        return
    device = state.world.device
    images = torch.randn([batch, 8, 64, 64], device=device)
    labels = torch.eye(1000, device=device)[torch.arange(batch) % 1000]
    for _ in range(num):
        loss = state.step(images, labels)
    loss.sum().item()


def exhaust(events: Iterator[Any]) -> float:
    """Return the seconds until all events came, during which training stands still."""
    start = time.perf_counter()
    for _ in events:
        pass
    return time.perf_counter() - start


def save(saver: RunSaver, state: TrainingState) -> float:
    """Return the seconds for which a checkpoint stops training."""
    return exhaust(saver.save_checkpoint(state.nimg, state.state_dict()))


def interval(
    state: TrainingState, begin: Callable[[], float], steps: int, batch: int, wait_sec: float
) -> tuple[float, float]:
    """Return the seconds of `begin` with the iterations after it, and the seconds that `begin` returns."""
    start = time.perf_counter()
    pause = begin()
    take_steps(state, steps, batch, wait_sec)
    return time.perf_counter() - start, pause


@click.command()
@click.option(
    "--dir", "parent", metavar="DIR", type=SOURCE, help="Parent of the temporary folder  [default: the system's]"
)
@click.option("--device", metavar="STR", help="cpu, cuda or mps  [default: the best available]")
@click.option("--channels", metavar="INT", type=int, default=128, show_default=True, help="Width of the network")
@click.option("--batch", metavar="INT", type=int, default=1, show_default=True, help="Images per iteration")
@click.option("--steps", metavar="INT", type=int, default=8, show_default=True, help="Iterations after each save")
@click.option("--wait", metavar="SEC", type=float, default=0.0, help="Sleep this long per iteration, without training")
@click.option(
    "--repeats", metavar="INT", type=int, default=2, show_default=True, help="Runs, of which the median counts"
)
def compare(
    parent: str | None, device: str | None, channels: int, batch: int, steps: int, wait: float, repeats: int
) -> None:
    """Time iterations without a checkpoint, with one in the foreground, and with one in the background."""
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{today}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        state, config = make_state(Path(name), batch, channels, device)
        savers = {}
        for way in ("foreground", "background"):
            (Path(name) / way).mkdir()
            folder = RunFolder(Path(name) / way)
            savers[way] = RunSaver(replace(config, background_saves=way == "background"), folder, state.world)
        take_steps(state, 1, batch)
        savers["background"].prepare(state, state.state_dict())
        take_steps(state, 1, batch)
        gigabytes = checkpoint_bytes(state.state_dict()) / 1e9
        parameters = sum(p.numel() for p in state.net.parameters()) / 1e6
        print(f"{parameters:.0f} million parameters, {gigabytes:.2f} GB per checkpoint, {state.world.device.type}")
        times: dict[str, list[float]] = {"none": [], "background": []}
        pauses: dict[str, list[float]] = {way: [] for way in savers}
        for _ in range(repeats):
            times["none"].append(interval(state, lambda: 0.0, steps, batch, wait)[0])
            print(f"{steps} iterations alone: {times['none'][-1]:.2f} s", flush=True)
            # No iteration in between, so that both files have the same content.
            pauses["foreground"].append(save(savers["foreground"], state))
            print(f"foreground: pause {pauses['foreground'][-1]:.2f} s", flush=True)
            seconds, pause = interval(state, lambda: save(savers["background"], state), steps, batch, wait)
            late = exhaust(savers["background"].settle())
            times["background"].append(seconds + late)
            pauses["background"].append(pause)
            print(f"background: pause {pause:.2f} s, written {late:.2f} s after the last iteration", flush=True)
            one, two = (next((Path(name) / way).glob("*.pt")) for way in savers)
            if not filecmp.cmp(one, two, shallow=False):
                raise ConfigError("the two ways wrote different files")
        plain = statistics.median(times["none"])
        lost = {
            "foreground": statistics.median(pauses["foreground"]),
            "background": statistics.median(times["background"]) - plain,
        }
        print(f"{steps} iterations alone      {plain:6.2f} s")
        for way, seconds in lost.items():
            pause = statistics.median(pauses[way])
            print(f"{way}: lost {seconds:6.2f} s, paused {pause:6.2f} s, {pause / gigabytes:.2f} s per gigabyte")
        print(f"ratio of time lost: {lost['foreground'] / max(lost['background'], 1e-9):.1f}; the files are the same")


if __name__ == "__main__":
    main(compare)
