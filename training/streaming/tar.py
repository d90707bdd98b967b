"""The items of an uncompressed tar, read where they lie: a WebDataset shard, or a data set's folder in a tar.

In a WebDataset, files that share a name up to its first dot are one sample, such as a.jpg and a.cls. A tar has no table
of contents; finding its members takes one pass, whose result is to be kept.
"""

import mmap
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dnnlib.errors import ConfigError
from training.dataset.items import is_item
from training.dataset.label_file import LABELS_FILE, Label, read_labels, require_inside
from training.dataset.tar_labels import SUFFIXES, all_or_none, sample_label
from training.dataset.zip_index import NameTable, one_line


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Where the items of a tar lie, in the order of their names."""

    names: NameTable
    starts: np.ndarray  # first byte, int64
    sizes: np.ndarray  # bytes, int64


class TarFiles:
    """The items of the tar at `path`, which is mapped into memory; with the face of the kinds in data/files.py."""

    def __init__(self, path: Path, index: TarIndex) -> None:
        self.path = path
        self._index = index
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    @property
    def names(self) -> NameTable:
        """The items' names, sorted."""
        return self._index.names

    def describe(self, row: int) -> str:
        """Where the item is, for messages."""
        return f"{self.path}: {self.names[row]}"

    def read(self, row: int) -> memoryview:
        """The bytes of the item, a view of the file; ConfigError if the file is too short."""
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{self.path} is no readable tar file: {one_line(error)}") from None
        begin, size = int(self._index.starts[row]), int(self._index.sizes[row])
        if begin + size > len(self._map):
            raise ConfigError(f"{self.describe(row)} cannot be read: it ends behind the end of the file")
        return memoryview(self._map)[begin : begin + size]

    def close(self) -> None:
        """Let go of the file, which is closed when the last view of it is gone; reading again opens it again."""
        self._map = None


def index_tar(file: BinaryIO, where: str) -> tuple[TarIndex, list[Label] | None, bytes | None]:
    """The items of a tar, their labels in the same order, and the text of its dataset.json.

    Labels come from the dataset.json, else from the .cls or .json file of each sample; None where there are none.
    `where` is what errors call the tar. Raises ConfigError where it is damaged or labels only some.
    """
    members = _members(file, where)
    items = sorted(name for name in members if is_item(name))
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
    return index, _sample_labels(members, items, read, where), None


def _members(file: BinaryIO, where: str) -> dict[str, tuple[int, int]]:
    """First byte and size of every regular file in the tar."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    require_inside([name], where)
                    members[name] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{where} is no readable uncompressed tar file: {one_line(error)}") from None
    return members


def _sample_labels(members: dict[str, tuple[int, int]], items: list[str], read: Any, where: str) -> list[Label] | None:
    """Labels of the items from the files beside them, of all or none."""
    item_of: dict[str, str] = {}
    for item in items:
        other = item_of.setdefault(_sample(item), item)
        if other != item:
            raise ConfigError(f"{where} has {other} and {item} in one sample; one each is known")
    beside: dict[str, list[str]] = defaultdict(list)
    for name in members:
        if name.endswith(SUFFIXES) and _sample(name) in item_of:
            beside[_sample(name)].append(name)
    labels = [sample_label({name: members[name][1] for name in beside[_sample(item)]}, read, where) for item in items]
    return all_or_none(items, labels, where)


def _sample(name: str) -> str:
    """What the names of a sample's files share."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
