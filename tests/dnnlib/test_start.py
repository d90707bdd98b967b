"""The start of a script: a missing package is one line that says what to type."""

import os
import subprocess
import sys
from pathlib import Path

from dnnlib.start import WAITING, how_to_install

import pytest

from tests.helpers.options_pages import SCRIPTS
from tests.helpers.paths import ROOT

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


def ended(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_any_package_a_script_says_in_one_line_what_to_do(script: str) -> None:
    result = ended("-S", script, "--help")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("Error: the package 'click' is missing: ") and result.stderr.count("\n") == 1


def test_a_package_that_is_missing_later_is_named_too() -> None:
    result = ended("-c", WITHOUT_TORCH, "generate_images.py", "--preset=demo", "--outdir=nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: the package 'torch' is missing: ") and result.stderr.count("\n") == 1


def test_a_script_that_is_imported_leaves_the_errors_of_others_alone() -> None:
    result = ended("-c", "import dnnlib.start\nimport no_such_package")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}, UNDER_TORCHRUN])
def test_threads_wait_as_measured_unless_the_user_chose(own: dict[str, str], tmp_path: Path) -> None:
    torch = f"import os, sys\nprint({{name: os.environ.get(name) for name in {sorted(WAITING)}}})\nsys.exit(0)"
    (tmp_path / "torch.py").write_text(torch)  # imported in place of torch
    free = {name: value for name, value in os.environ.items() if name not in {*WAITING, "OMP_WAIT_POLICY"}}
    environment = {**free, "PYTHONPATH": str(tmp_path), **own}
    args = [sys.executable, "generate_images.py", "--list-presets"]
    result = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    expected = {name: own.get(name) if "OMP_WAIT_POLICY" in own else own.get(name, WAITING[name]) for name in WAITING}
    assert result.stdout == f"{dict(sorted(expected.items()))}\n", result.stderr


def test_an_interrupt_while_a_script_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    args = [sys.executable, "generate_images.py", "--preset=demo", "--outdir=nowhere"]
    result = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "Interrupted before the start; nothing was written.\n")


def test_the_advice_is_to_activate_an_environment_that_is_there_and_else_to_make_one(tmp_path: Path) -> None:
    environment = tmp_path / ".venv"
    assert "`make env`" in how_to_install("click", environment)
    environment.mkdir()
    assert "`make env`" in how_to_install("click", environment)  # an installation that did not end
    (environment / ".stamp").touch()
    assert "activate" in how_to_install("click", environment)
