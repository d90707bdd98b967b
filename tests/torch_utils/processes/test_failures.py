"""One process of two fails: both end, and what is on the screen is the first cause, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# What the two processes do in each of torchrun's attempts.
PROGRAM = """
import os, signal, sys
import click, torch
from dnnlib.cli import main
from dnnlib.errors import ConfigError
from torch_utils import distributed

@click.command()
def program() -> None:
    with distributed.joined("cpu") as world:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        world.barrier()
        if world.is_main:
            print(f"attempt {attempt}", file=sys.stderr, flush=True)
        world.barrier()
        if attempt == 0 and world.rank == 1:
            raise ConfigError("one has a bad disk")
        if attempt == 1:
            raise ConfigError("both see a bad file")
        if attempt == 2 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 3 and world.rank == 1:
            raise KeyError("a bug")
        world.barrier()
    assert not torch.distributed.is_initialized()

main(program)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_the_first_cause_is_told_once_and_torchrun_starts_again(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=4"]
    result = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "program.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    _, *attempts = result.stderr.split("attempt ")
    errors = [[line for line in text.splitlines() if "Error" in line] for text in attempts]
    assert errors[0] == ["Error (process 1): one has a bad disk"]
    assert errors[1] == ["Error: both see a bad file"]
    (lost,) = errors[2]
    assert lost.startswith("Error: another process of the run is gone or does not answer: ")
    assert errors[3][-1] == "[rank1]: KeyError: 'a bug'"  # the prefix is PyTorch's
    assert [text.count("Traceback") for text in attempts] == [0, 0, 0, 1, 0]
    codes = [text.partition("(exitcode: ")[2].partition(")")[0] for text in attempts]
    assert codes == ["2", "2", "-9", "1", ""]


def test_processes_that_do_not_meet_say_so_in_one_line(tmp_path: Path):
    end = subprocess.run(
        [sys.executable, "-c", "from torch_utils import distributed; distributed.init('cpu', patience_hours=1e-4)"],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith(
        "dnnlib.errors.ConfigError: the processes of this run do not find each other at 127.0.0.1:0 within 0:00:00.36"
    )
