"""Whether a data set that is there is the one that is asked for: its dataset.json tells what it was made from.

That is a digest of the source and of the options that decide on the result, under the key `made_from`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dnnlib import leftovers
from dnnlib.errors import ConfigError
from training.conversion.archive import Part, is_zip
from training.dataset.item_files import FolderFiles, ZipFiles
from training.dataset.label_file import LABELS_FILE

MADE_KEY = "made_from"

# As `archive` names them.
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")
_SUBFOLDER = re.compile(r"\d{5}")


def request_digest(request: Mapping[str, Any]) -> str:
    """A digest of plain values, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def missing_parts(parts: Sequence[Part], digest: str, found: Sequence[Path], *, replace: bool) -> list[Part]:
    """The parts that are still to be made: those that are not there and, with `replace`, those made from other things.

    `found`: the shards that there are. Raises ConfigError, without `replace`, for a file or folder that was not made as
    `digest` says, and for shards beyond the parts.
    """
    more = sorted(set(found) - {part.path for part in parts})
    if more and not replace:
        raise ConfigError(
            f"{more[0]} is there, of a data set of more shards; choose another --dest, or add --overwrite to replace it"
        )
    missing = []
    for part in parts:
        reason = _other(part, digest)
        if reason is None:
            continue
        if reason and not replace:
            hint = "add --overwrite to replace it" if is_zip(part.path) else "remove it"
            raise ConfigError(f"{part.path} is there, and {reason}; choose another --dest, or {hint}")
        missing.append(part)
    return missing


def remove_leftovers(parts: Sequence[Part]) -> None:
    """Remove what a process that was killed has left of these parts, none of which is being written any more."""
    for part in parts:
        if is_zip(part.path):
            leftovers.remove_leftovers(part.path)
        elif part.path.is_dir() and not (part.path / LABELS_FILE).exists() and _is_ours(part.path):
            for path in part.path.iterdir():
                shutil.rmtree(path, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether there is nothing in the folder but what a data set that is being written has there."""
    names = os.listdir(folder)
    return all(_TEMPORARY.fullmatch(name) or _SUBFOLDER.fullmatch(name) for name in names)


def _other(part: Part, digest: str) -> str | None:
    """None for a part that is as `digest` says, '' for one that is not there, else what is wrong with it."""
    path = part.path
    if not path.exists() or (path.is_dir() and not (path / LABELS_FILE).exists() and _is_ours(path)):
        return ""
    if path.is_dir() == is_zip(path):
        return f"is a {'folder' if path.is_dir() else 'file'}"
    about: Any = None
    with suppress(ConfigError, ValueError, RecursionError):
        files = ZipFiles(path) if is_zip(path) else FolderFiles(path)
        row = files.names.find(LABELS_FILE)
        about = None if row is None else json.loads(bytes(files.read(row)))
    if not isinstance(about, dict) or MADE_KEY not in about:
        return "does not say what it was made from"
    shard = None if part.of is None else [part.number, part.of]
    if about[MADE_KEY] != digest or about.get("shard") != shard:
        return "was made from another source or with other options"
    return None
