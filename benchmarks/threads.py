"""Measure how the threads of PyTorch wait for one another: spinning, sleeping, and as the scripts here set.

Each way runs in processes of its own, in turn, alone and next to one busy process for each core. The median of the
network's calls counts, over all repeats.

    python -m benchmarks.threads
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from dnnlib.start import WAITING

import click

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, str]] = {
    "PyTorch's default": {},
    "ours": WAITING,
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
}
BUSY = "while True: pass"
CALLS = """
import sys, time, torch
from training.snapshot import load_snapshot
net = load_snapshot("models/fashion.safetensors").net.eval()
arguments = torch.randn([1, 1, 32, 32]), torch.ones(1), torch.eye(10)[:1]
end = time.perf_counter() + float(sys.argv[1])
with torch.inference_mode():
    net(*arguments)
    while (start := time.perf_counter()) < end:
        net(*arguments)
        print(time.perf_counter() - start)
    net(*arguments)
    print(time.perf_counter() - start)
"""


def call_times(way: dict[str, str], seconds: float) -> list[float]:
    """Return the times of the calls in a process with the environment variables of `way`."""
    ours = {*WAITING, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | way
    program = [sys.executable, "-c", CALLS, str(seconds)]
    done = subprocess.run(program, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return [float(line) for line in done.stdout.split()]


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes for each way")
@click.option("--seconds", type=float, default=2, show_default=True, help="Time to call the network in each")
def main(repeats: int, seconds: float) -> None:
    """Print the times of a call and their ratios to the fastest."""
    for title, num_busy in (("alone", 0), ("next to a busy process for each core", os.cpu_count() or 1)):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num_busy)]
        try:
            times: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(repeats):
                for name, way in WAYS.items():
                    times[name] += call_times(way, seconds)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        medians = {name: statistics.median(values) for name, values in times.items()}
        click.echo(title)
        for name, median in medians.items():
            click.echo(f"  {name:<20}{1e3 * median:9.1f} ms   ratio {median / min(medians.values()):6.1f}")


if __name__ == "__main__":
    main()
