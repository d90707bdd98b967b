"""The files of an uncompressed tar, read in place: a WebDataset shard, or the folder of a data set in a tar.

In a WebDataset, files that share a name up to its first dot are one sample, such as a.jpg and a.cls. A tar has no table
of contents: finding its members takes one pass, so callers keep the result.
"""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from training.dataset.item_files import MappedFiles
from training.dataset.items import is_item
from training.dataset.label_file import StoredLabels, read_json, require_inside
from training.dataset.zip_index import NameTable, plain_name

_LABEL_SUFFIXES = (".cls", ".json")
_MAX_LABEL_BYTES = 1 << 20
_MAX_HEADER_BYTES = 16 << 20  # long names and their like; tarfile reads each at once


class ReadsBounded:
    """The binary file `file`, where no single read takes more than `most` bytes of memory. Raises tarfile.ReadError."""

    def __init__(self, file: Any, most: int) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file, self._most = file, most

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        if count > self._most:
            raise tarfile.ReadError(f"an entry claims {count} bytes, more than is possible")
        data: bytes = self._file.read(count)
        return data


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """The places of the files of a tar, in the order of their names."""

    names: NameTable
    starts: np.ndarray  # first byte, int64
    sizes: np.ndarray  # bytes, int64


class TarFiles(MappedFiles):
    """The files of the tar at `path`."""

    kind = "tar"

    def __init__(self, path: Path, index: TarIndex) -> None:
        super().__init__(path, index.names)
        self._index = index

    def read(self, row: int) -> memoryview:
        """See Files."""
        return self._slice(self._open(), row, int(self._index.starts[row]), int(self._index.sizes[row]))


def index_tar(file: BinaryIO, where: str) -> TarIndex:
    """Return the places of the files in a tar. Raises ConfigError if it is damaged; `where` names it in messages.

    Links inside of the tar lead to their target's data; others are refused, since images would be missing.
    """
    members: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        bounded: Any = ReadsBounded(file, _MAX_HEADER_BYTES)
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for member in archive:
                name = plain_name(member.name)
                if member.isreg() and not member.issparse():
                    members[name] = member.offset_data, member.size
                elif member.islnk():
                    links[name] = plain_name(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(
                        posixpath.join(posixpath.dirname(name), plain_name(member.linkname))
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        file.seek(0)
        reason = POINTER_HINT if is_lfs_pointer(file.read(64)) else one_line(error)
        raise ConfigError(f"{where} is not a readable uncompressed tar file: {reason}") from None
    require_inside(members, where)
    for name, target in links.items():
        if target in members:
            members[name] = members[target]
        elif is_item(name) or not posixpath.splitext(name)[1]:  # an image, or perhaps a folder of images
            raise ConfigError(
                f"{where}: {name} is a link to {target}, which is not a file in it; make it again by tar --dereference"
            )
    require_inside(members, where)
    names = sorted(members)
    return TarIndex(
        names=NameTable(names),
        starts=np.array([members[name][0] for name in names], dtype=np.int64),
        sizes=np.array([members[name][1] for name in names], dtype=np.int64),
    )


def sample_labels(
    names: Iterable[str], items: Sequence[str], read: Callable[[str], Any], where: str
) -> StoredLabels | None:
    """Return the labels of `items` in the .cls and .json files next to them, as in a WebDataset; None without any.

    `names`: all files; `read` returns the bytes of one. Raises ConfigError for a file that does not hold a label.
    """
    label_files: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name.endswith(_LABEL_SUFFIXES):
            label_files[sample_of(name)].append(name)
    item_of: dict[str, str] = {}
    for item in items:
        other = item_of.setdefault(sample_of(item), item)
        # Without label files this may be an ordinary folder, with names such as cat.0.jpg and cat.1.jpg.
        if other != item and (label_files or posixpath.splitext(other)[0] == posixpath.splitext(item)[0]):
            raise ConfigError(f"{where} has {other} and {item} in one sample; one each is supported")
    values = [_sample_label(label_files.get(sample_of(item), ()), read, where) for item in items] if label_files else []
    return StoredLabels(values=values) if any(value is not None for value in values) else None


def sample_of(name: str) -> str:
    """Return the part of `name` that the files of its sample share."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _sample_label(names: Iterable[str], read: Callable[[str], Any], where: str) -> Any:
    """Return the label in the files `names` of a sample; None without a label.

    A .cls file comes before a .json file, whose entry `label` or `cls` counts.
    """
    for name in sorted(names, key=lambda n: n.endswith(".json")):
        data = bytes(read(name))
        if len(data) > _MAX_LABEL_BYTES:
            raise ConfigError(f"{where}: {name} has {len(data)} bytes, too many for a label")
        try:
            content = read_json(data, f"{where}: {name}")
        except ConfigError as error:
            content = _plain_text(data)
            if name.endswith(".json") or content is None:
                raise ConfigError(f"{where}: {name} holds no label: {one_line(error)}") from None
        if name.endswith(".cls"):
            return content
        if isinstance(content, dict):
            label = content.get("label", content.get("cls"))
            if label is not None:
                return label
    return None


def _plain_text(data: bytes) -> str | None:
    """Return the name of a class in a .cls file; None if it is not one printable line."""
    text = data.decode("utf-8-sig", "replace").strip()
    return text if text.isprintable() and text and "\ufffd" not in text else None
