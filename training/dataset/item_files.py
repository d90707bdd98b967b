"""The files of a data set: in a folder, in a ZIP file, or in several ZIP files that make up one set.

All kinds are `Files`: `names`, sorted, and `read(row)`, which returns the bytes of the file `names[row]`.
"""

import mmap
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError, one_line, reason_of
from training.dataset.zip_index import STORED, NameTable, read_index

LABELS_FILE = "dataset.json"
_DEFLATED = 8
_MAX_UNPACKED_BYTES = 1 << 30  # of one entry that is compressed
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


class Files(ABC):
    """Files by row, named by their paths inside `path`, with forward slashes, in sorted order."""

    def __init__(self, path: Path, names: NameTable) -> None:
        self.path = path
        self.names = names

    @property
    def parts(self) -> Sequence["Files"]:
        """The shards; the files themselves where there are no shards."""
        return [self]

    def describe(self, row: int) -> str:
        """Return the location of a file, for messages."""
        return f"{self.path}: {self.names[row]}"

    @abstractmethod
    def read(self, row: int) -> memoryview | bytes:
        """Return the bytes of a file, possibly as a view. Raises ConfigError if it cannot be read or is damaged."""

    def fingerprint(self) -> int:
        """Return a number that almost certainly differs for other files; here for other names."""
        return zlib.crc32(self.names.text)

    def close(self) -> None:  # noqa: B027 not all kinds keep files open
        """Release open files; each closes when its last view is gone. The next read opens them again."""


class FolderFiles(Files):
    """The files below a folder. Their fingerprint covers the names only: reading the contents would take long."""

    def __init__(self, path: Path) -> None:
        walk = ((Path(folder), names) for folder, _, names in os.walk(path))
        found = sorted((folder / name).relative_to(path).as_posix() for folder, names in walk for name in names)
        super().__init__(path, NameTable(found))

    def read(self, row: int) -> bytes:
        """See Files."""
        try:
            return (self.path / self.names[row]).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.describe(row)} cannot be read: {reason_of(error)}") from None


class MappedFiles(Files):
    """Files inside one archive, which is mapped into memory: reading an uncompressed entry copies nothing.

    Safe in threads and in workers, forked or spawned: a map has no file position to share.
    """

    kind = ""

    def __init__(self, path: Path, names: NameTable) -> None:
        super().__init__(path, names)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def close(self) -> None:
        """See Files."""
        self._map = None

    def _open(self) -> mmap.mmap:
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{self.path} is not a readable {self.kind} file: {one_line(error)}") from None
        return self._map

    def _slice(self, whole: mmap.mmap, row: int, begin: int, size: int) -> memoryview:
        if begin + size > len(whole):
            raise self._damaged(row, "it ends behind the end of the file")
        return memoryview(whole)[begin : begin + size]

    def _damaged(self, row: int, reason: str) -> ConfigError:
        return ConfigError(f"{self.describe(row)} cannot be read: {reason}")


class ZipFiles(MappedFiles):
    """The entries of a ZIP file, without folders. The first read of an entry compares its checksum."""

    kind = "ZIP"

    def __init__(self, path: Path) -> None:
        self._index = read_index(path)
        super().__init__(path, self._index.names)
        self._sound = np.zeros(len(self.names), dtype=bool)  # entries whose checksum has been compared

    def read(self, row: int) -> memoryview | bytes:
        """See Files."""
        index, whole = self._index, self._open()
        data: memoryview | bytes = self._slice(whole, row, self._begin(whole, row), int(index.packed_sizes[row]))
        if index.methods[row] != STORED:
            data = self._unpack(row, data)
        if not self._sound[row]:
            if len(data) != index.sizes[row] or zlib.crc32(data) != index.checksums[row]:
                raise self._damaged(row, "its checksum does not fit")
            self._sound[row] = True
        return data

    def require_name(self, row: int) -> None:
        """Raise ConfigError if the header of an entry has another name than the table of contents."""
        self._begin(self._open(), row)

    def fingerprint(self) -> int:
        """Return a number made from the names and the checksums of the contents."""
        return zlib.crc32(self._index.checksums.tobytes(), zlib.crc32(self.names.text))

    def _begin(self, whole: mmap.mmap, row: int) -> int:
        """Return where the bytes of an entry begin, behind its header, whose name is checked."""
        place = int(self._index.offsets[row])
        if not 0 <= place <= len(whole) - _LOCAL_HEADER.size:
            raise self._damaged(row, "it would begin outside of the file")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(whole, place)
        if signature != b"PK\3\4":
            raise self._damaged(row, "its header is missing")
        begin = place + _LOCAL_HEADER.size + name_length
        if not self._sound[row]:
            name = bytes(whole[place + _LOCAL_HEADER.size : begin])
            # Names beyond ASCII have several encodings, and are not compared.
            if name.isascii() and _plain(name.decode()) != _plain(self.names[row]):
                raise self._damaged(row, "the entry there has another name")
        return begin + extra_length

    def _unpack(self, row: int, data: memoryview | bytes) -> bytes:
        if self._index.methods[row] != _DEFLATED:
            raise self._damaged(row, "it is encrypted, or compressed in an unusual way; store entries uncompressed")
        unpacked_size = int(self._index.sizes[row])
        if unpacked_size > _MAX_UNPACKED_BYTES:
            raise self._damaged(row, f"it claims {unpacked_size} bytes unpacked, more than any image has")
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, unpacked_size + 1)
        except zlib.error as error:
            raise self._damaged(row, one_line(error)) from None


class ShardedFiles(Files):
    """Several ZIP files as one. Each may have a dataset.json, which is hidden; other names must differ."""

    def __init__(self, path: Path, parts: Sequence[ZipFiles]) -> None:
        names = [name for part in parts for name in part.names]
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.names) for part in parts])
        row_of = np.concatenate([np.arange(len(part.names), dtype=np.int64) for part in parts])
        order = sorted((i for i, name in enumerate(names) if name != LABELS_FILE), key=names.__getitem__)
        for i, j in pairwise(order):
            if names[i] == names[j]:
                both = " and ".join(str(parts[part_of[k]].path.name) for k in (i, j))
                raise ConfigError(f"{both} both hold {names[i]}; the shards of one data set share no file")
        super().__init__(path, NameTable([names[i] for i in order]))
        self._parts = parts
        self._part_of, self._row_of = part_of[order], row_of[order]

    @property
    def parts(self) -> Sequence[ZipFiles]:
        """See Files."""
        return self._parts

    def describe(self, row: int) -> str:
        """See Files."""
        return self._parts[self._part_of[row]].describe(int(self._row_of[row]))

    def read(self, row: int) -> memoryview | bytes:
        """See Files."""
        return self._parts[self._part_of[row]].read(int(self._row_of[row]))

    def fingerprint(self) -> int:
        """Return a number made from those of the parts."""
        return zlib.crc32(str([part.fingerprint() for part in self._parts]).encode())

    def close(self) -> None:
        """See Files."""
        for part in self._parts:
            part.close()


def open_files(path: Path) -> Files:
    """Open a folder, a ZIP file, or shards, named as for ImageFolderDataset. Raises ConfigError for anything else."""
    if path.is_file():
        return ZipFiles(path)
    shards = find_shards(path)
    if shards:
        return ShardedFiles(path, [ZipFiles(shard) for shard in shards])
    if path.is_dir():
        return FolderFiles(path)
    raise ConfigError(f"data set {path} does not exist; give a folder or a ZIP file")


def find_shards(path: Path) -> list[Path]:
    """Return the shards of the data set that `path` names, sorted, or []. Raises ConfigError if one is missing."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        shards = files if all(file.suffix == ".zip" and file.is_file() for file in files) else []
    elif any(sign in path.name for sign in "*?["):
        shards = sorted(path.parent.glob(path.name))
    elif path.suffix == ".zip":
        shards = sorted(file for file in path.parent.glob("*.zip") if _shard_number(file, path.stem) is not None)
    else:
        shards = []
    numbers = sorted(number for shard in shards if (number := _shard_number(shard)) is not None)
    missing = [expected for expected, number in enumerate(numbers) if number != expected]
    if missing:
        raise ConfigError(f"{path}: shard {missing[0]:05d} is missing of {len(shards) + 1}")
    return shards


def _plain(name: str) -> str:
    return name.partition("\0")[0].replace("\\", "/")


def _shard_number(path: Path, stem: str | None = None) -> int | None:
    """Return the number in name-00012.zip, where `stem` is the name; None stands for any name."""
    match = re.fullmatch(r"(.*)-(\d{5})\.zip", path.name)
    return int(match[2]) if match and stem in (None, match[1]) else None
