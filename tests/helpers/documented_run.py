"""Running a script of the project in this process, as `python SCRIPT ARGS...` would in another."""

import runpy
import sys
from collections.abc import Sequence
from unittest import mock

from tests.helpers.paths import ROOT


def run_script(script: str, args: Sequence[str]) -> None:
    """Raises AssertionError where it ends with another exit code than 0; what it printed tells why."""
    with mock.patch.object(sys, "argv", [script, *args]):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0), f"exit code {end.code}: {script} {' '.join(args)}"
