"""Checkpoints that all processes write together, each its own part, and that any number of processes can read.

A checkpoint is a folder: files of torch.distributed.checkpoint (DCP) with the tensors, and MANIFEST, a JSON file with
everything else and the SHA-256 of every other file. The folder gets its name once all of it is on the disk. Nothing in
it is executed: DCP's index, a pickle, and tensors are read as data.

All processes must see the same folder, as on a cluster's shared file system.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dnnlib.atomic import replace_folder, temporary_path
from dnnlib.disk import forget_cached, sync_folder
from dnnlib.errors import ConfigError, reason_of
from torch_utils.checkpoints.checkpoint import MANIFEST, damaged
from torch_utils.checkpoints.dcp_index import read_index
from torch_utils.checkpoints.stored import StoredTensor, check_same, flatten, map_leaves
from torch_utils.distributed import World
from torch_utils.pickles.machine import Refused
from torch_utils.processes.together import everywhere, on_main

_INDEX = ".metadata"  # DCP's
_FORMAT = {"name": "edm2-sharded-training-state", "version": 1}
_MAX_MANIFEST_BYTES = 64 << 20  # in which JSON takes some GB at most


def save_sharded(path: str | os.PathLike[str], data: dict[str, Any], world: World) -> None:
    """Write `data` (plain containers, numbers, strings, tensors and DTensors) to the folder `path`, atomically.

    Every process must call this. A DTensor is written by the processes that have its parts; everything else must be the
    same in every process. If one cannot write its part, all raise OSError and `path` is not created.
    """
    path = Path(path)
    temp = path.with_name(world.all_gather_objects(temporary_path(path).name)[0])
    tensors: dict[str, torch.Tensor] = {}
    values = _split(data, "", tensors)
    try:
        on_main(world, temp.mkdir, errors=OSError)
        with _dcp_errors(path):
            dcp.save(tensors, storage_writer=_Writer(temp, single_file_per_rank=True, thread_count=1))
        mine = [temp / _INDEX] if world.is_main else []
        mine += sorted(temp.glob(f"__{world.rank}_*"))
        own = everywhere(
            world, lambda: {file.name: digest_of_file(file, from_disk=True) for file in mine}, errors=OSError
        )
        files = {name: digest for digests in world.all_gather_objects(own) for name, digest in digests.items()}
        on_main(world, lambda: _finish(temp, path, values, files), errors=OSError)
    finally:
        if world.is_main:
            shutil.rmtree(temp, ignore_errors=True)


def open_sharded(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Read a folder of `save_sharded`, with a StoredTensor in place of each tensor; one process may call this alone.

    `verify` compares the digests of all files. Raises ConfigError if the folder is missing, damaged or something else.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).stat().st_size > _MAX_MANIFEST_BYTES:
            raise damaged(path)
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest.get("format") != _FORMAT:
            raise ConfigError(f"{path} has the unknown format {manifest.get('format')!r:.80}, not {_FORMAT}")
        if manifest.pop("sha256") != _digest_of_text(manifest):
            raise damaged(path)
        if any(Path(name).name != name or not (path / name).is_file() for name in manifest["files"]):
            raise damaged(path)  # also: never read from a device or outside the folder
        if verify and any(digest_of_file(path / name) != digest for name, digest in manifest["files"].items()):
            raise damaged(path)
        index: dict[str, Any] = _Reader(path).read_metadata().state_dict_metadata

        def stored(key: str) -> StoredTensor:
            return StoredTensor(path, key, tuple(index[key].size), index[key].properties.dtype)

        result: dict[str, Any] = _joined(manifest["values"], stored)
    except FileNotFoundError as error:
        if not path.exists():
            raise ConfigError(f"{path} does not exist") from None
        raise damaged(path) from error
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: {reason_of(error)}") from None
    except ConfigError:
        raise
    except Exception as error:  # a hostile folder can fail anywhere: in JSON, the machine, its conversion
        raise damaged(path) from error
    return result


def read_all(data: Any) -> Any:
    """Return `data`, the result of `open_sharded`, with whole tensors on the CPU. Every process must call this."""
    leaves = {path: leaf for path, leaf in flatten(data).items() if isinstance(leaf, StoredTensor)}
    values = {path: torch.empty(leaf.shape, dtype=leaf.dtype) for path, leaf in leaves.items()}
    _read(leaves, values)
    return map_leaves(lambda path, leaf: values.get(path, leaf), data)


def read_into(data: Any, target: Any) -> None:
    """Read the tensors of `data`, the result of `open_sharded`, into those at the same paths of `target`.

    Every process must call this, with its own part of each DTensor. Raises ValueError if names or shapes differ.
    """
    leaves = {path: leaf for path, leaf in flatten(data).items() if isinstance(leaf, StoredTensor)}
    values = {path: value for path, value in flatten(target).items() if isinstance(value, torch.Tensor)}
    check_same(leaves, values)
    _read(leaves, values)


def digest_of_file(path: Path, *, from_disk: bool = False) -> str:
    """SHA-256 of a file's content; `from_disk` bypasses the system's cache."""
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            forget_cached(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        """Leave it out: it would record the temporary path of the folder."""
        return None


class _Reader(dcp.FileSystemReader):
    """DCP's reader of a folder, with a safe reader of its index, which DCP would unpickle freely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path) / _INDEX)


def _read(leaves: dict[str, StoredTensor], values: dict[str, torch.Tensor]) -> None:
    (folder,) = {leaf.folder for leaf in leaves.values()}
    with _dcp_errors(folder):
        dcp.load({leaf.key: values[path] for path, leaf in leaves.items()}, storage_reader=_Reader(folder))


def _finish(temp: Path, path: Path, values: Any, files: dict[str, str]) -> None:
    manifest = {"format": _FORMAT, "files": files, "values": values}
    manifest["sha256"] = _digest_of_text(manifest)
    with open(temp / MANIFEST, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temp)
    replace_folder(temp, path)  # there may be one of the same name, if the run was continued from before it
    sync_folder(path.parent)


def _split(data: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `data` as JSON can hold it; its tensors go to `tensors` under their paths."""
    if isinstance(data, torch.Tensor):
        tensors[path.removeprefix("/")] = data
        return {"$tensor": path.removeprefix("/")}
    if isinstance(data, dict):
        items = [(key, _split(value, f"{path}/{key}", tensors)) for key, value in data.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
        return dict(items) if plain else {"$items": [list(item) for item in items]}
    if isinstance(data, list | tuple):
        values = [_split(value, f"{path}/{index}", tensors) for index, value in enumerate(data)]
        return {"$tuple": values} if isinstance(data, tuple) else values
    assert data is None or isinstance(data, bool | int | float | str), f"{path} is a {type(data).__name__}"
    return data


def _joined(values: Any, tensor: Callable[[str], StoredTensor]) -> Any:
    """Invert `_split`."""
    if isinstance(values, list):
        return [_joined(value, tensor) for value in values]
    if not isinstance(values, dict):
        return values
    if "$tensor" in values:
        return tensor(values["$tensor"])
    if "$tuple" in values:
        return tuple(_joined(value, tensor) for value in values["$tuple"])
    items = values["$items"] if "$items" in values else values.items()
    return {key: _joined(value, tensor) for key, value in items}


def _digest_of_text(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _dcp_errors(path: Path) -> Iterator[None]:
    """Turn a failure of DCP, which it raises in all processes, into an OSError or a ConfigError that names `path`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            yield
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise OSError(cause.errno, reason_of(cause), str(path)) from error
        if isinstance(cause, RuntimeError | Refused | ValueError | KeyError | EOFError):
            raise damaged(path) from error
        raise
