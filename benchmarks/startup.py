"""Measure the seconds from the start of generate_images.py to the first image on a CPU, beyond importing torch.

Two ways of loading the shipped network are compared too: ours, and the documented one that makes the network on the
meta device and assigns the tensors of the file to it. Each runs in new processes, in turn; the fastest run counts.

    python -m benchmarks.startup
"""

import datetime
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
NET = "models/fashion.safetensors"

IMPORT = "import torch, time; start = time.perf_counter()\n"
PLAIN = (
    IMPORT + "import json\nfrom safetensors.torch import load_file\nfrom safetensors import safe_open\n"
    "from training.networks_edm2 import Precond\n"
    f"file = safe_open({NET!r}, framework='pt')\n"
    "with torch.device('meta'):\n  net = Precond(**json.loads(file.metadata()['network'])['arguments'])\n"
    f"net.load_state_dict(load_file({NET!r}), assign=True)\nnet.float()\n"
)
OURS = IMPORT + f"from training.snapshot import load_snapshot\nnet = load_snapshot({NET!r}).net.float()\n"
REPORT = "print(time.perf_counter() - start, sum(float(p.double().sum()) for p in net.parameters()))"


def seconds(*args: str) -> float:
    """Return the wall time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def reported(program: str) -> tuple[float, float]:
    """Return the seconds and the checksum that a program prints."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    sec, checksum = map(float, done.stdout.split())
    return sec, checksum


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Runs, of which the fastest counts")
@click.option("--preset", default="demo", show_default=True, help="Networks and options")
def main(repeats: int, preset: str) -> None:
    """Print the times."""
    click.echo(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = ["generate_images.py", f"--preset={preset}", "--device=cpu", "--seeds=0", f"--outdir={folder}"]
        ways = {
            "import torch": ["-c", "import torch"],
            "one image, 1 step": [*command, "--steps=1"],
            "one image, 32 steps": command,
        }
        fastest = dict.fromkeys(ways, float("inf"))
        for _ in range(repeats):
            for name, args in ways.items():
                fastest[name] = min(fastest[name], seconds(*args))
    for name, sec in fastest.items():
        click.echo(f"{name:<22}{sec:6.2f} s   beyond importing torch {sec - fastest['import torch']:6.2f} s")
    ours, plain = ([reported(program + REPORT) for _ in range(repeats)] for program in (OURS, PLAIN))
    assert ours[0][1] == plain[0][1], "the networks differ"
    sec, plain_sec = min(ours)[0], min(plain)[0]
    click.echo(f"network of {Path(NET).name}: ours {sec:.3f} s, plain {plain_sec:.3f} s, ratio {plain_sec / sec:.2f}")


if __name__ == "__main__":
    main()
