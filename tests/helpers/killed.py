"""Python code that is killed at a chosen moment: at its n-th os.replace, which gives a file its final name."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")

_PRELUDE = """
import os, signal
from itertools import count
from pathlib import Path
real, calls = os.replace, count(1)
def replace(*args, **kwargs):
    if next(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
os.replace = replace
"""


def killed_at_replace(number: int, code: str) -> None:
    """Run `code`, in a process that dies by SIGKILL in place of its `number`-th os.replace."""
    command = [sys.executable, "-c", _PRELUDE.format(number=number) + code]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
