"""Pickles that Python 2 wrote, such as CIFAR's, read as data: numbers, text, lists, dictionaries and NumPy arrays."""

from typing import Any, BinaryIO

import numpy as np

from dnnlib.errors import ConfigError
from torch_utils.pickles.machine import Machine, Refused
from torch_utils.pickles.values import VOCABULARY, build
from training.dataset.item_files import one_line

_WORDS = {name: act for name, act in VOCABULARY.items() if name.startswith(("numpy.", "_codecs.", "__builtin__."))}


def read_python2_pickle(file: BinaryIO, name: str) -> Any:
    """The content of a pickle, without running anything from it; text comes as str, keys of dictionaries always.

    `name` is what errors call the file. Raises ConfigError where it is damaged or holds anything else.
    """
    try:
        return _Python2Machine(file, _WORDS, _build).load()
    except Refused as error:
        raise ConfigError(f"{name}: not read, and nothing in it was run: {str(error)[:400]}") from None
    except Exception as error:  # a damaged file can fail anywhere: in the parser, the stack, NumPy
        raise ConfigError(f"{name}: the file is damaged or cut short: {one_line(error)[:200]}") from None


class _Python2Machine(Machine):
    """Knows the byte strings of Python 2, which the parser gives as text, a character for a byte."""

    def _step(self, name: str, argument: Any, position: int | None) -> None:
        if name in ("SHORT_BINSTRING", "BINSTRING"):
            self._stack.append(argument)
        else:
            super()._step(name, argument, position)

    def _set_items(self, items: list[Any]) -> None:
        # Files that were written anew by Python 3 have keys of bytes.
        keys = [key.decode("latin-1") if type(key) is bytes else key for key in items[::2]]
        super()._set_items([part for pair in zip(keys, items[1::2], strict=True) for part in pair])


def _build(target: Any, state: Any) -> None:
    """An array's bytes are a byte string, too."""
    if type(target) is np.ndarray and type(state) is tuple and state and type(state[-1]) is str:
        state = (*state[:-1], state[-1].encode("latin-1"))
    build(target, state)
