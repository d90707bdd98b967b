"""Bodies of checks for tests of benchmarks/gpu_check: they pass, fail, raise, hang or die. No torch here."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_check.records import Finding, Setting


def passes(setting: Setting) -> Finding:
    """All is well, on the device that was asked for."""
    return Finding(passed=True, value=f"well on {setting.device}")


def measures(setting: Setting) -> Finding:
    """A number and a table."""
    rows = ({"way": "a|b", "ms": "1"}, {"way": "c", "ms": "2"})
    return Finding(passed=None, value="2 ms", rows=rows)


def fails(setting: Setting) -> Finding:
    """A bound is missed."""
    return Finding(passed=False, value="too slow")


def raises(setting: Setting) -> Finding:
    """A bug."""
    raise RuntimeError("first line\nsecond line")


def dies(setting: Setting) -> Finding:
    """A crash, as of a library."""
    os._exit(7)


def hangs(setting: Setting) -> Finding:
    """A kernel that never ends, and a process that it started; its id is in the file that `device` names."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(setting.device).write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    return Finding(passed=True, value="never")


def counts_down(setting: Setting) -> Finding:
    """The time that the check has."""
    return Finding(passed=None, value=f"{setting.seconds:.0f}" if 0 < setting.left() <= setting.seconds else "wrong")


def yields_and_hangs(setting: Setting) -> Iterator[Finding]:
    """Two findings, and no third."""
    yield Finding(passed=None, value="one")
    yield Finding(passed=True, value="one, two")
    time.sleep(600)


def yields(setting: Setting) -> Iterator[Finding]:
    """Two findings, of which the last counts."""
    yield Finding(passed=None, value="one")
    yield Finding(passed=True, value="one, two")
