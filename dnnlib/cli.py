"""Shared parts of the command lines: option types, the end of a program by an error, the command as typed."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib.errors import ConfigError, LostContactError
from dnnlib.parse import parse_bytes, parse_int_list, parse_loss_scale, parse_nimg

# Processes of one machine that fail over the same mistake do so within this time of each other.
_SECONDS_TO_THE_FIRST = 3.0
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


class Parsed(click.ParamType):
    """An option type around a parser that raises ConfigError."""

    def __init__(self, name: str, parser: Callable[[Any], Any]) -> None:
        self.name = name
        self._parser = parser

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value; a ConfigError ends the command."""
        try:
            return self._parser(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


NIMG = Parsed("nimg", parse_nimg)
BYTES = Parsed("size", parse_bytes)
INT_LIST = Parsed("list", parse_int_list)
LOSS_SCALE = Parsed("float|auto", parse_loss_scale)


def main(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command and exit: with 0 on success, 2 and one line on stderr for a user's mistake, 130 for ^C.

    Our own bugs keep their traceback. Under torchrun the line names the process unless it is process 0. A mistake that
    all processes of a machine make is printed by the first one only.
    """
    try:
        code = command.main(args=args, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except ConfigError as error:
        _fail(str(error), only_here=error.only_here)
    except LostContactError as error:
        _fail(str(error), only_here=True, code=1)
    else:
        if isinstance(code, int):  # click returns the code of its Exit
            sys.exit(code)


def _fail(message: str, *, only_here: bool = False, code: int = 2) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    if os.environ.get("LOCAL_RANK", "0") != "0" and not only_here:
        # The first process prints the same line and fails, upon which torchrun ends this one while it sleeps.
        time.sleep(_SECONDS_TO_THE_FIRST)
    print(f"Error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def invocation() -> str:
    """Return the command line of this program, quoted for the shell; that of torchrun if it started the program."""
    words = _launcher() or [Path(sys.executable).name, *sys.orig_argv[1:]]
    return quoted(words)


def quoted(words: Sequence[str]) -> str:
    """Quote the words of a command line for the shell of this machine."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _launcher() -> list[str] | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    import psutil  # here, because importing it takes time and a plain start does not need it

    try:
        parent = psutil.Process().parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    if not any(name in word for word in words for name in _LAUNCHERS):
        return None
    words[0] = Path(words[0]).name
    if len(words) > 1 and Path(words[1]).name == "torchrun":  # python .../bin/torchrun
        words = ["torchrun", *words[2:]]
    return words
