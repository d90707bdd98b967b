"""Python code that is killed at a chosen moment: at its n-th os.replace, which gives a file its final name."""

import itertools
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
from torch.multiprocessing import ProcessExitedException

from tests.helpers.ranks import run_members

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def killed_at_replace(number: int, code: str) -> None:
    """Run `code`, in a process that dies by SIGKILL in place of its `number`-th os.replace."""
    with pytest.raises(ProcessExitedException) as caught:
        run_members(_die, number, code, num=1)
    assert caught.value.signal_name == "SIGKILL"


def _die(rank: int, number: int, code: str) -> None:
    real, calls = os.replace, itertools.count(1)

    def replace(*args: str, **kwargs: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)

    with mock.patch.object(os, "replace", replace):
        exec(code, {"Path": Path})
