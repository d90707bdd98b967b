"""Reader of pickle files as data: nothing in a file can run.

The result is a tree of plain values, tensors, arrays and `StoredObject`s. `torch_utils.pickles.machine` steps through
the file, and `torch_utils.pickles.values` is the closed list of what it may contain.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dnnlib.errors import ConfigError, one_line, reason_of
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from torch_utils.pickles.machine import MAX_OPCODES, Machine, Refused, StoredObject, Word
from torch_utils.pickles.values import SHAPES_VOCABULARY, VOCABULARY, build

__all__ = ["StoredObject", "Word", "file_format", "read_pickle"]

_MAX_DEPTH = 100  # of nested containers; networks have about 20
_MAX_SIZE = 4 * MAX_OPCODES  # values in the tree; a shared value counts wherever it occurs
_CONTAINERS = (list, tuple, dict, StoredObject)


def read_pickle(source: str | os.PathLike[str] | BinaryIO, name: str | None = None, *, values: bool = True) -> Any:
    """Read the pickle file `source`, a path or a seekable binary file, without running anything from it.

    Errors call the file `name`. Without `values`, tensors are on the meta device, with the same checks of shapes and
    dtypes. Raises ConfigError if the file cannot be opened, is damaged, or contains anything but plain values, tensors,
    NumPy arrays of numbers and stored objects; the message names the global.

    Memory is bounded by the file's size: every length in the file is checked against the bytes that are left. Sharing
    is bounded too: the result is a tree that can be walked and printed, without cycles.
    """
    if not isinstance(source, str | os.PathLike):
        return _read(source, name or "pickle file", values)
    try:
        with open(source, "rb") as file:
            return _read(file, name or str(source), values)
    except OSError as error:
        raise ConfigError(f"cannot read {Path(source)}: {reason_of(error)}") from None


def file_format(path: str | os.PathLike[str]) -> Literal["safetensors", "pickle", "zip", "unknown"]:
    """Return the format of a file, from its first bytes. Raises OSError, and ConfigError for a Git LFS pointer."""
    with open(path, "rb") as file:
        head = file.read(64)
    if is_lfs_pointer(head):
        raise ConfigError(f"{path}: {POINTER_HINT}")
    # A header length that fits the file, then JSON. In a pickle, that byte is part of a frame's length, and zero.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8:
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" else "zip" if head[:2] == b"PK" else "unknown"


def _read(file: BinaryIO, name: str, values: bool) -> Any:
    try:
        machine = Machine(file, VOCABULARY if values else SHAPES_VOCABULARY, build)
        result = machine.load()
        if machine.remaining():
            raise Refused(f"{machine.remaining()} bytes follow its end")
        require_tree(result)
        return result
    except Refused as error:
        raise ConfigError(f"{name}: not read, and nothing in it was run: {one_line(error)}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere: in the parser, the stack, torch, NumPy
        kind = type(error).__name__
        raise ConfigError(f"{name}: the file is damaged or cut short ({kind}: {one_line(error)})") from error


def require_tree(root: Any) -> None:
    """Raise Refused unless `root` is a tree of bounded depth and size, without cycles.

    A shared value counts wherever it occurs: a list of twice a list of twice a list, 40 levels deep, has a few hundred
    bytes in the file, and code that walks or prints it would never end. The walk is depth first with its own stack, so
    that the file does not decide how deep Python recurses.
    """
    unfinished = (0, 0)
    measured: dict[int, tuple[int, int]] = {}  # size and depth by id; `unfinished` for the ancestors of `current`
    num_ancestors, waiting = 0, [root]
    while waiting:
        current = waiting[-1]
        values = _values_in(current)
        containers = [value for value in values if isinstance(value, _CONTAINERS)]
        if id(current) not in measured:  # on the way down
            measured[id(current)] = unfinished
            num_ancestors += 1
            if num_ancestors > _MAX_DEPTH:
                raise Refused(f"its values are nested more than {_MAX_DEPTH} deep")
            if any(measured.get(id(value)) == unfinished for value in containers):
                raise Refused("it holds a value that is inside itself")
            waiting += [value for value in containers if id(value) not in measured]
            continue
        waiting.pop()  # on the way up: all that is inside was measured
        if measured[id(current)] == unfinished:
            num_ancestors -= 1
            inside = [measured[id(value)] for value in containers]
            texts = sum(len(value) for value in values if type(value) in (str, bytes))
            size = 1 + len(values) + texts // 64 + sum(size for size, _ in inside)
            depth = 1 + max((depth for _, depth in inside), default=0)
            if size > _MAX_SIZE or depth > _MAX_DEPTH:
                raise Refused("its values are nested too deep, or shared too often to be walked")
            measured[id(current)] = size, depth


def _values_in(value: Any) -> Collection[Any]:
    """Return the values in a container; keys are text and numbers, without containers."""
    if isinstance(value, StoredObject):
        return value.state.values()
    if isinstance(value, dict):
        return value.values()
    return value if type(value) in (list, tuple) else ()
