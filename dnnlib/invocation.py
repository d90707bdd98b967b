"""The command that started this program, as the user would type it again."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


def invocation() -> str:
    """The command line of this program, quoted for the shell; with the launcher's, where one started it."""
    words = _launcher() or [Path(sys.executable).name, *sys.orig_argv[1:]]
    return quoted(words)


def quoted(words: Sequence[str]) -> str:
    """The words of a command line, quoted for the shell of this machine."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _launcher() -> list[str] | None:
    """The words of the torchrun command that started this process; None where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        parent = psutil.Process().parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    if not any(name in word for word in words for name in _LAUNCHERS):
        return None
    words[0] = Path(words[0]).name
    if len(words) > 1 and Path(words[1]).name == "torchrun":  # a script that Python runs
        words = ["torchrun", *words[2:]]
    return words
