"""A stack machine for pickles that knows the opcodes of plain data and cannot run anything.

Python's unpicklers look up and call what a file names, and are made safe by forbidding names. In this machine a global
is a word of a given vocabulary, never a Python object that could be called or changed, and any other global is refused.
An allow-list in `pickle.Unpickler.find_class` would be shorter. But its C code allocates what a file announces, such as
the place of a memo index or the length of a byte array, so that a few bytes can fill the memory.
"""

import os
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

# The largest published network has about 40,000 opcodes, CIFAR-100 has 200,000. As many empty sets take about 130 MB.
MAX_OPCODES = 600_000
_MAX_COPIES = 4  # bytes that calls may copy, as a multiple of the file's size; real files need 2 or 3
_MAX_LONG_BYTES = 32  # the longest integer that torch or NumPy write has 10 bytes
_MAX_NUMBERS = 100  # keys of one dictionary or set if some are not text
_SIZED = (str, bytes, list, tuple, set, dict)
_KEY_TYPES = (str, int, float, bool, type(None))


class Refused(Exception):
    """The reason for refusing a file, without the file's name."""


@dataclass(frozen=True)
class Word:
    """A global that the file names: a word of the vocabulary without a Python object behind it."""

    name: str


@dataclass(eq=False)
class StoredObject:
    """An object of the file: the name of its class and its attributes, without the class."""

    class_name: str
    state: dict[str, Any]
    source: str | None = None  # text of the module that came with it; None for torch's own containers

    def __repr__(self) -> str:
        return f"<stored {self.class_name[:80]!r}>"


Vocabulary = Mapping[str, Callable[..., Any] | None]
"""For each global that a file may name, the function that replaces it; None if it may only be mentioned."""


class Machine:
    """Reads the pickles of a seekable file. `build` gives an object its attributes; None refuses persistent ids.

    `max_opcodes` is MAX_OPCODES by default.
    """

    def __init__(
        self,
        file: BinaryIO,
        vocabulary: Vocabulary,
        build: Callable[[Any, Any], None],
        resolve_persistent: Callable[[Any], Any] | None = None,
        *,
        max_opcodes: int | None = None,
    ) -> None:
        self._max_opcodes = max_opcodes or MAX_OPCODES
        self._file = _Bounded(file)
        self._vocabulary = vocabulary
        self._give_state = build
        self._resolve_persistent = resolve_persistent
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each MARK
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._missing = 0  # bytes of a frame beyond the end of the file
        self._allowance = _MAX_COPIES * self._file.remaining() + 4096  # bytes that calls may still copy

    def remaining(self) -> int:
        """Number of bytes that were not read yet."""
        return self._file.remaining()

    def read(self, count: int) -> bytes:
        """Read `count` bytes. Raises Refused if fewer are left."""
        return self._file.read(count)

    def load(self) -> Any:
        """Read one pickle, up to its end. Raises Refused; any other exception means a damaged file."""
        self._stack, self._marked, self._memo = [], [], {}
        file, steps = self._file, self._steps
        while True:
            position = file.tell()
            code = file.read(1)
            if code not in _OPCODES:
                raise ValueError(f"its byte {position} is not an opcode")
            name, read_argument = _OPCODES[code]
            argument = None if read_argument is None else read_argument(file)
            steps += 1
            if steps > self._max_opcodes:
                raise Refused(f"it has more than {self._max_opcodes} opcodes")
            if name == "STOP":
                self._steps = steps
                if self._missing > 0:
                    raise Refused(f"it is cut short: a frame is {self._missing} bytes longer than the file")
                if self._marked or len(self._stack) != 1:
                    raise Refused("it ends with an unfinished stack")
                return self._stack.pop()
            self._step(name, argument, position)

    def _step(self, name: str, argument: Any, position: int | None) -> None:
        if name in _VALUES:
            if name in ("LONG1", "LONG4") and argument.bit_length() > 8 * _MAX_LONG_BYTES:
                raise Refused(f"it holds an integer of {argument.bit_length()} bits")
            self._stack.append(_VALUES[name](argument))
            return
        act = _ACTIONS.get(name)
        if act is None:
            raise Refused(f"opcode {name} at byte {position} has no place in a file of plain data")
        act(self, argument)

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _tuple(self, count: int | None) -> None:
        items = self._pop_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Refused(f"it appends to {describe(target)}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise Refused(f"it sets items of {describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                # Hashing a key of another type, such as a nested tuple, may recurse without bound.
                if type(key) not in _KEY_TYPES:
                    raise Refused(f"it has {describe(key)} for a key")
                _require_few(len(target) + 1, (key,))
            target[key] = value

    def _add_items(self, _: Any) -> None:
        items, target = self._pop_mark(), self._stack[-1]
        if type(target) is not set:
            raise Refused(f"it adds to {describe(target)}")
        _require_few(len(target) + len(items), items)
        target.update(plain_set(items))

    def _frozen_set(self, _: Any) -> None:
        items = self._pop_mark()  # before self._stack is looked up, because it replaces the stack
        self._stack.append(frozenset(plain_set(items)))

    def _global(self, qualified: str) -> None:
        if qualified not in self._vocabulary:
            raise Refused(f"it refers to {qualified!r}, which has no place in such a file")
        self._stack.append(Word(qualified))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it refers to a global that is not named by text")
        self._global(f"{module}.{name}")

    def _spend(self, arguments: tuple[Any, ...]) -> None:
        # With a few bytes each, calls can take the same large text or list again and again, and may copy it each time.
        self._allowance -= sum(len(value) for value in arguments if type(value) in _SIZED)
        if self._allowance < 0:
            raise Refused("it uses the same bytes again and again, to fill the memory")

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Word or type(arguments) is not tuple:
            raise Refused(f"it calls {describe(function)}")
        self._spend(arguments)
        replacement = self._vocabulary[function.name]
        if replacement is None:
            raise Refused(f"it calls {function.name!r}")
        try:
            self._stack.append(replacement(*arguments))
        except Refused as error:
            raise Refused(f"in {function.name!r}: {error}") from None
        except Exception as error:
            raise Refused(f"in {function.name!r}: unexpected arguments ({error})") from error

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        self._spend(state if type(state) is tuple else (state,))
        self._give_state(self._stack[-1], state)

    def _persistent(self, _: Any) -> None:
        if self._resolve_persistent is None:
            raise Refused("it refers to an object outside the file by a persistent id")
        self._stack.append(self._resolve_persistent(self._stack.pop()))

    def _frame(self, length: int) -> None:
        self._missing = max(self._missing, length - self._file.remaining())

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]


def describe(value: Any) -> str:
    """Describe `value` in an error message."""
    if isinstance(value, Word):
        return repr(value.name)
    return repr(value) if isinstance(value, StoredObject) else f"a value of type {type(value).__name__}"


def plain_set(items: Any) -> set[Any]:
    """Make a set of strings and numbers. Raises Refused for anything else."""
    if type(items) not in (list, tuple, set) or any(type(item) not in _KEY_TYPES for item in items):
        raise Refused("it has a set of values other than text and numbers")
    _require_few(len(items), items)
    return set(items)


def _require_few(count: int, keys: Iterable[Any]) -> None:
    """Refuse `keys` that are not text, if one dictionary or set would have more than a few (`count`).

    Python salts the hashes of text only. A file can have many numbers with the same hash, which take quadratic time.
    """
    if count > _MAX_NUMBERS and any(type(key) is not str for key in keys):
        raise Refused(f"it has a dictionary or set of more than {_MAX_NUMBERS} keys, with numbers among them")


class _Bounded:
    """A file that checks each length against the bytes left before it allocates anything."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = file.tell()  # kept here, because asking the file takes longer than most opcodes
        self._size = file.seek(0, os.SEEK_END)
        file.seek(self._position)

    def remaining(self) -> int:
        return self._size - self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._size - self._position:
            raise Refused(f"it is cut short: {count} bytes are announced where {self.remaining()} are left")
        data = self._file.read(count)
        self._position += len(data)
        return data

    def readline(self) -> bytes:
        # Lines are only the names in GLOBAL of protocol 2 and the numbers of text opcodes.
        line = self._file.readline(1024)
        self._position += len(line)
        if not line.endswith(b"\n"):
            raise Refused("it is cut short, or has a line of more than 1024 bytes")
        return line


# Python's own table of the opcodes and the readers of their arguments. Its genops is slower, and asks for positions.
_OPCODES: dict[bytes, tuple[str, Callable[[Any], Any] | None]] = {
    opcode.code.encode("latin-1"): (opcode.name, None if opcode.arg is None else opcode.arg.reader)
    for opcode in pickletools.opcodes
}

# Opcodes that push a value.
_VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), lambda number: number),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), lambda text: text),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), bytes),
}

# All other opcodes of plain data. Those that are missing, such as INST, OBJ, NEWOBJ_EX, EXT1, are refused.
_ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": Machine._frame,
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": lambda machine, _: machine._pop_mark(),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._set_items([machine._stack.pop(), machine._stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_mark()),
    "ADDITEMS": Machine._add_items,
    "FROZENSET": Machine._frozen_set,
    "GLOBAL": lambda machine, names: machine._global(names.replace(" ", ".", 1)),
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._call,
    "NEWOBJ": Machine._call,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
    "MEMOIZE": lambda machine, _: machine._put(None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine._stack.append(machine._memo[index])),
}
