"""Run checks one after the other, each in a process of its own that is killed at its time limit. No torch here.

A kernel that hangs, or one that breaks the CUDA context, then costs its own check and no other.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil

from benchmarks.gpu_check.records import Body, Check, Finding, Result, Row, Setting, Verdict
from dnnlib.errors import one_line

_LEAST_SEC = 5.0  # a check is not begun with less
_NORMAL_MINUTES = 8.0  # with more in all, each check may take longer, too
_JOIN_SEC = 5.0  # for a killed process to go; in a driver that hangs it may stay


def run_checks(checks: Sequence[Check], setting: Setting, *, minutes: float) -> Iterator[Result]:
    """Yield the result of each check, in order; those that `minutes` leave no time for are not run."""
    end = time.monotonic() + 60 * minutes
    for check in checks:
        left = end - time.monotonic()
        if setting.gpus < check.gpus:
            yield _result(check, "NOT RUN", f"needs {check.gpus} GPUs, {setting.gpus} here")
        elif left < _LEAST_SEC:
            yield _result(check, "NOT RUN", f"the time of --minutes={minutes:g} is over")
        else:
            limit = min(left, check.seconds * max(1.0, minutes / _NORMAL_MINUTES))
            yield run_check(check, replace(setting, seconds=limit))


def run_check(check: Check, setting: Setting) -> Result:
    """Run one check in a process of its own, for at most `setting.seconds`."""
    start = time.monotonic()
    context = _context()
    receiver, sender = context.Pipe()
    process = context.Process(target=_work, args=(sender, check.body, setting))
    process.start()
    sender.close()
    try:
        finding = _answer(receiver, process, setting.seconds)
    finally:
        _end(process)
        receiver.close()
    verdict: Verdict = "NUMBER" if finding.passed is None else "PASS" if finding.passed else "FAIL"
    return _result(check, verdict, finding.value, seconds=time.monotonic() - start, rows=finding.rows)


def _result(check: Check, verdict: Verdict, value: str, seconds: float = 0.0, rows: tuple[Row, ...] = ()) -> Result:
    return Result(
        name=check.name,
        title=check.title,
        expected=check.expected,
        verdict=verdict,
        value=value,
        seconds=seconds,
        rows=rows,
    )


def _answer(receiver: multiprocessing.connection.Connection, process: Any, seconds: float) -> Finding:
    """Wait for the last finding of the process; its end without one, and its silence, are failures."""
    end = time.monotonic() + seconds
    found: Finding | None = None
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            found, is_last = receiver.recv()
            if is_last:
                return found
    except EOFError:
        process.join(_JOIN_SEC)
        return Finding(passed=False, value=f"the process ended with code {process.exitcode} and no result")
    if found is None:
        return Finding(passed=False, value=f"no result within {seconds:.0f} s")
    # What is missing may only take longer: compiling does on another machine.
    return replace(found, passed=found.passed and None, value=f"{found.value}; no more within {seconds:.0f} s")


def _work(sender: Any, body: Body, setting: Setting) -> None:
    """Run `body` in the new process and send its findings; an exception is a failure."""
    if hasattr(os, "setsid"):
        os.setsid()  # processes that the check starts are killed along with it
    try:
        found = body(replace(setting, until=time.monotonic() + setting.seconds))
        last = found if isinstance(found, Finding) else None
        for finding in () if isinstance(found, Finding) else found:
            sender.send((finding, False))
            last = finding
        sender.send((last, True))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        sender.send((Finding(passed=False, value=f"{type(error).__name__}: {one_line(error)}"), True))
    with contextlib.suppress(EOFError):
        sender.recv()  # stay until killed: what the check started can be found as long as its parent lives


def _end(process: Any) -> None:
    """End the process and what it started. One that does not even die by a kill is left behind."""
    with contextlib.suppress(psutil.Error):
        # torchrun starts its workers in sessions of their own.
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join(_JOIN_SEC)


def _context() -> Any:
    """Return how processes start: from a server that has torch imported already, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")
