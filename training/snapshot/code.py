"""Objects whose classes are not ours, made by running the source text in their file: only where the caller trusts it.

Everything else of the file is read as ever, by a closed list of names. Classes of ours keep to our code, unless their
source is that of a class which is not ours, as when someone changed a module of the published code.
"""

import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.pickles.safe_pickle import StoredObject, Word, printable
from training import encoders, loss, networks_edm2


@dataclass(frozen=True, kw_only=True)
class EmbeddedCode:
    """Source text that is about to run."""

    class_names: tuple[str, ...]  # what the file's objects need from it
    source: str

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8, in hexadecimal digits."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def num_lines(self) -> int:
        """How many lines it has."""
        return len(self.source.splitlines())


TrustCode = Callable[[EmbeddedCode], None]
"""Is told of each source text before the first of them runs; raises an exception to prevent it."""

_OWN = {
    cls.__name__: cls
    for module, names in (
        (networks_edm2, ("Precond", "UNet", "Block", "MPConv", "MPFourier")),
        (encoders, ("StandardRGBEncoder", "StabilityVAEEncoder")),
        (loss, ("EDM2Loss",)),
    )
    for cls in (getattr(module, name) for name in names)
}


def make_trusted(roots: Iterable[StoredObject], trust_code: TrustCode) -> list[Any]:
    """The objects that `roots` describe, by running their source texts after `trust_code` was told of each.

    Networks are in evaluation mode, without gradients. Raises ConfigError where that fails.
    """
    roots = list(roots)
    needed: dict[str, set[str]] = {}
    for stored in _objects(roots):
        if stored.source is not None:
            needed.setdefault(stored.source, set()).add(stored.class_name)
    codes = [
        EmbeddedCode(class_names=tuple(sorted(names)), source=source)
        for source, names in needed.items()
        if not names <= _OWN.keys()
    ]
    for code in codes:
        trust_code(code)
    modules = {code.source: _run(code) for code in codes}
    made: dict[int, Any] = {}
    try:
        objects = [_make(root, modules, made) for root in roots]
    except Exception as error:  # classes of the file do what they want
        raise ConfigError(f"its objects cannot be made: {type(error).__name__}: {printable(error)}") from error
    return [obj.eval().requires_grad_(False) if isinstance(obj, torch.nn.Module) else obj for obj in objects]


def _objects(value: Any) -> Iterator[StoredObject]:
    if isinstance(value, StoredObject):
        yield value
        value = value.state
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)


def _run(code: EmbeddedCode) -> types.ModuleType:
    """A fresh module in which the source text was run."""
    module = types.ModuleType(f"_embedded_{code.sha256[:16]}")
    sys.modules[module.__name__] = module  # decorators look it up by the name of a class's module
    try:
        exec(compile(code.source, f"<{module.__name__}>", "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"its embedded source fails: {type(error).__name__}: {printable(error)}") from error
    return module


def _make(value: Any, modules: dict[str, types.ModuleType], made: dict[int, Any]) -> Any:
    """`value` with live objects in the places of stored ones; those that are shared stay so."""
    if isinstance(value, Word):
        return getattr(torch, value.name.removeprefix("torch."))  # a dtype: no other word is a value
    if not isinstance(value, StoredObject | dict | list | tuple):
        return value
    if id(value) not in made:
        if isinstance(value, StoredObject):
            made[id(value)] = _make_object(value, modules, made)
        elif isinstance(value, dict):
            result = type(value)()
            result.update({key: _make(item, modules, made) for key, item in value.items()})
            made[id(value)] = result
        else:
            made[id(value)] = type(value)([_make(item, modules, made) for item in value])
    return made[id(value)]


def _make_object(stored: StoredObject, modules: dict[str, types.ModuleType], made: dict[int, Any]) -> Any:
    if stored.source is None:
        cls = getattr(torch.nn, stored.class_name)  # one of the containers and layers in the closed list
    elif stored.source in modules:
        cls = getattr(modules[stored.source], stored.class_name)
    else:
        cls = _OWN[stored.class_name]
    state = _make(stored.state, modules, made)
    if isinstance(state.get("_parameters"), dict):
        for name, tensor in state["_parameters"].items():
            if isinstance(tensor, torch.Tensor):
                state["_parameters"][name] = torch.nn.Parameter(tensor, requires_grad=False)
    obj = cls.__new__(cls)
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
    else:
        obj.__dict__.update(state)
    return obj
