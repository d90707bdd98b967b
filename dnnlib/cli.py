"""What the scripts' command lines share: option types and the way errors end a program."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from dnnlib.errors import ConfigError, LostContactError
from dnnlib.parse import parse_bytes, parse_int_list, parse_loss_scale, parse_nimg, parse_std_list

# Processes of one machine that are given the same command fail within this time of each other.
_SECONDS_TO_THE_FIRST = 3.0


class _Parsed(click.ParamType):
    """An option type around a parser that raises ConfigError."""

    def __init__(self, name: str, parser: Callable[[Any], Any]) -> None:
        self.name = name
        self._parser = parser

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parser(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


NIMG = _Parsed("nimg", parse_nimg)
BYTES = _Parsed("size", parse_bytes)
INT_LIST = _Parsed("list", parse_int_list)
STD_LIST = _Parsed("list", parse_std_list)
LOSS_SCALE = _Parsed("float|auto", parse_loss_scale)


def main(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command and exit: 0 when it ends well, 2 with one line on stderr for a user's mistake, 130 for ^C.

    Our own bugs keep their traceback. Under torchrun the line names the process, except for the first one; what all
    processes of a machine have to say is said by the first of them.
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
        if isinstance(code, int):  # what click makes of Exit
            sys.exit(code)


def _fail(message: str, *, only_here: bool = False, code: int = 2) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    if os.environ.get("LOCAL_RANK", "0") != "0" and not only_here:
        # torchrun ends this process as soon as it sees that the first one has failed.
        time.sleep(_SECONDS_TO_THE_FIRST)
    print(f"Error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
