"""Checks of several GPUs of one machine, in processes that torchrun starts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.machine import ROOT
from benchmarks.gpu_check.records import Finding, Row, Setting
from dnnlib.errors import ConfigError

_MOST_GPUS = 8


def agreement(setting: Setting) -> Finding:
    """Train the same steps on one device, on all by DistributedDataParallel and by FSDP2, and sum large tensors."""
    ranks = min(setting.gpus, _MOST_GPUS)
    found = {way: worker(setting, way, size) for way, size in (("one", 1), ("ddp", ranks), ("shard", ranks))}
    exact = found["one"]
    rows: list[Row] = []
    misses = []
    for way, result in found.items():
        loss = abs(result["loss"] - exact["loss"]) / max(abs(exact["loss"]), 1e-9)
        norm = abs(result["norm"] - exact["norm"]) / exact["norm"]
        rows.append({"way": way, "loss": f"{loss:.0e}", "weights": f"{norm:.0e}", "apart": f"{result['apart']:.0e}"})
        if loss > 1e-4 or norm > 1e-4 or result["apart"] > 0:
            misses.append(
                f"{way}: loss off by {loss:.0e}, norm by {norm:.0e}, processes apart by {result['apart']:.0e}"
            )
    value = "; ".join(misses) or f"{ranks} devices agree with one; sums at {found['ddp']['bus'] / 1e9:.0f} GB/s"
    return Finding(passed=not misses, value=value, rows=tuple(rows))


def worker(setting: Setting, way: str, ranks: int) -> dict[str, float]:
    """Run `python -m benchmarks.gpu_check.several` in `ranks` processes, and return what the first one measured."""
    command = [*launcher(ranks), "-m", "benchmarks.gpu_check.several", way, setting.device, str(int(setting.tiny))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise ConfigError(f"{way} on {ranks} devices: {last_line(done.stderr)}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def launcher(ranks: int) -> list[str]:
    """Return the command that starts Python in `ranks` processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(several if ranks > 1 else [])]


def last_line(text: str) -> str:
    """Return the last line with content."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def train_together(way: str, device: str, tiny: bool) -> dict[str, float]:
    """Take five steps on this process's share of fixed batches; return loss, norm of the weights, and the rate of sums.

    `apart` is the largest difference of the norms of the weights between processes.
    """
    import dataclasses

    from benchmarks.train import SHAPES, TINY
    from torch_utils import distributed
    from torch_utils.precision import numerics
    from training.config import TrainingConfig
    from training.run.sharding import gathered
    from training.run.state import TrainingState

    shape = TINY if tiny else SHAPES["small"]
    options: dict[str, Any] = {"batch": 16, "compile": False, "rampup": 0.0, "shard": way == "shard"}
    network = dataclasses.replace(shape.network, precision="fp32")
    with distributed.joined(device) as world, numerics(cudnn_benchmark=False):
        state = TrainingState(
            TrainingConfig(data="", network=network, **options), shape.dataset(), world, resumed=False
        )
        generator = torch.Generator().manual_seed(0)
        size = [16, shape.channels, shape.resolution, shape.resolution]
        images = torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        labels = torch.eye(shape.label_dim)[torch.randint(shape.label_dim, [16], generator=generator)]
        share = slice(world.rank * 16 // world.size, (world.rank + 1) * 16 // world.size)
        for _ in range(5):
            loss = state.step(images[share].to(world.device), labels[share].to(world.device))
        mean = world.all_reduce_sum(loss.mean().double()) / world.size
        whole = gathered(state.local, state.net, world) if state.sharded else state.net
        weights = [value.to(torch.float16).double() for value in whole.state_dict().values()]
        norm = float(torch.stack([value.square().sum() for value in weights]).sum().sqrt())
        norms = world.all_gather_objects(norm)
        bus = sum_rate(world, 1 << (10 if tiny else 28))
        result = {"loss": float(mean), "norm": norms[0], "apart": max(norms) - min(norms), "bus": bus}
        state.close()
    return result


def sum_rate(world: Any, size: int) -> float:
    """Return the bytes a second that each process sends while `size` bytes are summed over all."""
    if world.size == 1:
        return 0.0
    tensor = torch.zeros(size // 4, device=world.device)
    times = []
    for _ in range(6):
        world.barrier()
        start = time.perf_counter()
        world.all_reduce_sum(tensor)
        float(tensor[0])
        times.append(time.perf_counter() - start)
    return 2 * size * (world.size - 1) / world.size / min(times)


def endings(setting: Setting) -> Finding:
    """Signal one process of a run, then kill one of another run: all must end, after a signal with a checkpoint."""
    ranks = min(setting.gpus, _MOST_GPUS)
    with tempfile.TemporaryDirectory() as name:
        suspended, signal_sec = end_by(setting, Path(name) / "signal", ranks, signal.SIGUSR1)
        killed, kill_sec = end_by(setting, Path(name) / "kill", ranks, signal.SIGKILL)
        has_checkpoint = any((Path(name) / "signal").glob("training-state-*"))
    passed = suspended == 0 and has_checkpoint and killed != 0 and kill_sec < 40
    value = f"signal: code {suspended}, {signal_sec:.0f} s; lost process: code {killed}, {kill_sec:.0f} s"
    return Finding(passed=passed, value=value if has_checkpoint else f"{value}; no checkpoint after the signal")


def end_by(setting: Setting, outdir: Path, ranks: int, number: int) -> tuple[int, float]:
    """Train in `ranks` processes, send one of them a signal, and return the exit code and how long the end took."""
    small = [
        "--channels=4",
        "--channel-mult=1,2",
        "--num-blocks=1",
        "--attn-resolutions=4",
        "--batch=64",
        "--status=64",
    ]
    options = [
        "--preset=fashion",
        f"--outdir={outdir}",
        "--duration=1Gi",
        "--status=64",
        "--workers=0",
        "--compile=False",
    ]
    command = [*launcher(ranks), "train_edm2.py", *options, *small, f"--device={setting.device}"]
    with open(f"{outdir}.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        return _signalled(process, outdir, number)
    finally:
        if process.poll() is None:
            process.terminate()


def _signalled(process: subprocess.Popen[bytes], outdir: Path, number: int) -> tuple[int, float]:
    import psutil

    while not (outdir / "stats.jsonl").exists() or not (outdir / "stats.jsonl").read_text(encoding="utf-8"):
        if process.poll() is not None:
            raise ConfigError(last_line(Path(f"{outdir}.txt").read_text(encoding="utf-8")))
        time.sleep(0.1)
    workers = [p for p in psutil.Process(process.pid).children() if "train_edm2.py" in p.cmdline()]
    start = time.monotonic()
    os.kill(workers[-1].pid, number)
    return process.wait(), time.monotonic() - start


if __name__ == "__main__":
    found = train_together(sys.argv[1], sys.argv[2], sys.argv[3] == "1")
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
