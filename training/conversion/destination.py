"""The destination of a conversion: whether it may be written, and which of its parts are finished already.

A finished part notes in dataset.json, under the key `made_from`, a digest of its source and of the options that
determine the result.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dnnlib import atomic
from dnnlib.disk import require_folder
from dnnlib.errors import ConfigError
from dnnlib.text import format_bytes
from training.conversion.archive import Part, existing_shards, is_unfinished, is_zip
from training.dataset.item_files import FolderFiles, ZipFiles, find_shards
from training.dataset.label_file import LABELS_FILE
from training.images.decode import is_image

MADE_KEY = "made_from"
# Versions that pixels depend on: {"pillow": "12.3.0"}. Its resize rounds differently from version 13 on.
MADE_WITH_KEY = "made_with"


def require_destination(dest: Path, source: Path, *, sharded: bool, overwrite: bool, resumable: bool) -> None:
    """Raise ConfigError unless `dest` may be written: outside of `source`, and new, with `overwrite`, or `resumable`.

    `resumable`: an existing result may be of the same command, which `missing_parts` will check.
    """
    if dest.suffix.lower() in (".7z", ".gz", ".rar", ".tar", ".tgz") or (is_image(dest.name) and not dest.is_dir()):
        raise ConfigError(f"--dest={dest} is neither a ZIP file nor a folder; name one of them")
    if sharded and not is_zip(dest):
        raise ConfigError(f"--dest={dest} is a folder, but shards are ZIP files; name one, as in data.zip")
    if dest.resolve() == source.resolve() or (source.is_dir() and dest.resolve().is_relative_to(source.resolve())):
        raise ConfigError(f"--dest={dest} lies inside of --source={source}; choose a place outside")
    require_folder(dest.parent)
    if is_zip(dest):
        _require_archives(existing_shards(dest) if sharded else [dest], source, replaceable=overwrite or resumable)
        return
    require_folder(dest)
    names = sorted(os.listdir(dest)) if dest.is_dir() else []
    if names and not resumable and not is_unfinished(dest):
        raise ConfigError(f"--dest={dest} is not empty, it has {names[0]}; choose a new folder")


def _require_archives(paths: Iterable[Path], source: Path, *, replaceable: bool) -> None:
    inputs = {path.resolve() for path in ([source] if source.is_file() else find_shards(source))}
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; choose another --dest")
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is part of --source={source}; choose another --dest")
        if path.exists() and not replaceable:
            raise ConfigError(f"{path} exists already; choose another --dest, or add --overwrite to replace it")


def require_disk_space(dest: Path, num_bytes: int) -> None:
    """Raise ConfigError if the disk is too small, instead of failing after hours of work."""
    nearest = next(folder for folder in (dest.absolute(), *dest.absolute().parents) if folder.is_dir())
    disk = shutil.disk_usage(nearest)
    # Some network file systems report 0.
    if disk.total and num_bytes > disk.free:
        raise ConfigError(
            f"{dest} would take {format_bytes(num_bytes)}, but {format_bytes(disk.free)} are free there; "
            "No space left on device: choose another place, a smaller --resolution or --max-images"
        )


def request_digest(request: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def missing_parts(parts: Sequence[Part], digest: str, existing: Sequence[Path], *, replace: bool) -> list[Part]:
    """Return the parts that do not exist and, with `replace`, those that were made from something else.

    `existing`: the shards in the folder. Without `replace`, raises ConfigError for a file or folder that was not made
    as `digest` says, and for shards beyond `parts`.
    """
    extra = sorted(set(existing) - {part.path for part in parts})
    if extra and not replace:
        raise ConfigError(
            f"{extra[0]} exists, of a data set of more shards; choose another --dest, or add --overwrite to replace it"
        )
    missing = []
    for part in parts:
        difference = _difference(part, digest)
        if difference is None:
            continue
        if difference and not replace:
            hint = "add --overwrite to replace it" if is_zip(part.path) else "remove it"
            raise ConfigError(f"{part.path} exists, and {difference}; choose another --dest, or {hint}")
        missing.append(part)
    return missing


def _difference(part: Part, digest: str) -> str | None:
    """None for a part that was made as `digest` says, '' for one that does not exist, else how it differs."""
    path = part.path
    if not path.exists() or (path.is_dir() and (is_unfinished(path) or not any(path.iterdir()))):
        return ""
    if path.is_dir() == is_zip(path):
        return f"is a {'folder' if path.is_dir() else 'file'}"
    head = _head(path)
    if MADE_KEY not in head:
        return "does not say what it was made from"
    shard = None if part.of is None else [part.number, part.of]
    if head[MADE_KEY] != digest or head.get("shard") != shard:
        return "was made from another source or with other options"
    return None


def other_versions(parts: Iterable[Part], made_with: Mapping[str, str]) -> str | None:
    """Describe the versions that made `parts`, if these note others than `made_with`."""
    for part in parts:
        noted = _head(part.path).get(MADE_WITH_KEY)
        if isinstance(noted, dict) and noted != made_with:
            before, now = (", ".join(f"{name} {entry[name]}" for name in entry) for entry in (noted, made_with))
            return f"{part.path} was made with {before}, and this is {now}: resized pixels may differ a little"
    return None


def _head(path: Path) -> dict[str, Any]:
    """Return the content of a part's dataset.json; {} without one."""
    head: Any = None
    with suppress(ConfigError, ValueError, RecursionError):
        files = ZipFiles(path) if is_zip(path) else FolderFiles(path)
        row = files.names.find(LABELS_FILE)
        head = None if row is None else json.loads(bytes(files.read(row)))
    return head if isinstance(head, dict) else {}


def remove_leftovers(parts: Iterable[Part]) -> None:
    """Remove what a killed process left of ZIP files, none of which may be in use."""
    for part in parts:
        if is_zip(part.path):
            atomic.remove_leftovers(part.path)


def remove_stale_shards(existing: Iterable[Path], parts: Iterable[Part]) -> None:
    """Remove those of the `existing` shards that `parts` did not replace: they belong to an older, larger data set."""
    for path in set(existing) - {part.path for part in parts}:
        path.unlink(missing_ok=True)
