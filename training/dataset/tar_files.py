"""The items of an uncompressed tar, read in place: a WebDataset shard, or the folder of a data set in a tar.

In a WebDataset, files that share a name up to its first dot are one sample, such as a.jpg and a.cls. A tar has no table
of contents: finding its members takes one pass, so callers keep the result.
"""

import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dnnlib.errors import ConfigError, one_line
from training.dataset.item_files import MappedFiles
from training.dataset.items import is_item
from training.dataset.label_file import LABELS_FILE, Label, check_labels, read_labels, require_inside
from training.dataset.zip_index import NameTable

_LABEL_SUFFIXES = (".cls", ".json")
_MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """The places of the items of a tar, in the order of their names."""

    names: NameTable
    starts: np.ndarray  # first byte, int64
    sizes: np.ndarray  # bytes, int64


class TarFiles(MappedFiles):
    """The items of the tar at `path`."""

    kind = "tar"

    def __init__(self, path: Path, index: TarIndex) -> None:
        super().__init__(path, index.names)
        self._index = index

    def read(self, row: int) -> memoryview:
        """See Files."""
        return self._slice(self._open(), row, int(self._index.starts[row]), int(self._index.sizes[row]))


def index_tar(
    file: BinaryIO, where: str, *, selects: Callable[[str], bool] = is_item
) -> tuple[TarIndex, list[Label] | None, bytes | None]:
    """Return the items of a tar, their labels in the same order, and the text of its dataset.json.

    Labels come from dataset.json, else from the .cls or .json file of each sample; None without labels. `where` names
    the tar in messages; `selects` tells items by their names. Raises ConfigError if the tar is damaged or labels only
    some of its items.
    """
    members = _members(file, where)
    items = sorted(name for name in members if selects(name))
    index = TarIndex(
        names=NameTable(items),
        starts=np.array([members[name][0] for name in items], dtype=np.int64),
        sizes=np.array([members[name][1] for name in items], dtype=np.int64),
    )

    def read(name: str) -> bytes:
        file.seek(members[name][0])
        return file.read(members[name][1])

    if LABELS_FILE in members:
        text = read(LABELS_FILE)
        return index, read_labels(text, items, f"{where}: {LABELS_FILE}"), text
    return index, _item_labels(members, items, read, where), None


def _members(file: BinaryIO, where: str) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    require_inside([name], where)
                    members[name] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{where} is not a readable uncompressed tar file: {one_line(error)}") from None
    return members


def _item_labels(members: dict[str, tuple[int, int]], items: list[str], read: Any, where: str) -> list[Label] | None:
    item_of: dict[str, str] = {}
    for item in items:
        other = item_of.setdefault(sample_of(item), item)
        if other != item:
            raise ConfigError(f"{where} has {other} and {item} in one sample; one each is supported")
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for name, (_, size) in members.items():
        if name.endswith(_LABEL_SUFFIXES):
            sizes[sample_of(name)][name] = size
    return all_or_none(items, [sample_label(sizes[sample_of(item)], read, where) for item in items], where)


def sample_of(name: str) -> str:
    """Return the part of `name` that the files of its sample share."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def sample_label(sizes: Mapping[str, int], read: Callable[[str], bytes], where: str) -> Any:
    """Return the label of a WebDataset sample whose files have these `sizes`; None without a label.

    A .cls file comes before a .json file, whose entry `label` or `cls` counts. `read(name)` returns the bytes of a
    file. Raises ConfigError for a file that does not hold a label.
    """
    for name in sorted((name for name in sizes if name.endswith(_LABEL_SUFFIXES)), key=lambda n: n.endswith(".json")):
        if sizes[name] > _MAX_LABEL_BYTES:
            raise ConfigError(f"{where}: {name} has {sizes[name]} bytes, too many for a label")
        try:
            content = json.loads(read(name))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: {name} holds no label: {one_line(error)}") from None
        if name.endswith(".cls"):
            return content
        if isinstance(content, dict):
            label = content.get("label", content.get("cls"))
            if label is not None:
                return label
    return None


def all_or_none(names: Sequence[str], labels: Sequence[Any], where: str) -> list[Label] | None:
    """Return the labels, checked; None if no image has one. Raises ConfigError if only some have one."""
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise ConfigError(
            f"{where} has no label for {len(missing)} of {len(names)} images, first {missing[0]}; label all or none"
        )
    return check_labels(zip(names, labels, strict=True), where)
