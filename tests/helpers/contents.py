"""The content of result files, apart from times: equal for a command that was killed and one that was left in peace."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.helpers.tiny import flat_state
from torch_utils.checkpoints import read_checkpoint, read_whole
from training.snapshot import load_snapshot

# Each session or hour writes these again.
_OF_THE_SESSION = ("log.txt", "sessions.jsonl", "run.lock")


def contents(folder: Path) -> dict[str, Any]:
    """Digests of what the files in `folder` mean, by relative path; folders without files count as well.

    Raises if a file cannot be read as what its name says.
    """
    return {name: read(path) for name, path, read in _items(folder)}


def require_whole(folder: Path) -> None:
    """Raise if a file in `folder` is half-written, apart from hidden files and those that grow by lines."""
    for name, path, read in _items(folder):
        if path.suffix not in (".jsonl", ".txt") and not any(part.startswith(".") for part in Path(name).parts):
            read(path)


def _items(folder: Path) -> Iterator[tuple[str, Path, Callable[[Path], Any]]]:
    """Yield the relative path of each file and folder, its path, and the function that reads its meaning."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".dcp":
            yield name, path, _checkpoint
        elif any(parent.suffix == ".dcp" for parent in path.parents):
            continue
        elif path.is_dir():
            yield name, path, lambda _: "folder"
        elif path.parent.name == "tensorboard":  # each session adds a file
            yield "tensorboard/events", path, lambda _: "events"
        else:
            yield name, path, _READERS.get(path.suffix, _digest_of_file)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(part if isinstance(part, bytes) else f"{part!r};".encode())
    return digest.hexdigest()[:16]


def _digest_of_file(path: Path) -> str:
    return "" if path.name in _OF_THE_SESSION else _digest([path.read_bytes()])


def _checkpoint(path: Path) -> dict[str, str]:
    state = flat_state(read_whole(read_checkpoint(path)))
    parts: dict[str, list[Any]] = {}
    for key, value in state.items():
        if not key.endswith("/total_elapsed_time"):
            parts.setdefault(key.split("/")[1], []).extend((key, value))
    return {name: _digest(values) for name, values in parts.items()}


def _snapshot(path: Path) -> str:
    snapshot = load_snapshot(path)
    facts = [snapshot.nimg, snapshot.ema_std, snapshot.info, snapshot.dataset_kwargs]
    return _digest([*facts, *(part for item in snapshot.net.state_dict().items() for part in item)])


def _safetensors(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        metadata = sorted((file.metadata() or {}).items())
        return _digest([metadata, *(part for name in names for part in (name, file.get_tensor(name)))])


def _lines(path: Path) -> list[Any]:
    if path.name in _OF_THE_SESSION:
        return []
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("Timing/", "Resources/", "timestamp"))} for line in lines
    ]


def _result(path: Path) -> str:
    data = json.loads(path.read_text("utf-8"))
    return _digest([{key: value for key, value in data.items() if key != "finished"}])


def _arrays(path: Path) -> str:
    with np.load(path) as file:
        return _digest(part for name in sorted(file) for part in (name, file[name].tobytes()))


def _entries(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        return _digest(part for name in file.namelist() for part in (name, file.read(name)))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _checkpoint,
    ".pkl": _snapshot,
    ".safetensors": _safetensors,
    ".jsonl": _lines,
    ".json": _result,
    ".npz": _arrays,
    ".zip": _entries,
}
