"""train_edm2.py in this process, with options that make its runs short."""

import json
from typing import Any

import dnnlib.cli
import train_edm2 as script

TINY = ["--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"]
SHORT = [*TINY, "--batch=8", "--duration=32"]


def run(*args: Any) -> int:
    """Run the script; its exit code."""
    try:
        dnnlib.cli.main(script.train_edm2, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def printed_options(text: str) -> dict[str, Any]:
    """The options that a dry run prints."""
    options: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return options
