"""Records of the checks: what one is, what it finds, and the report of a run. No torch here."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from dnnlib import atomic
from dnnlib.errors import ConfigError

# A check passes, fails, only reports a number, or does not fit the remaining time.
Verdict = Literal["PASS", "FAIL", "NUMBER", "NOT RUN"]
Row = dict[str, str]

_FORMAT = "edm2 gpu_check 1"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a check runs and for how long. `tiny` sizes let a test run the same code on a CPU."""

    device: str = "cuda"
    gpus: int = 1  # of this machine
    seconds: float = math.inf  # until the check is ended from outside
    until: float = math.inf  # the same as a time of time.monotonic()
    tiny: bool = False

    def left(self) -> float:
        """Return the seconds that remain: a check leaves out what would take longer."""
        return self.until - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of a check. `passed` is None for a number without a bound; `rows` is a table with equal columns."""

    passed: bool | None
    value: str
    rows: tuple[Row, ...] = ()


Body = Callable[[Setting], Finding | Iterator[Finding]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check. `body` is a function at the top of a module: another process imports and calls it.

    A body that yields several findings has the last one as its result, even if it is ended at its limit after that.
    """

    name: str
    title: str
    expected: str
    seconds: float  # limit
    body: Body
    gpus: int = 1  # that it needs


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the report."""

    name: str
    title: str
    expected: str
    verdict: Verdict
    value: str
    seconds: float
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results of one run."""

    date: str
    machine: str
    results: tuple[Result, ...]

    @property
    def num_failures(self) -> int:
        """The number of failed checks, which is the exit code."""
        return sum(result.verdict == "FAIL" for result in self.results)


def write_report(report: Report, path: str) -> None:
    """Write `report` as JSON, completely or not at all."""
    atomic.write_text(path, json.dumps({"format": _FORMAT, **asdict(report)}, indent=1) + "\n")


def read_report(path: str) -> Report:
    """Read the report of `write_report`. Raises ConfigError for any other file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        results = tuple(Result(**{**item, "rows": tuple(item["rows"])}) for item in data["results"])
        if not all(result.verdict in get_args(Verdict) for result in results):
            raise ValueError("unknown verdict")
        return Report(date=data["date"], machine=data["machine"], results=results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--table={path} is not a report of benchmarks.gpu_check: {error}") from None
