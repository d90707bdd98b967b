"""Objects of foreign classes, made by running the source text in their file, if the caller trusts it.

Everything else in the file is read as usual, by a closed list of names. Our classes keep to our code, unless their
source also defines a foreign class that the file needs, as in a changed module of the published code.
"""

import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError, one_line
from torch_utils.pickles.safe_pickle import StoredObject, Word
from training import encoders, loss, networks_edm2


@dataclass(frozen=True, kw_only=True)
class EmbeddedCode:
    """Source text that is about to run."""

    class_names: tuple[str, ...]  # classes that the file's objects need from it
    source: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the source (UTF-8), as hex."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def num_lines(self) -> int:
        """Number of lines."""
        return len(self.source.splitlines())


TrustCode = Callable[[EmbeddedCode], None]
"""Called with each source text before the first of them runs; raises an exception to prevent that."""

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
    """Make the objects that `roots` describe by running their source texts, after `trust_code` accepted each."""
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
    except Exception as error:  # foreign code can fail in any way
        raise ConfigError(f"its objects cannot be made: {type(error).__name__}: {one_line(error)}") from error
    return [obj.eval().requires_grad_(False) if isinstance(obj, torch.nn.Module) else obj for obj in objects]


def _objects(value: Any) -> Iterator[StoredObject]:
    if isinstance(value, StoredObject):
        yield value
        value = value.state
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)


def _run(code: EmbeddedCode) -> types.ModuleType:
    module = types.ModuleType(f"_embedded_{code.sha256[:16]}")
    sys.modules[module.__name__] = module  # decorators look it up by the name of a class's module
    try:
        exec(compile(code.source, f"<{module.__name__}>", "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"its embedded source fails: {type(error).__name__}: {one_line(error)}") from error
    return module


def _make(value: Any, modules: dict[str, types.ModuleType], made: dict[int, Any]) -> Any:
    """Return `value` with live objects in place of stored ones. Shared objects stay shared."""
    if isinstance(value, Word):
        return getattr(torch, value.name.removeprefix("torch."))  # a dtype: the only word that can be a value
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
