"""The logic of benchmarks/gpu_check without a GPU: order, limits, failures of all sorts, table, JSON, exit code."""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check.records import Check, Report, Result, Setting, read_report, write_report
from benchmarks.gpu_check.runner import run_check, run_checks
from benchmarks.gpu_check.tables import markdown, text_table
from dnnlib.errors import ConfigError
from tests.helpers import fake_checks
from tests.helpers.paths import ROOT

HERE = Setting(device="stand-in", seconds=60)


def check(name: str, body, *, seconds: float = 60, gpus: int = 1) -> Check:
    return Check(name=name, title=f"title of {name}", expected="all well", seconds=seconds, body=body, gpus=gpus)


def test_checks_run_in_order_and_one_that_fails_leaves_the_others_alone():
    bodies = {"A": fake_checks.raises, "B": fake_checks.dies, "C": fake_checks.fails, "D": fake_checks.passes}
    results = list(run_checks([check(name, body) for name, body in bodies.items()], HERE, minutes=8))
    assert [(r.name, r.verdict) for r in results] == [("A", "FAIL"), ("B", "FAIL"), ("C", "FAIL"), ("D", "PASS")]
    assert [r.value for r in results] == [
        "RuntimeError: first line second line",
        "the process ended with code 7 and no result",
        "too slow",
        "well on stand-in",
    ]
    assert all(r.seconds > 0 for r in results)


def test_a_check_that_hangs_is_killed_at_its_limit_with_what_it_started(tmp_path: Path):
    psutil = pytest.importorskip("psutil")
    told = tmp_path / "pid"
    result = run_check(check("A", fake_checks.hangs), Setting(device=str(told), seconds=3))
    assert (result.verdict, result.value) == ("FAIL", "no result within 3 s")
    if not told.exists():
        pytest.skip("the machine is so busy that the check did not begin")
    child = int(told.read_text(encoding="utf-8"))
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the process of the check lives on"
        time.sleep(0.01)


def test_of_several_findings_the_last_one_counts_and_a_limit_leaves_what_there_is():
    result = run_check(check("A", fake_checks.yields), HERE)
    assert (result.verdict, result.value) == ("PASS", "one, two")
    result = run_check(check("A", fake_checks.yields_and_hangs), replace(HERE, seconds=3))
    assert (result.verdict, result.value) == ("NUMBER", "one, two; no more within 3 s")


def test_what_does_not_fit_the_time_or_the_machine_is_not_run_and_no_failure():
    checks = [check("A", fake_checks.passes), check("D", fake_checks.passes, gpus=2)]
    late = list(run_checks(checks, HERE, minutes=0.01))
    assert [r.verdict for r in late] == ["NOT RUN", "NOT RUN"]
    assert [r.value for r in late] == ["the time of --minutes=0.01 is over", "needs 2 GPUs, 1 here"]
    assert Report(date="", machine="", results=tuple(late)).num_failures == 0


@pytest.mark.parametrize(("minutes", "seconds", "expected"), [(8, 30, "30"), (16, 30, "60"), (0.2, 30, "12")])
def test_limits_grow_with_the_minutes_and_end_with_them(minutes: float, seconds: float, expected: str):
    (result,) = run_checks([check("A", fake_checks.counts_down, seconds=seconds)], HERE, minutes=minutes)
    assert (result.verdict, result.value) == ("NUMBER", expected)


def some_results() -> tuple[Result, ...]:
    rows = ({"way": "a|b", "ms": "1"}, {"way": "c", "ms": "2"})
    common = {"title": "t", "expected": "e", "seconds": 1.5}
    return (
        Result(name="A0", verdict="PASS", value="v", **common),
        Result(name="B1", verdict="FAIL", value="w", **common),
        Result(name="C1", verdict="NUMBER", value="2 ms", rows=rows, **common),
        Result(name="D1", verdict="NOT RUN", value="x", **common),
    )


def test_a_report_survives_its_file_and_becomes_tables(tmp_path: Path):
    report = Report(date="2026-01-01", machine="1 x card", results=some_results())
    write_report(report, str(tmp_path / "gpu.json"))
    assert read_report(str(tmp_path / "gpu.json")) == report
    text = text_table(report).splitlines()
    assert text[0].split() == ["check", "verdict", "found", "expected", "seconds"]
    assert text[-1] == "1 failed, 1 passed, 1 only measured, 1 not run"
    assert len({line.index(word) for line, word in zip(text[1:5], ["PASS", "FAIL", "NUMBER", "NOT"], strict=True)}) == 1
    lines = markdown(report).splitlines()
    assert lines[0].startswith("1 x card, 2026-01-01")
    assert "| A0 t | PASS | v | e | 2 |" in lines
    assert lines[-4:] == ["| way | ms |", "|---|---|", "| a\\|b | 1 |", "| c | 2 |"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}', '{"format": "edm2 gpu_check 1", "results": [1]}'])
def test_another_file_is_no_report(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.json is not a report of benchmarks\.gpu_check"):
        read_report(str(tmp_path / "x.json"))


def test_the_report_is_on_disk_after_each_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "gpu.json"
    sizes = []

    def run(*args: object, **options: object):
        for result in some_results():
            yield result
            sizes.append(len(json.loads(out.read_text(encoding="utf-8"))["results"]))

    monkeypatch.setattr(program, "run_checks", run)
    report = program.run_all([], HERE, minutes=8, out=str(out), machine="card")
    assert sizes == [1, 2, 3, 4] and report == read_report(str(out)) and report.num_failures == 1


def invoke(*args: str) -> tuple[object, str]:
    result = CliRunner().invoke(program.gpu_check, args, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def test_checks_are_chosen_by_name():
    checks = [check("A0", fake_checks.passes), check("B1", fake_checks.passes)]
    assert program.chosen(checks, None) == checks
    assert [c.name for c in program.chosen(checks, "b1")] == ["B1"]
    with pytest.raises(ConfigError, match="unknown check 'X9'; choose from A0, B1"):
        program.chosen(checks, "A0,X9")


def test_the_table_of_a_report_needs_no_gpu(tmp_path: Path):
    report = Report(date="2026-01-01", machine="1 x card", results=some_results())
    write_report(report, str(tmp_path / "gpu.json"))
    assert invoke(f"--table={tmp_path / 'gpu.json'}") == (0, markdown(report) + "\n")


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU to check"):
        invoke("--minutes=1")


def test_the_exit_code_is_the_number_of_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    torch = pytest.importorskip("torch")
    from benchmarks.gpu_check import checks
    from dnnlib.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "stand-in")
    monkeypatch.setattr(program.multiprocessing, "set_forkserver_preload", lambda names: None)
    monkeypatch.setattr(
        checks,
        "CHECKS",
        [check("A", fake_checks.fails), check("B", fake_checks.raises), check("C", fake_checks.passes)],
    )
    with pytest.raises(SystemExit) as error:
        main(program.gpu_check, ["--minutes=1"])
    assert error.value.code == 2
    assert "2 failed, 1 passed" in capsys.readouterr().out


def test_other_processes_of_torchrun_leave_the_checks_to_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert invoke("--minutes=1") == (0, "")


def test_the_checks_do_not_see_torchrun():
    environ = {
        "RANK": "0",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": "/",
    }
    program.leave_torchrun(environ)
    assert environ["OMP_NUM_THREADS"] == "1"  # the user's own
    environ["TORCHELASTIC_RUN_ID"] = "none"
    program.leave_torchrun(environ)
    assert environ == {"HOME": "/"}


def test_the_seventeen_checks_have_names_and_limits_that_fit():
    from benchmarks.gpu_check.checks import CHECKS

    names = [c.name for c in CHECKS]
    assert names == sorted(names) and len(set(names)) == 17
    assert all(0 < c.seconds <= 150 and c.title and c.expected for c in CHECKS)
    assert {c.gpus for c in CHECKS if c.name.startswith("D")} == {2}
    assert all(dataclasses.is_dataclass(c) and c.body.__module__.startswith("benchmarks.gpu_check.") for c in CHECKS)


def test_importing_the_checks_does_not_ask_for_a_gpu():
    # The processes of the checks are forked from one that has imported this: CUDA could not be used in them.
    text = """
import torch
def asked(*args):
    raise AssertionError("CUDA was asked for at import")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = asked
import benchmarks.gpu_check.checks
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
