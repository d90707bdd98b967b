"""Damaged files of every kind that is read here end in data that is intact, or in one line: no crash, no hang."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest

from dnnlib.errors import ConfigError
from tests.helpers import fuzz_run
from tests.helpers.fuzz_input import values_of_options
from tests.helpers.paths import ROOT
from training.posthoc.inputs import parse_std_list

SHORT, LONG = 200, 1000  # damaged inputs


def read_damaged(first: int, last: int, *only: str) -> list[dict[str, Any]]:
    """Outcomes of the seeds from `first` to `last` - 1; fails if the process does not finish."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.fuzz_run", str(first), str(last), *only]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Its own watchdog ends it much sooner.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last_line = lines[-1] if lines else "no line"
    assert done.returncode == 0, f"ended with {done.returncode} after {last_line}: {done.stderr[-3000:]}"
    return [line for line in lines if "outcome" in line]


def check(records: list[dict[str, Any]], count: int) -> None:
    """None is a bug or takes more than the bound; prints what came of them."""
    assert len(records) == count
    bugs = [record for record in records if record["outcome"] == "bug"]
    assert not bugs, f"{len(bugs)} bugs, first (python -m tests.helpers.fuzz_run N N+1): {bugs[0]}"
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        table[record["subject"]][record["outcome"]] += 1
    largest = max(records, key=lambda record: record["grown_kb"])
    longest = max(records, key=lambda record: record["sec"])
    print(f"\n{count} damaged inputs: {dict(Counter(record['outcome'] for record in records))}")
    for subject, outcomes in table.items():
        print(f"  {subject:24} {', '.join(f'{number} {outcome}' for outcome, number in sorted(outcomes.items()))}")
    print(f"most memory {largest['grown_kb']} kB for {largest['subject']} (seed {largest['seed']}), of", end=" ")
    print(f"{fuzz_run.LIMIT_KB} allowed; longest {longest['sec']} s (seed {longest['seed']})")
    assert largest["grown_kb"] <= fuzz_run.LIMIT_KB, largest
    assert all(record["sec"] < fuzz_run.LIMIT_SEC for record in records)
    assert {"refused", "same"} & {record["outcome"] for record in records}


def test_damaged_files_end_in_intact_data_or_one_line() -> None:
    check(read_damaged(0, SHORT), SHORT)


@pytest.mark.faults
def test_a_thousand_damaged_files_end_in_intact_data_or_one_line() -> None:
    check(read_damaged(SHORT, SHORT + LONG), LONG)


def test_every_option_takes_or_refuses_odd_values() -> None:
    outcomes = values_of_options()
    counts = Counter(outcome for each in outcomes.values() for outcome in each)
    print(f"\n{len(outcomes)} options and parsers: {dict(counts)}")
    assert len(outcomes) > 200 and set(counts) == {"taken", "refused"}


@pytest.mark.parametrize("text", ["0.1,0.1000000000000001,...,0.2", "1e-300,2e-300,...,0.2", "5e-324,1e-323,...,0.2"])
def test_a_list_that_would_fill_the_memory(text: str) -> None:
    with pytest.raises(ConfigError, match=r"has more than 10,000 lengths"):
        parse_std_list(text)


@pytest.mark.faults
@pytest.mark.parametrize("subject", ["options", "answers of a server", "results of metrics"])
def test_what_comes_from_elsewhere_ends_in_a_result_or_one_line(subject: str) -> None:
    """Every option of every script, headers of HTTP, files of results."""
    check(read_damaged(0, LONG, subject), LONG)


def test_a_seed_names_a_damaged_file() -> None:
    """Two processes do the same to the same files, so that what is found can be found again."""
    first, second = read_damaged(40, 60), read_damaged(40, 60)
    for a, b in zip(first, second, strict=True):
        assert [a[key] for key in ("seed", "subject", "target", "damage", "outcome")] == [
            b[key] for key in ("seed", "subject", "target", "damage", "outcome")
        ]
