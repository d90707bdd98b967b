"""The index of a sharded checkpoint, a pickle of torch.distributed.checkpoint (DCP), read as data."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from torch_utils.pickles.machine import Machine, Refused, StoredObject, Vocabulary, Word

_MAX_OPCODES = 5_000_000  # a chunk of a tensor takes about 50
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_DTYPES |= {f"torch.{name}": getattr(torch, name) for name in ("int64", "int32")}
_DCP = "torch.distributed.checkpoint"


def read_index(path: Path) -> Metadata:
    """Read the index at `path`. Raises Refused if it names more or other data than the files next to it hold.

    Any other exception means a damaged file.
    """
    with open(path, "rb") as file:
        root = _IndexMachine(file, _VOCABULARY, _build, max_opcodes=_MAX_OPCODES).load()
    entries = {_location(key): _storage(info) for key, info in _state(root, "Metadata")["storage_data"].items()}
    names = {info.relative_path for info in entries.values()}
    sizes = {name: (path.parent / name).stat().st_size for name in names}
    if any(info.offset + info.length > sizes[info.relative_path] for info in entries.values()):
        raise Refused("it names data behind the end of a file")
    tensors = {name: _tensor(entry) for name, entry in root.state["state_dict_metadata"].items()}
    if sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors.values()) > sum(sizes.values()):
        raise Refused("its tensors are larger than its files")
    return Metadata(
        state_dict_metadata=dict(tensors),
        planner_data=root.state["planner_data"],
        storage_data=entries,
        storage_meta=StorageMeta(),
    )


class _IndexMachine(Machine):
    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is StoredObject and type(target) is dict:
                target[key] = value  # hashed by identity
            else:
                super()._set_items([key, value])


def _build(target: Any, state: Any) -> None:
    if type(target) is not StoredObject or target.state:
        raise Refused("it sets attributes of something else than an entry")
    target.state = {"all": state} if type(state) is tuple else state


def _state(value: Any, kind: str) -> dict[str, Any]:
    if type(value) is not StoredObject or value.class_name != kind or type(value.state) is not dict:
        raise Refused(f"an entry that is not a {kind}")
    return value.state


def _storage(value: Any) -> _StorageInfo:
    state = _state(value, "_StorageInfo")
    name = state["relative_path"]
    if type(name) is not str or Path(name).name != name or "\\" in name or "\0" in name:
        raise Refused("it names a file outside its folder")
    offset, length = _numbers((state["offset"], state["length"]))
    return _StorageInfo(name, offset, length)


def _location(key: Any) -> MetadataIndex:
    state = _state(key, "MetadataIndex")
    offset, index = state.get("offset"), state.get("index")
    if type(state["fqn"]) is not str or not (index is None or type(index) is int):
        raise Refused("a tensor that is not named by text")
    return MetadataIndex(state["fqn"], None if offset is None else _numbers(offset), index)


def _tensor(value: Any) -> TensorStorageMetadata:
    state = _state(value, "TensorStorageMetadata")
    dtype = _state(state["properties"], "TensorProperties")["all"][0]
    if type(dtype) is not Word or dtype.name not in _DTYPES:
        raise Refused("a tensor of an unknown type")
    size = _numbers(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        parts = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _numbers(parts["offsets"]), _numbers(parts["sizes"])
        if any(begin + count > whole for begin, count, whole in zip(offsets, sizes, size, strict=True)):
            raise Refused("a part behind the end of its tensor")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=_DTYPES[dtype.name]), size, chunks)


def _numbers(values: Any) -> torch.Size:
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 2**60 for n in values):
        raise Refused("sizes that are not numbers")
    return torch.Size(values)


def _named(value: Any) -> Any:
    if type(value) not in (str, int):
        raise Refused("a layout or memory format of unknown form")
    return value


def _entry(name: str) -> Any:
    return lambda: StoredObject(name, {})


_VOCABULARY: Vocabulary = {
    **{
        f"{_DCP}.metadata.{name}": _entry(name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
    f"{_DCP}.filesystem._StorageInfo": _entry("_StorageInfo"),
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING": _named,
    "torch.serialization._get_layout": _named,
    "torch.Size": lambda sizes: tuple(_numbers(sizes)),
    **dict.fromkeys(_DTYPES),
}
