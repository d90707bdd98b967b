"""A run that is killed or told to go ends with the weights of one that was left in peace.

The short form runs with every `make test`; the long one, `make faults`, counts a hundred kills.
"""

import os
import random
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.faults import Run, campaign, compare, harm, undisturbed_run
from tests.helpers.tiny import write_dataset

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.mark.slow
def test_a_run_survives_kills_and_a_sigterm(tmp_path: Path):
    counts = campaign(tmp_path, kills=1, aimed=1, terms=1, iterations=100)
    assert (counts["kill"], counts["aimed"], counts["term"]) == (1, 1, 1)


@pytest.mark.slow
def test_an_interrupt_at_the_terminal_leaves_workers_to_finish_the_iteration(tmp_path: Path):
    data = write_dataset(tmp_path / "data.zip")
    run = Run(tmp_path / "run", data, "--workers=1", iterations=100_000)
    run.start()
    try:
        assert run.await_training()  # the worker is just being started
        run.send_to_all(signal.SIGINT)
        assert run.end() == 130
    finally:
        run.abandon()
    text = run.tail()
    assert "Traceback" not in text and "SIGINT: ending after this iteration" in text
    # The thread that watches for signals may write its line after this one.
    assert re.search(r"Suspended at \d+\.\d+ kimg: SIGINT\. To continue: python.* --workers=1", text)
    # None where the signal came before the first iteration; else the one that was told.
    saved = list(run.folder.glob("training-state-*"))
    assert len(saved) == text.count("Saved training-state-") <= 1


@pytest.mark.slow
def test_two_processes_survive_a_kill_under_torchrun_and_a_sigterm_to_one_of_them(tmp_path: Path):
    counts = _killed_under_torchrun(tmp_path, ["kill", "term"], iterations=120)
    assert (counts["kill"], counts["term"]) == (1, 1)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_a_run_survives_a_hundred_kills_thirty_of_them_while_it_writes(tmp_path: Path, seed: int):
    aimed = (8, 8, 7, 7)[seed]
    counts = campaign(tmp_path, kills=25 - aimed, aimed=aimed, seed=seed)
    assert counts["kill"] + counts["aimed"] >= 25 and counts["aimed"] >= aimed
    print(f"\nPart {seed + 1} of 4: {dict(counts)}")


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_survives_ten_sigterms(tmp_path: Path, ranks: int):
    counts = campaign(tmp_path, terms=10, ranks=ranks)
    assert counts["term"] >= 10
    print(f"\n{ranks} process(es): {dict(counts)}")


@pytest.mark.faults
def test_two_processes_survive_kills_under_torchrun(tmp_path: Path):
    counts = _killed_under_torchrun(tmp_path, ["kill"] * 5, iterations=400)
    assert counts["kill"] >= 3
    print(f"\n2 processes under torchrun: {dict(counts)}")


def _killed_under_torchrun(tmp_path: Path, kinds: list[str], *, iterations: int) -> Counter[str]:
    data = write_dataset(tmp_path / "data.zip")
    whole = undisturbed_run(tmp_path / "undisturbed", data, iterations=iterations, ranks=2)
    run = Run(tmp_path / "run", data, iterations=iterations, ranks=2, restarts=len(kinds))
    try:
        counts = harm(run, kinds, random.Random(0), restarts=True)
    finally:
        run.abandon()
    compare(run.folder, whole, losses=False)
    return counts
