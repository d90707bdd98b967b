"""Faults of the file system at a chosen call, by tests/helpers/interposed.c."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = shutil.which("cc")
needs_interposing = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler, as `cc`"
)

COUNT, KILL, TEAR, KILL_ONE, VANISH = 0, -1, -2, -3, -4
FOREVER = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the calls `first` to `last` of some kinds, counted from 1; all that change something if empty.

    `action`: COUNT, nothing; KILL, SIGKILL to the group of processes; TEAR, the same after half of a write; KILL_ONE,
    SIGKILL to the process of the call alone; VANISH, the folder is renamed to FOLDER.away; an errno, the call fails.
    """

    action: int = COUNT
    first: int = 1
    last: int = FOREVER
    kinds: str = ""


def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    library = folder / "interposed.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True, timeout=120)
    return library


def arm(folder: Path, fault: Fault, *, log: int = -1) -> None:
    """Count the calls below `folder` from now on, in this process and those that it forks, and do the harm.

    The process must have been started with LD_PRELOAD. `log` is an open file that gets a line for each call.
    """
    arguments = [os.fsencode(folder), fault.kinds.encode(), fault.first, fault.last, fault.action, log]
    assert _library().arm(*arguments) == 0


def disarm() -> None:
    """Let all calls be as they were."""
    _library().disarm()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_long] * 2, *[ctypes.c_int] * 2]
    return library
