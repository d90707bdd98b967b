"""Signals ask a session to end; a second one ends the process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.helpers.interrupts import heeded_interrupts
from tests.helpers.paths import ROOT
from torch_utils import distributed
from torch_utils.processes.stopping import REQUEST, SIGNALS, StopRequest, handled_signals, spared_children

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")

WAITING = """
import sys, time
from torch_utils.processes.stopping import REQUEST, handled_signals
with handled_signals(lambda signum: print(signum.name, flush=True)):
    print("ready", flush=True)
    while sys.stdin.readline() == "go on\\n":
        pass
    print(REQUEST.asked)
"""


def waiting_process(**env: str) -> subprocess.Popen[str]:
    """A process that handles signals until a line other than 'go on' arrives on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert process.stdout.readline() == "ready\n"
    return process


@posix
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_asks_once_and_handlers_are_put_back(signum: signal.Signals):
    before = [signal.getsignal(each) for each in SIGNALS]
    request, heard, told = StopRequest(), [], threading.Event()

    def on_first(signum: signal.Signals) -> None:
        heard.append(signum)
        told.set()

    with handled_signals(on_first, request):
        assert not request.asked
        os.kill(os.getpid(), signum)
        assert told.wait(60)
        assert (request.asked, request.signum, heard) == (True, signum, [signum])
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@posix
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_process_that_waits_inside_of_a_library(signum: signal.Signals, code: int):
    process = waiting_process()
    process.send_signal(signum)
    assert process.stdout.readline() == f"{signum.name}\n"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")


@posix
def test_under_torchrun_the_echo_of_a_signal_is_no_second_one():
    process = waiting_process(TORCHELASTIC_RUN_ID="none")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        process.stdin.write("go on\n")
        process.stdin.flush()
    output, _ = process.communicate("end\n", timeout=60)
    assert (process.returncode, output) == (0, "True\n")


@posix
def test_a_background_command_of_a_shell_goes_on_ignoring_interrupts():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled_signals(lambda signum: None):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, previous)


@posix
def test_in_a_background_command_the_children_of_tests_heed_interrupts():
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded_interrupts():
            assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "True\n"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_than_the_main_one_handle_none():
    def enter() -> None:
        with handled_signals(lambda signum: None):
            handlers.append(signal.getsignal(signal.SIGTERM))

    before, handlers = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before]


@posix
def test_processes_that_are_spared_inherit_blocked_signals():
    with spared_children():
        assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_suspension_can_be_requested_from_the_program():
    assert not distributed.should_suspend()
    distributed.request_suspend()
    assert distributed.should_suspend() and not distributed.should_stop()
    REQUEST.clear()
    assert not distributed.should_suspend()
