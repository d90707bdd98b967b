"""Shared parts of the command lines: option types, the end of a program by an error, the command as typed."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click

from dnnlib.errors import ConfigError, LostContactError
from dnnlib.parse import (
    expand_home,
    parse_bytes,
    parse_class_list,
    parse_int_list,
    parse_keywords,
    parse_loss_scale,
    parse_nimg,
    parse_pair,
)
from dnnlib.text import similar_names

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
PAIR = Parsed("pair", parse_pair)
INT_LIST = Parsed("list", parse_int_list)
CLASS_LIST = Parsed("list", parse_class_list)
KEYWORDS = Parsed("key=value,...", parse_keywords)
LOSS_SCALE = Parsed("float|auto", parse_loss_scale)
SOURCE = Parsed("path", expand_home)
"""Text that may be a path, and may be a URL or a name instead."""


class PathType(click.Path):
    """A path, with the home folder in place of `~`. Every option that is a path has this type, or SOURCE."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(path_type=Path, **limits)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the expanded path; limits that it does not keep end the command."""
        return super().convert(SOURCE.convert(value, param, ctx), param, ctx)


PATH = PathType()


class SectionedCommand(click.Command):
    """A command whose help lists its options in sections: `sections` has titles, by the first option below each."""

    def __init__(self, *args: Any, sections: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to the formatter. Arguments have no rows."""
        title, rows = "Options", dict[str, list[tuple[str, str]]]()
        for param in self.get_params(ctx):
            name = "help" if "--help" in param.opts else param.name or ""
            title = self._sections.get(name, title)
            row = param.get_help_record(ctx)
            if row is not None:
                rows.setdefault(title, []).append(row)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)


def main(command: click.Command, args: list[str] | None = None, *, interrupted: str | Mapping[str, str] = "") -> None:
    """Run a click command and exit: with 0 on success, 2 and one line on stderr for a user's mistake, 130 for ^C.

    Our own bugs keep their traceback. Under torchrun the line names the process unless it is process 0. A mistake that
    all processes of a machine make is printed by the first one only. `interrupted` says what ^C leaves, and how to
    continue; of a group of commands, for each by its name.
    """
    if ASKED_FOR_HELP and args is None:  # whatever else was typed: the script has not imported what a command needs
        args = [*(word for word in sys.argv[1:2] if word in getattr(command, "commands", ())), "--help"]
    words = sys.argv[1:] if args is None else args
    _say_if_deaf(words)
    try:
        code = command.main(args=args, standalone_mode=False)
    except click.exceptions.Abort:
        if not isinstance(interrupted, str):
            interrupted = next((interrupted[word] for word in words if word in interrupted), "")
        if interrupted and os.environ.get("RANK", "0") == "0":
            print(f"Interrupted. {interrupted}", file=sys.stderr, flush=True)
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message() + _nearest_choice(error))
    except ConfigError as error:
        _fail(str(error), only_here=error.only_here)
    except LostContactError as error:
        _fail(str(error), only_here=True, code=1)
    else:
        if isinstance(code, int):  # click returns the code of its Exit
            sys.exit(code)


def _nearest_choice(error: click.ClickException) -> str:
    """Return the choice or command that was probably meant, to be put after the message; '' without one."""
    message = error.format_message()
    param, context = getattr(error, "param", None), getattr(error, "ctx", None)
    choices: list[str] = []
    typed = re.search(r"'([^']*)' is not one of", message)
    if typed is not None and param is not None and isinstance(param.type, click.Choice):
        choices = [str(choice) for choice in param.type.choices]
    elif context is not None and isinstance(context.command, click.Group):
        typed, choices = re.search(r"No such command '([^']*)'", message), context.command.list_commands(context)
    similar = [] if typed is None or "Did you mean" in message else similar_names(typed[1], choices)
    return f" Did you mean {similar[0]}?" if similar else ""


def _say_if_deaf(args: Sequence[str]) -> None:
    """Say that ^C has no effect, as in the background commands of a script, which ignore it from their start."""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        and os.environ.get("RANK", "0") == "0"
        and "--help" not in args
    ):
        how = "the task manager" if os.name == "nt" else f"kill {os.getpid()}"
        print(f"Note: started with SIGINT ignored, so ^C does not end this program; {how} does.", file=sys.stderr)


def _fail(message: str, *, only_here: bool = False, code: int = 2) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    if os.environ.get("LOCAL_RANK", "0") != "0" and not only_here:
        # The first process prints the same line and fails, upon which torchrun ends this one while it sleeps.
        time.sleep(_SECONDS_TO_THE_FIRST)
    print(f"Error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def say_next(*words: str) -> None:
    """Print a script with its arguments as the next step; on stderr, since stdout has the results."""
    print(f"Next: {quoted(['python', *words])}", file=sys.stderr, flush=True)


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
