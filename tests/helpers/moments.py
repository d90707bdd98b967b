"""A command is harmed at each of its file-system calls in turn, run again, and compared with one in peace.

`LD_PRELOAD=interposed.so python -m tests.helpers.moments --operation=train --harm=kill` prints counts and what went
wrong; tests/helpers/interposed.py builds the library. This process imports torch once and forks for each run.
"""

import argparse
import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed

from dnnlib.atomic import TEMPORARY
from tests.helpers.contents import contents, require_whole
from tests.helpers.interposed import FOREVER, KILL, KILL_ONE, TEAR, VANISH, Fault, arm, disarm
from tests.helpers.operations import OPERATIONS, Operation, make_input
from tests.helpers.paths import ROOT
from tests.helpers.stand_in_detector import StandInDetector
from training.metrics import available

# Everything that the commands import as they go.
_PRELOADED = (
    *("train_edm2", "dataset_tool", "generate_images", "reconstruct_phema", "sweep", "calculate_metrics"),
    *("convert_snapshot", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"),
    *("torch.utils.tensorboard", "pyspng", "encodings.ascii", "encodings.cp437", "torch.utils.serialization.config"),
    *("matplotlib.figure", "matplotlib.backends.backend_svg", "torch_utils.checkpoints.sharded"),
)
_PATIENCE_SEC = 60
_ERROR = re.compile(r"Error(?: \(process \d+\))?: ")
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Faults at each call of some kinds in turn, or from there on if `lasting`."""

    action: int
    kinds: str = ""
    lasting: bool = False
    ranks: int = 1  # needs as many processes
    leaves_nothing: bool = False  # of half-written files, since the calls that remove them succeed

    def moments(self, kinds: list[str]) -> list[Fault]:
        """Return a fault for each call; `kinds` are those of a run in peace."""
        number = sum(not self.kinds or kind in self.kinds.split() for kind in kinds)
        return [
            Fault(action=self.action, kinds=self.kinds, first=k, last=FOREVER if self.lasting else k)
            for k in range(1, number + 1)
        ]


HARMS = {
    "kill": Harm(action=KILL),
    "kill in the middle of a write": Harm(action=TEAR, kinds="write"),
    "kill one process": Harm(action=KILL_ONE, ranks=2),
    "disk full": Harm(action=errno.ENOSPC, kinds="open write mkdir link rename", lasting=True),
    "disk full for a moment": Harm(action=errno.ENOSPC, kinds="open write mkdir link rename", leaves_nothing=True),
    "I/O error": Harm(action=errno.EIO, kinds="fsync rename", leaves_nothing=True),
    "interrupted call": Harm(action=errno.EINTR),
    "read-only": Harm(action=errno.EROFS, lasting=True),
    "folder gone": Harm(action=VANISH),
}


class Command:
    """An operation in folders of its own, run as often as wanted."""

    def __init__(self, operation: Operation, inputs: Path, folder: Path) -> None:
        self.operation = operation
        self.out = folder / "out"
        self.text = ""  # printed by the last run
        self._away = folder / "out.away"
        self._inputs = inputs
        self._args = [arg.format(inputs=inputs) for arg in operation.args]

    def prepare(self) -> None:
        """Make `out` as it is before the first run."""
        for folder in (self.out, self._away):
            shutil.rmtree(folder, ignore_errors=True)
        self.out.mkdir(parents=True)
        if self.operation.existing:
            shutil.copy(self._inputs / self.operation.existing, self.out)

    def run(self, fault: Fault | None = None, *, log: int = -1) -> int:
        """Run it, with a fault or without, and return the exit code; a folder that vanished comes back afterwards."""
        if fault is not None:
            arm(self.out, fault, log=log)
        output = self.out.with_name("output.txt")
        child = _FORK.Process(target=self._lead, args=(output,))
        child.start()
        child.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        disarm()
        if self._away.exists():
            if self.out.exists():  # made again, as a folder that is missing is
                shutil.rmtree(self._away)
            else:
                self._away.rename(self.out)
        self.text = output.read_text("utf-8", errors="replace")
        assert child.exitcode is not None
        return child.exitcode

    def left(self) -> list[str]:
        """List temporary files and folders."""
        return [str(path.relative_to(self.out)) for path in self.out.rglob(".*") if TEMPORARY.fullmatch(path.name)]

    def _lead(self, output: Path) -> None:
        os.setpgid(0, 0)
        with open(output, "wb") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
        os.chdir(self.out.parent)
        if self.operation.ranks == 1:
            self._script()
        _as_torchrun([partial(self._member, rank) for rank in range(self.operation.ranks)])

    def _member(self, rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.operation.ranks)}
        self._script()

    def _script(self) -> None:
        faulthandler.dump_traceback_later(_PATIENCE_SEC, exit=True)  # hangs
        sys.argv = [self.operation.script, *self._args]
        runpy.run_path(str(ROOT / self.operation.script), run_name="__main__")
        sys.exit(0)


def _as_torchrun(members: list[Callable[[], None]]) -> None:
    """Run the processes of one run; where one fails, ask the others to end, and exit with its code."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    running = [_FORK.Process(target=member) for member in members]
    for process in running:
        process.start()
    code = 0
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        failed = [process.exitcode for process in ended if process.exitcode]
        if failed and not code:
            code = failed[0] or 0
            for process in running:
                process.terminate()
    sys.exit(code if code >= 0 else 128 - code)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a command that was harmed, and run again."""

    harm: str
    fault: Fault
    code: int  # of the harmed run
    left: list[str]  # temporary files after it
    problem: str = ""


class Campaign:
    """All moments of one operation."""

    def __init__(self, operation: Operation, folder: Path) -> None:
        self._inputs = folder / "inputs"
        self._folder = folder
        self._operation = operation
        self._inputs.mkdir()
        _in_child(self._make_inputs)
        command = self._command()
        command.prepare()
        with open(folder / "calls.txt", "w+b") as log:
            assert command.run(Fault(), log=log.fileno()) == 0, command.text
            log.seek(0)
            self.log = log.read().decode().splitlines()
        self._kinds = [line.split()[1] for line in self.log]
        self._expected = contents(command.out)
        code = command.run()
        assert code in operation.again and contents(command.out) == self._expected, command.text

    def moments(self, harms: list[str]) -> list[tuple[str, Fault]]:
        """Return the moments of some harms; `NAME:N` means each N-th of them."""
        found = []
        for text in harms:
            name, _, every = text.partition(":")
            if HARMS[name].ranks <= self._operation.ranks:
                found += [(name, fault) for fault in HARMS[name].moments(self._kinds)[:: int(every or 1)]]
        return found

    def trial(self, moment: tuple[str, Fault]) -> Trial:
        """Harm the command once."""
        harm, fault = moment
        command = self._command()
        command.prepare()
        code = command.run(fault)
        left, text = command.left(), command.text
        try:
            if HARMS[harm].leaves_nothing:
                assert not left, f"left behind by the harm: {left}"
            self._judge(command, code, text)
            problem = ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:4000]
        return Trial(harm=harm, fault=fault, code=code, left=left, problem=problem)

    def _judge(self, command: Command, code: int, text: str) -> None:
        """Raise if the harmed run said or left something wrong, or if the second one does not end as in peace."""
        assert code in (0, 2, -signal.SIGKILL, 128 + signal.SIGKILL), f"exit code {code}: {text[-1500:]}"
        assert "Traceback" not in text, text
        assert code not in (0, 2) or len(_ERROR.findall(text)) == code // 2, text[-1500:]
        require_whole(command.out)
        again = command.run()
        assert again in (0, *self._operation.again), f"exit code {again} of the second run: {command.text[-1500:]}"
        found, expected = contents(command.out), self._expected
        if "without this sample grid" in text:  # a run continues without it
            expected = {name: value for name, value in expected.items() if name in found or "samples-" not in name}
        if code < 0:  # killed before it deleted an older checkpoint, which the next save does
            found = {name: value for name, value in found.items() if name in expected or "training-state-" not in name}
        _compare(found, expected)

    def _make_inputs(self) -> None:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where only the counts go
        for name in self._operation.needs:
            make_input(self._inputs, name)

    def _command(self) -> Command:
        return Command(self._operation, self._inputs, self._folder / str(os.getpid()))


def _compare(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    missing, more = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    assert not missing and not more, f"missing {sorted(missing)}, left behind {sorted(more)}"
    different = {name: (actual[name], value) for name, value in expected.items() if actual[name] != value}
    assert not different, f"different: {different}"


def _in_child(function: Callable[[], None]) -> None:
    child = _FORK.Process(target=function)
    child.start()
    child.join()
    assert child.exitcode == 0


def _start() -> None:
    """Import what the commands import, and put a detector without weights in the place of the others."""
    for name in _PRELOADED:
        importlib.import_module(name)
    mock.patch.object(available, "make_detector", lambda name, device, weights=None: StandInDetector(name)).start()
    gc.collect()
    gc.freeze()


def main() -> int:
    """Print a line of JSON for each operation; return 1 if a moment went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--operation", action="append", choices=[*OPERATIONS], required=True)
    parser.add_argument("--harm", action="append", help="NAME or NAME:N for each N-th moment; all without")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", action="store_true", help="print the calls of the run in peace")
    args = parser.parse_args()
    _start()
    failed = False
    for name in args.operation:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, mp_context=_FORK) as pool:
            start = time.monotonic()
            campaign = Campaign(OPERATIONS[name], Path(folder))
            if args.log:
                print("\n".join(campaign.log))
            trials = list(pool.map(campaign.trial, campaign.moments(args.harm or [*HARMS])))
        problems = [f"{trial.harm}, call {trial.fault.first}: {trial.problem}" for trial in trials if trial.problem]
        record = {
            "operation": name,
            "calls": len(campaign.log),
            "tried": Counter(trial.harm for trial in trials),
            "equal": Counter(trial.harm for trial in trials if not trial.problem),
            "exit codes": Counter(trial.code for trial in trials),
            "files left by the harm": sum(len(trial.left) for trial in trials),
            "seconds": round(time.monotonic() - start),
            "problems": problems,
        }
        print(json.dumps(record), flush=True)
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    exit_code = main()
    os._exit(exit_code)  # without the complaints of libraries at the interpreter's end
