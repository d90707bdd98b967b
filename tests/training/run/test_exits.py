"""Every way out of a training run with data workers ends all its processes in bounded time, with its exit code."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers.faults import Run
from tests.helpers.tiny import write_dataset

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@dataclass(frozen=True)
class Scene:
    """A run that trains: its data, its process started by the test, one that trains, and the workers of that one."""

    run: Run
    data: Path
    started: psutil.Process
    trainer: psutil.Process
    workers: list[psutil.Process]


def damage_items(scene: Scene) -> None:
    with open(scene.data, "r+b") as file:
        file.write(bytes(2000))


def shorten_data(scene: Scene) -> None:
    os.truncate(scene.data, 500)


def block_log(scene: Scene) -> None:
    (scene.run.folder / "stats.jsonl").unlink()
    (scene.run.folder / "stats.jsonl").mkdir()


# What happens; exit codes of one process and of torchrun; what is printed.
WAYS: dict[str, tuple[Callable[[Scene], object], int, int, str]] = {
    "a damaged item": (damage_items, 2, 1, "Error: "),
    "shorter data": (shorten_data, 2, 1, "Error: "),
    "a killed worker": (lambda scene: scene.workers[-1].kill(), 2, 1, "was killed by signal"),
    "an exception in the loop": (block_log, 2, 1, "stats.jsonl"),
    "^C": (lambda scene: scene.run.send_to_all(signal.SIGINT), 130, 1, "Suspended at"),
    "SIGTERM": (lambda scene: scene.trainer.terminate(), 0, 0, "Suspended at"),
    "a killed process": (lambda scene: scene.started.kill(), -9, -9, ""),
}


def require_end(tmp_path: Path, way: str, *, workers: int, ranks: int) -> None:
    act, alone, launched, line = WAYS[way]
    data = write_dataset(tmp_path / "data.zip")
    run = Run(tmp_path / "run", data, "--status=8", f"--workers={workers}", iterations=100_000, ranks=ranks)
    run.start()
    everyone: list[psutil.Process] = []
    try:
        assert run.await_training() and run.await_line("kimg ")
        started = psutil.Process(run.pid)
        everyone = [started, *started.children(recursive=True)]
        trainer = next(each for each in everyone[ranks > 1 :] if each.cmdline()[-1] == f"--workers={workers}")
        loaders = [each for each in trainer.children() if any("spawn_main" in word for word in each.cmdline())]
        assert len(loaders) == workers
        act(Scene(run, data, started, trainer, loaders))
        code = run.end(60)
        assert code == (alone if ranks == 1 else launched), run.tail()
        _, left = psutil.wait_procs(everyone, timeout=60)
        assert not left
    finally:
        for each in everyone:
            if each.is_running():
                each.kill()
        run.abandon()
    text = run.tail()
    assert line in text
    if ranks == 1:  # torchrun has tracebacks of its own
        assert "Traceback" not in text
        assert text.count("Error: ") == (alone == 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["a killed worker", "an exception in the loop"])
def test_a_run_with_workers_ends(tmp_path: Path, way: str):
    require_end(tmp_path, way, workers=1, ranks=1)


@pytest.mark.slow
def test_processes_without_their_launcher_end_with_a_checkpoint(tmp_path: Path):
    require_end(tmp_path, "a killed process", workers=0, ranks=2)
    assert list((tmp_path / "run").glob("training-state-*"))


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_every_way(tmp_path: Path, way: str, workers: int, ranks: int):
    require_end(tmp_path, way, workers=workers, ranks=ranks)
