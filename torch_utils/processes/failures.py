"""One process of a run fails: all of them end, and the first cause is on the screen, once."""

import atexit
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass

import torch.distributed

from dnnlib.errors import ConfigError, LostContactError

_KEY = "first_failure"
# The first process's error line is the one without a process number: where all fail alike, let it be the one to speak.
_FIRST_RANK_SEC = 0.5
# What the process that failed first needs to print, so that a launcher sees its end before that of the others.
_PRINTING_SEC = 2.0
# What a launcher needs to see the end of a killed process, so that it reports that one and not those who noticed.
_LAUNCHER_SEC = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the run."""

    rank: int
    code: int  # exit code


def first_failure(store: torch.distributed.Store | None) -> Failure | None:
    """The first failure that a process of the run noted, if any."""
    if store is not None:
        with contextlib.suppress(RuntimeError):  # it is gone with the process that held it
            if store.check([_KEY]):
                return Failure(**json.loads(store.get(_KEY)))
    return None


def fail(error: BaseException, rank: int, store: torch.distributed.Store | None) -> None:
    """End this process because of `error`, the exception that is being handled: to be called by a group of processes.

    The first process to come here returns, or raises LostContactError where a lost connection is all that is known; it
    is to let the exception go on its way to the screen. The others raise SystemExit and say nothing: what they have to
    tell follows from the first failure. In either case the process will not wait for the others when it ends, as
    PyTorch's process groups might.
    """
    lost = _is_lost_contact(error)
    code = 2 if isinstance(error, ConfigError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    if (lost or isinstance(error, ConfigError)) and rank > 0:
        _wait_for_a_failure(store, _FIRST_RANK_SEC)
    first = _note(Failure(rank=rank, code=code), store)
    atexit.register(_leave, first.code, _LAUNCHER_SEC if lost and first.rank == rank else 0.0)
    if first.rank != rank:
        time.sleep(_PRINTING_SEC)
        raise SystemExit(first.code) from None
    if isinstance(error, ConfigError):
        error.only_here = True
    elif lost:
        raise LostContactError(f"another process of the run is gone or does not answer: {_first_line(error)}") from None


def _note(failure: Failure, store: torch.distributed.Store | None) -> Failure:
    """Put `failure` down as the first one, unless there is one already; the first one."""
    if store is not None:
        with contextlib.suppress(RuntimeError):
            text = json.dumps({"rank": failure.rank, "code": failure.code})
            return Failure(**json.loads(store.compare_set(_KEY, "", text)))
    return failure


def _wait_for_a_failure(store: torch.distributed.Store | None, seconds: float) -> None:
    end = time.monotonic() + seconds
    while store is not None and first_failure(store) is None and time.monotonic() < end:
        time.sleep(0.02)


def _is_lost_contact(error: BaseException) -> bool:
    """Whether `error` is how PyTorch reports the silence or the end of another process."""
    if isinstance(error, torch.distributed.DistError):
        return not isinstance(error, torch.distributed.DistBackendError) or "NCCL" in str(error)
    # gloo's are plain RuntimeErrors that name its source file.
    return type(error) is RuntimeError and ("/gloo/" in str(error) or "Gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].partition(". This is typically")[0]


def _leave(code: int, linger_sec: float) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger_sec)
    os._exit(code)
