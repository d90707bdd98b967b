"""The closed list of globals that a pickle file may name, with a replacement for each.

Tensors, storages and NumPy arrays are made from their bytes after every number that describes them was checked; objects
become `StoredObject`s. Nothing here calls anything that a file could choose.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dnnlib.util import EasyDict
from torch_utils.pickles.machine import Refused, StoredObject, Vocabulary, Word, describe, plain_set
from torch_utils.pickles.storage import STORAGE_DTYPES, Storage, load_storage

_MAX_DIMS = 32

_DTYPE_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _Dtype:
    """A NumPy dtype of plain numbers; `build` sets the byte order that follows it in the file."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|" if code in ("b1", "i1", "u1") else "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "=") + self.code)


def build(target: Any, state: Any) -> None:
    """Give `target` its attributes `state`; only for the few kinds of objects that network files complete this way."""
    if type(target) is StoredObject and target.source is None and not target.state:
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise Refused(f"{target!r} has no attributes by name")
        target.state = state
    elif type(target) is _Dtype:
        # (version, byte order, sub-array, names, fields, element size, alignment, flags): for plain numbers only the
        # byte order is set.
        if type(state) is not tuple or len(state) < 8 or state[1] not in ("<", ">", "|", "="):
            raise Refused("it has a NumPy dtype of unknown form")
        if any(part is not None for part in state[2:5]) or state[7] != 0:
            raise Refused("it has a NumPy dtype with fields, sub-arrays or objects")
        target.order = state[1]
    elif type(target) is np.ndarray and target.shape == (0,) and target.dtype == np.int8:
        _fill_array(target, state)
    else:
        raise Refused(f"it sets attributes of {describe(target)}")


def _reconstruct(meta: dict[str, Any]) -> StoredObject:
    kind, version, name = meta.get("type"), meta.get("version"), meta.get("class_name")
    source, state = meta.get("module_src"), meta.get("state")
    if type(kind) is not str or kind != "class" or type(version) is not int or version != 6:
        found = [value if type(value) in (str, int) else describe(value) for value in (kind, version)]
        raise Refused(f"an object of type {found[0]!r}, version {found[1]!r}; 'class', 6 is known")
    if type(name) is not str or not name.isidentifier() or type(source) is not str:
        raise Refused("an object without the text of its class name and module source")
    if not isinstance(state, dict) or not all(type(key) is str for key in state):
        raise Refused(f"an object of class {name!r} without attributes by name")
    return StoredObject(name, state, source)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    """Make a view of `storage`, not larger than it: with strides of 0, a few bytes could otherwise become gigabytes."""
    if type(storage) is not Storage:
        raise Refused(f"a tensor over {describe(storage)}")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor of unknown form")
    if hooks or metadata:
        raise Refused("a tensor with hooks or metadata")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > storage.values.numel() or last >= max(storage.values.numel(), 1):
        raise Refused(f"a tensor of shape {list(size)} over a storage of {storage.values.numel()} values")
    return storage.values.as_strided(size, stride, offset) if count else storage.values.new_empty(size)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> torch.Tensor:
    """Make a parameter, without attributes that a user may have added to it (`state`)."""
    if type(data) is not torch.Tensor or hooks:
        raise Refused("a parameter that is not a plain tensor")
    return data


def _dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if type(code) is not str or code not in _DTYPE_CODES:
        shown = repr(code[:20]) if type(code) is str else describe(code)
        raise Refused(f"a NumPy dtype given by {shown}; plain numbers are known")
    return _Dtype(code)


def _empty_array(word: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if word != Word("numpy.ndarray") or shape != (0,):
        raise Refused("an array of unknown form")
    return np.empty(0, dtype=np.int8)


def _fill_array(target: np.ndarray[Any, Any], state: Any) -> None:
    _version, shape, dtype, fortran, data = state
    values = _array(data, dtype, shape, "F" if fortran else "C")
    # NumPy's way to complete an unpickled array. Safe here: the dtype is of plain numbers, the length is right.
    complete: Any = target.__setstate__
    complete((1, values.shape, values.dtype, bool(fortran), values.tobytes("A")))


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    if type(data) is not bytes or type(dtype) is not _Dtype or type(shape) is not tuple or order not in ("C", "F"):
        raise Refused("an array of unknown form")
    if len(shape) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise Refused("an array of unknown shape")
    kind = dtype.numpy()
    if math.prod(shape) * kind.itemsize != len(data):
        raise Refused(f"an array of shape {list(shape)} with {len(data)} bytes")
    return np.frombuffer(data, dtype=kind).reshape(shape, order=order).astype(kind.newbyteorder("="))


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ())[()]


def _empty(make: Callable[..., Any], *known: Any) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        if args:
            raise Refused("constructor arguments")
        return make(*known)

    return made


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("text in an encoding other than latin1")
    return text.encode("latin-1")


def _size(sizes: Any) -> tuple[int, ...]:
    if type(sizes) is not tuple or any(type(n) is not int for n in sizes):
        raise Refused("a size that is not a tuple of integers")
    return sizes


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise Refused("a device of unknown form")
    return kind if index is None else f"{kind}:{index}"


# Containers, and layers of networks other than ours. They become inert StoredObjects like all modules.
_MODULES = [("container", name) for name in ("ModuleDict", "ModuleList", "Sequential")]
_MODULES += [("activation", name) for name in ("GELU", "ReLU", "SiLU", "Sigmoid", "Softplus", "Tanh")]
_MODULES += [("normalization", "GroupNorm"), ("normalization", "LayerNorm"), ("linear", "Linear")]
_MODULES += [("linear", "Identity"), ("conv", "Conv2d"), ("sparse", "Embedding"), ("dropout", "Dropout")]

VOCABULARY: Vocabulary = {
    "dnnlib.util.EasyDict": _empty(EasyDict),
    "collections.OrderedDict": _empty(OrderedDict),
    "torch_utils.persistence._reconstruct_persistent_obj": _reconstruct,
    **{
        f"torch.nn.modules.{place}.{name}": _empty(lambda name: StoredObject(name, {}), name)
        for place, name in _MODULES
    },
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,  # in files of PyTorch before 0.4
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.storage._load_from_bytes": load_storage,
    "torch.Size": _size,
    "torch.device": _device,
    **{f"torch.{str(dtype).removeprefix('torch.')}": None for dtype in STORAGE_DTYPES.values()},
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    # NumPy 1 and 2 have different names for their core. _frombuffer is written with pickle protocol 5.
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "_codecs.encode": _encode,
    **{f"{module}.set": plain_set for module in ("builtins", "__builtin__")},
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda: b""),  # protocol 2 writes empty bytes as a call
}

# The same list for reading shapes only: tensors are on the meta device.
SHAPES_VOCABULARY: Vocabulary = {
    **VOCABULARY,
    "torch.storage._load_from_bytes": lambda payload: load_storage(payload, values=False),
}
