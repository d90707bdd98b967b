"""Classes whose instances are pickled together with the source text of the module that defines them.

This is the published layout of network files: each object of a project class is one call of
`_reconstruct_persistent_obj` with a dictionary of the module's source, the class name and the object's attributes. The
published reader executes the source. This one never does: it finds the class among those decorated in this process,
which is enough for `copy.deepcopy` and spawned workers, and refuses everything else. Files from elsewhere are read as
data by `torch_utils.pickles.safe_pickle`.
"""

import copy
import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from dnnlib.errors import ConfigError
from dnnlib.util import EasyDict

C = TypeVar("C", bound=type)


VERSION = 6  # of the published layout

# The decorated classes with the source text of their modules at the time of definition. This is module state, because
# a pickle identifies a class by that text, and pickle calls `_reconstruct_persistent_obj` without other arguments.
_sources: dict[type, str | None] = {}


def persistent_class(cls: C) -> C:
    """Class decorator: instances record their constructor arguments, and their pickles carry the module's source.

    The class is not wrapped, so that isinstance, super(), deepcopy and torch.compile see nothing unusual. Instances get
    `_init_args` and `_init_kwargs` (deep copies, taken before the constructor runs), and the properties `init_args` and
    `init_kwargs`, which return copies. Subclasses that are not decorated themselves are pickled the ordinary way.
    """
    _sources[cls] = _module_source(cls)
    _record_arguments(cls)
    base_reduce: Any = cls.__reduce_ex__

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if type(self) is not cls:
            return base_reduce(self, protocol)
        return _reconstruct_persistent_obj, (_describe(self),)

    cls.__reduce_ex__ = __reduce_ex__  # type: ignore[method-assign, assignment]
    for name, kind in (("init_args", tuple), ("init_kwargs", EasyDict)):
        if not hasattr(cls, name):
            setattr(cls, name, property(functools.partial(_recorded, f"_{name}", kind)))
    return cls


def _recorded(name: str, kind: Callable[[Any], Any], obj: Any) -> Any:
    return kind(copy.deepcopy(getattr(obj, name)))


def is_persistent(obj: Any) -> bool:
    """Return True if `obj` is a class decorated with `persistent_class`, or an instance of one."""
    return (obj if isinstance(obj, type) else type(obj)) in _sources


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """Make the object that `meta` describes, if its class is decorated here. The name is part of the file format."""
    if meta.get("type") != "class" or meta.get("version") != VERSION:
        raise ConfigError(
            f"a stored object has type {meta.get('type')!r}, version {meta.get('version')!r};"
            f" this version reads type 'class', version {VERSION}"
        )
    name, source = meta["class_name"], meta["module_src"]
    # The latest definition wins: a reloaded module defines its classes again.
    found = [cls for cls, text in _sources.items() if cls.__name__ == name and text == source]
    if not found:
        raise ConfigError(
            f"a stored object of class {name!r} brings its own source code, which is not run; read"
            " network files with training.snapshot.load_snapshot, and in a worker process import the"
            " module that defines the class first"
        )
    cls: Any = found[-1]
    obj = cls.__new__(cls)
    setstate = getattr(obj, "__setstate__", None)
    if callable(setstate):
        setstate(meta["state"])
    else:
        obj.__dict__.update(meta["state"])
    return obj


def _module_source(cls: type) -> str | None:
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        return None


def _record_arguments(cls: Any) -> None:
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = copy.deepcopy(args), copy.deepcopy(kwargs)
        construct(self, *args, **kwargs)
        # Last, so that the outermost constructor wins; not by setattr, which nn.Module and frozen dataclasses override.
        self.__dict__["_init_args"], self.__dict__["_init_kwargs"] = kept

    cls.__init__ = __init__


def _describe(obj: Any) -> dict[str, Any]:
    cls = type(obj)
    source = _sources[cls]
    if source is None:
        raise pickle.PicklingError(f"class {cls.__name__} has no source file; define it in a module")
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        raise pickle.PicklingError(f"class {cls.__qualname__} is not found as {cls.__module__}.{cls.__name__}")
    state = obj.__getstate__()
    if not isinstance(state, dict):
        raise pickle.PicklingError(f"class {cls.__name__} has no dictionary as its state (does it use __slots__?)")
    return {"type": "class", "version": VERSION, "module_src": source, "class_name": cls.__name__, "state": dict(state)}
