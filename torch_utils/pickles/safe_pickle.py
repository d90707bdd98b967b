"""Pickle files read as data: nothing in the file can run, whatever it says.

The result is a tree of plain values, tensors, arrays and `StoredObject`s. `torch_utils.pickles.machine` steps through
the file, `torch_utils.pickles.values` is the closed list of what it may hold.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib.errors import ConfigError, reason_of
from torch_utils.pickles.machine import Machine, Refused, StoredObject, Word
from torch_utils.pickles.tree import require_tree
from torch_utils.pickles.values import SHAPES_VOCABULARY, VOCABULARY, build

__all__ = ["StoredObject", "Word", "printable", "read_pickle"]


def read_pickle(source: str | os.PathLike[str] | BinaryIO, name: str | None = None, *, values: bool = True) -> Any:
    """Read the pickle file `source`, a path or a seekable binary file, without running anything from it.

    `name` is what errors call the file. Without `values`, tensors come on the meta device: shapes and dtypes, checked
    as ever. Raises ConfigError where the file cannot be opened, is damaged, or holds anything beyond plain values,
    tensors, NumPy arrays of numbers and stored objects; the message names the global.
    Memory is bounded by the file's size: every length that the file declares is checked against what is left of it,
    and what it shares is bounded too: the result is a tree that can be walked and printed, with nothing inside itself.
    """
    if not isinstance(source, str | os.PathLike):
        return _read(source, name or "pickle file", values)
    try:
        with open(source, "rb") as file:
            return _read(file, name or str(source), values)
    except OSError as error:
        raise ConfigError(f"cannot read {Path(source)}: {reason_of(error)}") from None


def _read(file: BinaryIO, name: str, values: bool) -> Any:
    try:
        machine = Machine(file, VOCABULARY if values else SHAPES_VOCABULARY, build)
        result = machine.load()
        if machine.remaining():
            raise Refused(f"{machine.remaining()} bytes follow its end")
        require_tree(result)
        return result
    except Refused as error:
        raise ConfigError(f"{name}: not read, and nothing in it was run: {printable(error)}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere: in the parser, the stack, torch, NumPy
        kind = type(error).__name__
        raise ConfigError(f"{name}: the file is damaged or cut short ({kind}: {printable(error)})") from error


def printable(error: object) -> str:
    """An error's text for the user: one line, of bounded length. What a file calls things may have neither."""
    text = " ".join(str(error).split())[:400]
    return "".join(char if char.isprintable() else "?" for char in text)
