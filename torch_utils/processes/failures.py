"""Failure of one process of a run: all end, and only the first cause is printed."""

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
# If all fail alike, process 0 should print the error: its line needs no process number.
_FIRST_RANK_SEC = 0.5
# Time for the process that failed first to print, so that a launcher sees its end before that of the others.
_PRINTING_SEC = 2.0
# Time for a launcher to see the end of a killed process, so that it reports that one and not those that noticed.
_LAUNCHER_SEC = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The failure that ended the run."""

    rank: int
    code: int  # exit code


def first_failure(store: torch.distributed.Store | None) -> Failure | None:
    """Return the first failure that a process of the run recorded, if any."""
    if store is not None:
        with contextlib.suppress(RuntimeError):  # the process that held the store is gone
            if store.check([_KEY]):
                return Failure(**json.loads(store.get(_KEY)))
    return None


def fail(error: BaseException, rank: int, store: torch.distributed.Store | None) -> None:
    """Call this on an exception `error` in a run of several processes, while it is handled.

    In the first process to fail this returns, so that the caller can re-raise and print; if a lost connection is all
    that is known, it raises LostContactError instead. In all others it raises SystemExit silently, because their errors
    are consequences of the first. In either case the process does not wait for the others when it exits, as PyTorch's
    process groups might.
    """
    lost = _is_lost_contact(error)
    code = 2 if isinstance(error, ConfigError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    if (lost or isinstance(error, ConfigError)) and rank > 0:
        end = time.monotonic() + _FIRST_RANK_SEC
        while store is not None and first_failure(store) is None and time.monotonic() < end:
            time.sleep(0.02)
    first = _record(Failure(rank=rank, code=code), store)
    atexit.register(_leave, first.code, _LAUNCHER_SEC if lost and first.rank == rank else 0.0)
    if first.rank != rank:
        time.sleep(_PRINTING_SEC)
        raise SystemExit(first.code) from None
    if isinstance(error, ConfigError):
        error.only_here = True
    elif lost:
        reason = str(error).strip().splitlines()[0].partition(". This is typically")[0]
        raise LostContactError(f"another process of the run is gone or does not answer: {reason}") from None


def _record(failure: Failure, store: torch.distributed.Store | None) -> Failure:
    if store is not None:
        with contextlib.suppress(RuntimeError):
            text = json.dumps({"rank": failure.rank, "code": failure.code})
            return Failure(**json.loads(store.compare_set(_KEY, "", text)))
    return failure


def _is_lost_contact(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return not isinstance(error, torch.distributed.DistBackendError) or "NCCL" in str(error)
    # Errors of gloo are plain RuntimeErrors that name its source file.
    return type(error) is RuntimeError and ("/gloo/" in str(error) or "Gloo" in str(error))


def _leave(code: int, linger_sec: float) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger_sec)
    os._exit(code)
