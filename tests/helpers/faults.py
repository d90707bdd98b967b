"""Harm done to real training runs: killed and signalled at random moments, then compared with a run left in peace.

`python -m tests.helpers.faults --kills=25 --aimed=8 --terms=5 --ranks=1` runs a piece of the long suite by hand;
`make faults`
runs all of it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import assert_same_state, write_dataset
from torch_utils.checkpoints.checkpoint import load_checkpoint
from training.presets import REPOSITORY_DIR

BATCH = 8
OPTIONS = [
    *("--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"),
    *(f"--batch={BATCH}", "--dropout=0.2", "--status=40", "--checkpoint=40", "--snapshot=56"),
]
_PATIENCE_SEC = 240.0
# What a run writes as it goes, as opposed to what it writes when it starts.
_AIMS = (".training-state", ".network-snapshot")


class Run:
    """A training run of `iterations` in `folder` on `ranks` processes, which is started again after each harm."""

    def __init__(
        self, folder: Path, data: Path, *extra: str, iterations: int, ranks: int = 1, restarts: int = 0
    ) -> None:
        self.folder = folder
        self.log = folder / "log.txt"
        options = [*OPTIONS, f"--data={data}", f"--outdir={folder}", f"--duration={iterations * BATCH}", *extra]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher = [*launcher, f"--max-restarts={restarts}"] if ranks > 1 else []
        self._command = [sys.executable, *launcher, str(REPOSITORY_DIR / "train_edm2.py"), *options]
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._output = folder.with_suffix(".out")
        self._ranks = ranks
        self._read = 0  # bytes of log.txt that are from before the last start of training that was waited for

    def start(self) -> None:
        """Start the processes; they are waited for by `end`."""
        self._read = self.log.stat().st_size if self.log.exists() else 0
        with open(self._output, "ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=os.name != "nt",
            )

    def finish(self) -> None:
        """Carry it to its end in peace, in processes that have torch already and no launcher."""
        run_ranks("train_edm2.py", *self._options, num=self._ranks, timeout=_PATIENCE_SEC)

    def await_training(self) -> bool:
        """Wait until iterations have begun once more; False where the run was finished, or ended before."""
        return self._await(lambda: b"Training for" in self._news())

    def await_line(self, text: str) -> bool:
        """Wait until a line with `text` was logged since the last start; False where the run ended before."""
        return self._await(lambda: text.encode() in self._news())

    def await_file(self) -> bool:
        """Wait until a checkpoint or snapshot is being written; False where the run ended before."""
        return self._await(lambda: any(name.startswith(_AIMS) and name.endswith(".tmp") for name in self._names()))

    def send(self, signum: int, rng: random.Random) -> bool:
        """Signal one of the processes that train, by chance; False where there is none any more."""
        assert self._process is not None
        try:
            children = psutil.Process(self._process.pid).children()
            targets = children if self._ranks > 1 else [psutil.Process(self._process.pid)]
            targets = [each for each in targets if "train_edm2.py" in " ".join(each.cmdline())]
            self._read = self.log.stat().st_size if self.log.exists() else 0
            rng.choice(targets).send_signal(signum)
        except (psutil.NoSuchProcess, IndexError):
            return False
        return True

    def send_to_all(self, signum: int) -> None:
        """Signal the whole group of processes, as a terminal does."""
        assert self._process is not None
        os.killpg(self._process.pid, signum)

    @property
    def pid(self) -> int:
        """Number of the process that was started."""
        assert self._process is not None
        return self._process.pid

    def end(self, patience_sec: float = _PATIENCE_SEC) -> int:
        """Wait for the end of the processes; the exit code."""
        assert self._process is not None
        try:
            return self._process.wait(patience_sec)
        except subprocess.TimeoutExpired:
            self.abandon()
            raise AssertionError(f"hangs: {self.tail()}") from None

    def abandon(self) -> None:
        """End whatever still runs."""
        if self._process is not None and self._process.poll() is None:
            for each in psutil.Process(self._process.pid).children(recursive=True):
                each.kill()
            self._process.kill()
            self._process.wait(timeout=120)

    def tail(self) -> str:
        """The last that was printed."""
        return self._output.read_bytes().decode(errors="replace")[-3000:]

    def _news(self) -> bytes:
        if not self.log.exists():
            return b""
        with open(self.log, "rb") as file:
            file.seek(self._read)
            return file.read()

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if self.folder.exists() else []

    def _await(self, happened: Callable[[], bool]) -> bool:
        assert self._process is not None
        end = time.monotonic() + _PATIENCE_SEC
        while not happened():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.abandon()
                raise AssertionError(f"nothing happens: {self.tail()}")
            time.sleep(0.001)
        return True


def harm(run: Run, kinds: Sequence[str], rng: random.Random, *, restarts: bool = False) -> Counter[str]:
    """Do what `kinds` says to the run, one after the other, then let it finish; what was really done, by kind.

    kill:  SIGKILL at a random moment, of the start-up now and then;
    aimed: SIGKILL while a checkpoint or snapshot is being written;
    term:  SIGTERM at a random moment of training, which must end the run with exit code 0.

    With `restarts` a launcher starts killed processes anew by itself. Stops early where the run is finished before all
    of it is done.
    """
    counts: Counter[str] = Counter()
    running = False
    for kind in kinds:
        if not running:
            run.start()
        if kind == "kill" and not restarts and rng.random() < 0.2:
            time.sleep(rng.uniform(0, 3))
        else:
            if not run.await_training():
                break
            if kind == "aimed":
                if not run.await_file():
                    break
                time.sleep(rng.choice([0, 0, rng.uniform(0, 0.01)]))
            else:
                time.sleep(rng.uniform(0, 0.8))
        sent = run.send(signal.SIGTERM if kind == "term" else signal.SIGKILL, rng)
        running = restarts and kind != "term"
        if running:
            counts[kind] += sent
            continue
        code = run.end()
        if kind == "term":
            assert code == 0, f"exit code {code}: {run.tail()}"
            counts[kind] += "Suspended at" in run.tail()[-1500:]
        elif code != 0:
            counts[kind] += 1
            counts["aimed, file left half written"] += kind == "aimed" and bool(_temporary(run.folder))
        if code == 0 and kind != "term":
            break  # finished before it could be harmed
    if running:
        code = run.end()
        assert code == 0, f"exit code {code}: {run.tail()}"
    else:
        run.finish()
    return counts


def compare(folder: Path, undisturbed: Path, *, losses: bool) -> None:
    """Assert that a run ended as the undisturbed one did, bit for bit, and left nothing else behind."""
    assert not _temporary(folder), _temporary(folder)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(undisturbed))
    ends = [load_checkpoint(_last(each, "training-state-*.pt")) for each in (folder, undisturbed)]
    for end in ends if not losses else []:
        end["stats"] = {}  # of the interval that was cut; several processes drop theirs
    assert_same_state(*ends)
    assert _lines(folder, losses=losses) == _lines(undisturbed, losses=losses)


def undisturbed_run(folder: Path, data: Path, *, iterations: int, ranks: int = 1) -> Path:
    """A run to compare with; its folder."""
    Run(folder, data, iterations=iterations, ranks=ranks).finish()
    return folder


def campaign(
    tmp: Path, *, kills: int = 0, aimed: int = 0, terms: int = 0, ranks: int = 1, seed: int = 0, iterations: int = 400
) -> Counter[str]:
    """So many harms on as many runs as they take; every run is compared with one left in peace. What was done."""
    data = write_dataset(tmp / "data.zip")
    whole = undisturbed_run(tmp / "undisturbed", data, iterations=iterations, ranks=ranks)
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    wanted = Counter({"kill": kills, "aimed": aimed, "term": terms})
    while left := [kind for kind, count in wanted.items() for _ in range(count - total[kind])]:
        rng.shuffle(left)
        run = Run(tmp / f"run{total['runs']}", data, iterations=iterations, ranks=ranks)
        try:
            total += harm(run, left, rng)
            compare(run.folder, whole, losses=ranks == 1)
        finally:
            run.abandon()
        total["runs"] += 1
        print(dict(total), flush=True)
    return total


def _temporary(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")] if folder.exists() else []


def _last(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern))


def _lines(folder: Path, *, losses: bool) -> list[tuple[float, ...]]:
    keys = ("Progress/kimg", "Loss/loss", "Loss/learning_rate") if losses else ("Progress/kimg",)
    lines = (folder / "stats.jsonl").read_text("utf-8").splitlines()
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in {"kills": 25, "aimed": 8, "terms": 5, "ranks": 1, "seed": 0, "iterations": 400}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    with tempfile.TemporaryDirectory() as folder:
        print(dict(campaign(Path(folder), **vars(parser.parse_args()))))
