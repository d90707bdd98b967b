"""Commands that write files, harmed at each of their file-system calls: killed, or with calls that fail.

The same command again ends with the result of one that was left in peace, and nothing else is left behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.interposed import build, needs_interposing
from tests.helpers.operations import OPERATIONS
from tests.helpers.paths import ROOT

pytestmark = needs_interposing

# For a failure, each seventh moment: what matters is the kind of call.
_HARMS = (
    *("kill", "kill in the middle of a write", "kill one process:7", "disk full:7", "disk full for a moment:7"),
    *("I/O error", "interrupted call:7", "read-only:7", "folder gone:7"),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def moments(library: Path, operation: str, *harms: str, jobs: int = 1) -> dict[str, Any]:
    """Counts of the moments of an operation, all of which must end well."""
    args = [f"--operation={operation}", *(f"--harm={harm}" for harm in harms), f"--jobs={jobs}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.moments", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=3500,
    )
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-5000:]
    counts: dict[str, Any] = json.loads(done.stdout)
    problems = counts.pop("problems")
    assert not problems, "\n".join(problems)
    assert counts["tried"] == counts["equal"]
    return counts


def test_a_run_is_killed_at_a_dozen_of_its_calls(library: Path):
    assert moments(library, "train", "kill:15")["tried"]["kill"] >= 10


def test_a_conversion_meets_a_failure_of_each_rename_and_flush(library: Path):
    assert moments(library, "convert to a folder", "I/O error")["exit codes"]["2"] >= 3


@pytest.mark.faults
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_moment_of_a_command(library: Path, operation: str):
    print(f"\n{json.dumps(moments(library, operation, *_HARMS, jobs=2))}")
