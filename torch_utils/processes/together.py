"""Results, failures and decisions that all processes share, so that they continue or end together."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed

from dnnlib.errors import ConfigError, reason_of
from torch_utils.distributed import World

T = TypeVar("T")

Errors = type[BaseException] | tuple[type[BaseException], ...]


def on_main(world: World, work: Callable[[], T], *, errors: Errors = ConfigError) -> T:
    """Have the main process do `work`; return its result, which must be small, in every process.

    An exception of the types `errors` is raised in every process: in the others as an OSError or a ConfigError with the
    same text. To be called by every process.
    """
    result, failure = _attempt(work, errors) if world.is_main else (None, None)
    result, shared = world.all_gather_objects((result, _plain(failure)))[0]
    if shared is not None:
        raise failure or shared
    return result  # type: ignore[return-value]


def everywhere(world: World, work: Callable[[], T], *, errors: Errors = ConfigError) -> T:
    """Have every process do `work`; return this one's result, or raise in all the first error, as `on_main` does."""
    result, failure = _attempt(work, errors)
    failures = [each for each in world.all_gather_objects(_plain(failure)) if each is not None]
    if failures:
        raise failure if failure is not None and world.size == 1 else failures[0]
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T], errors: Errors) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except errors as error:
        return None, error


def _plain(error: BaseException | None) -> Exception | None:
    """`error` as it can be sent to other processes: without its subclass, traceback and attributes."""
    if isinstance(error, OSError):
        return OSError(error.errno, reason_of(error), error.filename and str(error.filename))
    return None if error is None else ConfigError(str(error))


class DelayedMaximum:
    """Exchanges a number among all processes, and gives the largest one a call later.

    Every process calls `exchange` once per iteration. The call starts an exchange and returns the outcome of the
    previous one, which has long finished, so that no process waits. All get the same answer in the same call, and can
    therefore end after the same iteration, even if only one has a reason. A single process gets its answer at once.

    On a GPU the number travels by NCCL in a separate stream. The host then waits for the iteration before the one that
    it just enqueued. It runs at most one iteration ahead, a little less if processes are at different points, and the
    device always has work. This needs no second process group with network settings of its own.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._outcome: Callable[[], int] | None = None
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" and world.size > 1 else None

    def exchange(self, value: int) -> int:
        """Start the exchange of `value` >= 0; return the maximum of the previous call, 0 in the first call."""
        if self._world.size == 1:
            return value
        previous = self.settle()
        self._outcome = self._start(value) if self._stream is None else self._start_on_gpu(value, self._stream)
        return previous

    def settle(self) -> int:
        """Finish a running exchange and return its outcome, else 0. Call this before the process group ends."""
        outcome, self._outcome = self._outcome, None
        return 0 if outcome is None else outcome()

    def _start(self, value: int) -> Callable[[], int]:
        number = torch.tensor([value], dtype=torch.int32, device=self._world.device)
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, async_op=True)

        def outcome() -> int:
            assert work is not None
            work.wait()
            return int(number.item())

        return outcome

    def _start_on_gpu(self, value: int, stream: torch.cuda.Stream) -> Callable[[], int]:
        with torch.cuda.stream(stream):
            number = torch.full([1], value, dtype=torch.int32, device=self._world.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            host.copy_(number, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)

        def outcome() -> int:
            done.synchronize()
            return int(host.item())

        return outcome
