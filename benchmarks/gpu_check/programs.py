"""Checks of the speed of whole programs: sampling, the training loop, checkpoints, detectors."""

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoint import exhaust, make_state, take_steps
from benchmarks.detectors import random_weights
from benchmarks.gpu_check.records import Finding, Row, Setting
from benchmarks.gpu_check.steps import TINY_NET, seconds_of
from benchmarks.sample import IMG512_S, Case, Ways, random_decoder
from benchmarks.train import loop_against_step, wait
from torch_utils.checkpoints.checkpoint import checkpoint_bytes
from torch_utils.distributed import World
from torch_utils.precision import numerics
from training.metrics.detectors import DETECTORS, make_detector
from training.metrics.statistics import Moments
from training.run.run_folder import RunFolder
from training.run.saving import RunSaver


def sampling(setting: Setting) -> Iterator[Finding]:
    """Time sampling by recorded and compiled networks against the plain eager oracle, and decoding."""
    device = torch.device(setting.device)
    batch, num_steps = (2, 2) if setting.tiny else (32, 5)
    precision: Any = "fp16" if device.type == "cuda" else "fp32"
    plain = Case(name="S", net=TINY_NET if setting.tiny else IMG512_S, batch=batch, precision=precision)
    single, compiled = dataclasses.replace(plain, batch=1), dataclasses.replace(plain, compile=True)
    rows: list[Row] = []
    values: list[str] = []
    is_right = True
    with numerics():
        for case in (plain, single) if setting.tiny else (plain, single, compiled):
            ways = Ways(case, device, num_steps=num_steps)
            difference = ways.difference()
            ours, oracle = (min(ways.seconds(way) for _ in range(3)) for way in (ways.ours, ways.oracle))
            ratio = oracle / ours
            evaluation_ms = 1e3 / (2 * num_steps - 1)
            mode = f"{case.precision}{', compiled' if case.compile else ''}"
            rows.append(
                {
                    "way": mode,
                    "images": str(case.batch),
                    "ms an evaluation": f"{ours * evaluation_ms:.2f}",
                    "oracle, ms": f"{oracle * evaluation_ms:.2f}",
                    "ratio": f"{ratio:.2f}",
                    "images differ by": f"{difference:.0e}",
                }
            )
            is_right &= difference < 0.05
            misses = ratio < (2 if case.compile else 5 if case.batch == 1 else 0) and not setting.tiny
            values.append(f"{mode}, {case.batch} images: {ratio:.2f} times the oracle{' (too slow)' if misses else ''}")
            is_fast = not any("too slow" in value for value in values)
            passed = is_right and is_fast if case.compile or not (is_right and is_fast) else None
            yield Finding(passed=passed, value="; ".join(values), rows=tuple(rows))
            if case is single and not setting.tiny and (decoding := decoder_times(device)):
                values.append(decoding)


def decoder_times(device: torch.device) -> str:
    """Return the time to decode eight images of 512x512; nothing without the package diffusers."""
    try:
        decode = random_decoder(device)
    except ImportError:
        return ""
    latents = torch.randn([8, 4, 64, 64], device=device)
    with torch.no_grad():
        decode(latents)
        seconds = seconds_of(lambda: decode(latents), device, 1)[0]
    return f"decoder {1e3 * seconds / 8:.1f} ms an image"


def loop(setting: Setting) -> Finding:
    """Compare a whole run, with loader, statistics and averages, with its steps alone: not compiled, which is harder,
    since the host is then busy with the steps."""
    precision: Any = "fp16" if setting.device.startswith("cuda") else "fp32"
    num_steps, rounds = (1, 1) if setting.tiny else (30, 3)
    ratio = loop_against_step(precision, num_steps, rounds, compiled=False)
    return Finding(passed=ratio >= 0.97, value=f"{ratio:.1%} of the bare step's rate")


def checkpoint(setting: Setting) -> Finding:
    """Save a checkpoint in the background: how long training stands still, and how much memory is page-locked."""
    with tempfile.TemporaryDirectory() as name:
        state, config = make_state(Path(name), 1, 8 if setting.tiny else 128, setting.device, compiled=False)
        world = World(device=state.world.device)
        (Path(name) / "run").mkdir()
        saver = RunSaver(dataclasses.replace(config, background_saves=True), RunFolder(Path(name) / "run"), world)
        take_steps(state, 1, 1)
        size = checkpoint_bytes(state.state_dict())
        before = pinned_bytes()
        saver.prepare(state, state.state_dict())
        pinned = pinned_bytes() - before
        wait(world.device)
        pause = exhaust(saver.save_checkpoint(state.nimg, state.state_dict()))
        exhaust(saver.settle())
        saver.close()
    # prepare() also reserves float16 copies of the averages for snapshots: 4 bytes a parameter in all.
    num_params = sum(param.numel() for param in state.net.parameters())
    expected = size + 2 * num_params * len(config.ema_stds)
    value = f"pause {1e3 * pause:.0f} ms for {size / 1e9:.2f} GB, pinned {pinned / expected:.2f} times the state"
    return Finding(passed=pinned <= 1.1 * expected if pinned else None, value=value)


def pinned_bytes() -> int:
    """Return the page-locked bytes of PyTorch's allocator; 0 without a GPU, or with a PyTorch that does not count."""
    if not torch.cuda.is_available() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    stats = torch.cuda.host_memory_stats()
    return int(stats.get("allocated_bytes.current", 0))


def detectors(setting: Setting) -> Finding:
    """Time the detectors, with random weights where theirs are not here, and compare moments with float64 in NumPy."""
    device = torch.device(setting.device)
    rows: list[Row] = []
    num = 2 if setting.tiny else 256
    images = torch.randint(0, 256, [num, 3, 64, 64], dtype=torch.uint8, device=device)
    for name in ["efflite0"] if setting.tiny else DETECTORS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                weights = None if DETECTORS[name].has_weights() else random_weights(name, Path(folder))
                detector = make_detector(name, str(device), weights)
            except ImportError as error:
                rows.append({"detector": name, "images/s": f"- ({error})"})
                continue
            with torch.no_grad():
                detector(images)
                seconds = seconds_of(partial(detector, images), device, 1)[0]
            rows.append({"detector": name, "images/s": f"{num / seconds:.0f}"})
    off = moments_error(device, 64 if setting.tiny else 2048)
    value = f"moments to {off:.0e}; " + ", ".join(f"{row['detector']} {row['images/s']}/s" for row in rows)
    return Finding(passed=off < 1e-12, value=value, rows=tuple(rows))


def moments_error(device: torch.device, width: int) -> float:
    """Return the largest error of mean and covariance relative to NumPy's in float64."""
    rows = torch.randn([3 * width, width], generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments()
    for part in rows.to(device).split(width):
        moments.add(part)
    _, mean, covariance = moments.merge(World(device=device))
    exact = rows.numpy().astype(np.float64)
    pairs = [(mean, exact.mean(0)), (covariance, np.cov(exact, rowvar=False))]
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)
