"""What the processes of a run agree on while it goes on, without waiting for each other or for the device."""

from collections.abc import Callable

import torch
import torch.distributed

from torch_utils.distributed import World


class DelayedMaximum:
    """The largest of the numbers that all processes gave in the call before.

    Every process calls `exchange` once an iteration. That starts an exchange of one number, and gives the outcome of
    the exchange that the call before started: an iteration later it has long been done, so that nobody waits. All
    processes get the same answer in the same call, which is what lets them end after the same iteration, whoever knew
    of a reason. A process alone has its answer at once.

    On a GPU the number travels by NCCL, in a stream of its own. The host then waits for the iteration before the one it
    has just enqueued, so that the device always has work: it runs ahead by one iteration at the most, and by a little
    less where its processes are at different points. No second process group, and none of its network settings.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._outcome: Callable[[], int] | None = None
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" and world.size > 1 else None

    def exchange(self, value: int) -> int:
        """Give this process's number, >= 0; the largest of the last call's, 0 in the first call."""
        if self._world.size == 1:
            return value
        previous = self.settle()
        self._outcome = self._start(value) if self._stream is None else self._start_on_gpu(value, self._stream)
        return previous

    def settle(self) -> int:
        """The outcome of the exchange that is under way, 0 if there is none; to be called before the group ends."""
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
