"""When a session of a training run ends before the run does, and why; the same for all of its processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch_utils import distributed
from torch_utils.distributed import World
from torch_utils.processes import stopping
from torch_utils.processes.agreement import DelayedMaximum
from training.config import TrainingConfig


class Cause(IntEnum):
    """Why a session ends; of two causes in the same iteration the larger number counts."""

    SLICE = 1  # --slice images were seen
    SIGNAL = 2  # SIGTERM, SIGINT or SIGUSR1 came
    SUSPEND = 3  # should_suspend
    STOP = 4  # should_stop
    NONFINITE = 5  # loss or gradients are no numbers any more


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The session ends before the run does; a checkpoint was written if there was anything to save."""

    nimg: int
    cause: Cause
    signum: int | None = None  # of SIGNAL
    explanation: str = ""  # of NONFINITE

    @property
    def is_final(self) -> bool:
        """Whether the run is to end here, and not only this session of it."""
        return self.cause == Cause.STOP


class Session:
    """What may end a session that starts at `nimg` images. All processes get the same answers in the same iteration.

    A process alone ends after the iteration in which it was asked to. Several learn of each other's wishes an iteration
    late (`DelayedMaximum`), and all of them end after that one.
    """

    def __init__(self, config: TrainingConfig, world: World, *, nimg: int) -> None:
        self._config = config
        self._world = world
        self._end_nimg = None if config.slice is None else nimg + config.slice
        self._agreement = DelayedMaximum(world)
        self._bad_intervals: list[str] = []  # what was wrong in the last status intervals, one by one

    def before_start(self, nimg: int) -> Ended | None:
        """Whether there is to be no iteration at all. Waits for all processes."""
        return self._ended(max(self._world.all_gather_objects(_wish())), nimg)

    def after_iteration(self, nimg: int) -> Ended | None:
        """Whether the iteration just taken was the session's last. To be called once for each."""
        wish = self._agreement.exchange(_wish())
        if wish == 0 and self._end_nimg is not None and nimg >= self._end_nimg:
            return Ended(nimg=nimg, cause=Cause.SLICE)
        return self._ended(wish, nimg)

    def after_status(self, nimg: int, loss: float, lost: Sequence[str]) -> Ended | None:
        """Whether the run goes nowhere: `loss` is the interval's mean, `lost` names the parameters whose gradients had
        no finite element in its last iteration."""
        problem = "" if abs(loss) < float("inf") else f"the mean loss was {loss}"  # also where it is NaN
        if lost:
            more = f" and {len(lost) - 1} more parameters" if len(lost) > 1 else ""
            problem += f"{' and ' if problem else ''}the gradient of {lost[0]}{more} had no finite element"
        if not problem:
            self._bad_intervals.clear()
            return None
        self._bad_intervals.append(problem)
        if self._config.on_nonfinite != "stop" or len(self._bad_intervals) < self._config.nonfinite_limit:
            return None
        explanation = (
            f"In each of the last {len(self._bad_intervals)} status intervals something was not finite; in the last"
            f" one, {problem}."
        )
        return Ended(nimg=nimg, cause=Cause.NONFINITE, explanation=explanation)

    @property
    def in_doubt(self) -> bool:
        """Whether something was not finite in the last status interval, which may come to stop the run."""
        return self._config.on_nonfinite == "stop" and bool(self._bad_intervals)

    def close(self) -> None:
        """Wait for what is under way between the processes, and take the request that was honoured as done."""
        self._agreement.settle()
        stopping.REQUEST.clear()

    def _ended(self, wish: int, nimg: int) -> Ended | None:
        if wish == 0:
            return None
        cause, signum = divmod(wish, _SIGNALS_END)
        return Ended(nimg=nimg, cause=Cause(cause), signum=signum or None)


_SIGNALS_END = 256  # above the numbers of all signals


def _wish() -> int:
    """What this process knows to end the session, as one number that can be compared; 0 = nothing."""
    if distributed.should_stop():
        return Cause.STOP * _SIGNALS_END
    if not distributed.should_suspend():
        return 0
    signum = stopping.REQUEST.signum
    if signum is None:
        return Cause.SUSPEND * _SIGNALS_END
    return Cause.SIGNAL * _SIGNALS_END + signum
