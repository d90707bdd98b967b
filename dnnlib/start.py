"""The start of every script: its first import, before torch, since this needs the standard library only.

While a script of this repository runs, a missing package ends it with one line that says how to install it, and the
threads of OpenMP wait for one another as WAITING says.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_OWN = ("dnnlib", "torch_utils", "training", "edm2")
_SCRIPT = getattr(sys.modules["__main__"], "__file__", None)
_RUNS_SCRIPT = _SCRIPT is not None and Path(_SCRIPT).resolve().parent == _ROOT

# OpenMP's threads spin between two operations, for seconds if a core is taken by another program. These spin for a
# moment, then sleep: next to busy processes a call of a network takes a fifth of the time, on an idle machine the same
# (benchmarks/threads.py). Threads that sleep at once cost an idle machine a factor of 1.9. For libgomp, and for the
# libraries of Intel and LLVM (milliseconds).
WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}

ASKED_FOR_HELP = _RUNS_SCRIPT and "--help" in sys.argv[1:]
"""True if a script runs to print its help: it then imports nothing that waits for torch."""


def how_to_install(module: str, environment: Path = _ROOT / ".venv") -> str:
    """Return what to type if the package of `module` is missing in the Python that runs."""
    windows = os.name == "nt"
    if (environment / ".stamp").exists() and Path(sys.prefix).resolve() != environment.resolve():
        typed = rf"{environment}\Scripts\activate" if windows else f"source {environment}/bin/activate"
        return f"it is installed in {environment.name}; activate that first: {typed}"
    return f"{module} is not installed for {sys.executable}; run `make env`, or: pip install -e {_ROOT}"


def _in_one_line(otherwise: Callable[..., Any]) -> Callable[..., None]:
    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):  # while the script imports; `dnnlib.cli.main` handles a later one
            print("Interrupted before the start; nothing was written.", file=sys.stderr)
            sys.exit(130)
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or not name or name in _OWN:
            otherwise(kind, error, traceback)
            return
        print(f"Error: the package '{name}' is missing: {how_to_install(name)}", file=sys.stderr)
        sys.exit(2)

    return hook


if _RUNS_SCRIPT:
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's own choice
        for variable, value in WAITING.items():
            os.environ.setdefault(variable, value)
    sys.excepthook = _in_one_line(sys.excepthook)
