"""The files of a data set, wherever they lie: in a folder, in a ZIP file, or in several ZIP files that make up one set.

All kinds have the same face: `names`, sorted, and `read(row)`, which gives the bytes of the file `names[row]`.
"""

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError, reason_of
from training.dataset.zip_index import STORED, NameTable, one_line, read_index

__all__ = ["Files", "FolderFiles", "ShardedFiles", "ZipFiles", "one_line", "open_files"]

_DEFLATED = 8
_MAX_UNPACKED_BYTES = 1 << 30  # of one entry that is compressed
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


class FolderFiles:
    """The files below a folder, named by their paths relative to it, with forward slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: Sequence[FolderFiles | ZipFiles] = [self]
        self.names = NameTable(
            sorted(
                (Path(folder) / name).relative_to(path).as_posix()
                for folder, _, names in os.walk(path)
                for name in names
            )
        )

    def describe(self, row: int) -> str:
        """Where the file is, for messages."""
        return f"{self.path}: {self.names[row]}"

    def read(self, row: int) -> bytes:
        """The bytes of the file; ConfigError if it cannot be read."""
        try:
            return (self.path / self.names[row]).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.describe(row)} cannot be read: {reason_of(error)}") from None

    def fingerprint(self) -> int:
        """A number made of the names, since the content would take long."""
        return zlib.crc32(self.names.text)

    def close(self) -> None:
        """Nothing stays open between reads."""


class ZipFiles:
    """The entries of a ZIP file, which is mapped into memory: reading an uncompressed entry copies nothing.

    Safe in threads and in workers, forked or spawned: a map has no file position to share. The checksum of an entry is
    compared the first time that this object reads it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: Sequence[FolderFiles | ZipFiles] = [self]
        self._index = read_index(path)
        self._map: mmap.mmap | None = None
        self._sound = np.zeros(len(self._index.names), dtype=bool)  # checksum seen to be right

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "parts": None, "_sound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parts = [self]
        self._sound = np.zeros(len(self._index.names), dtype=bool)

    @property
    def names(self) -> NameTable:
        """The entries' names, sorted; folders are left out."""
        return self._index.names

    def describe(self, row: int) -> str:
        """Where the entry is, for messages."""
        return f"{self.path}: {self.names[row]}"

    def read(self, row: int) -> memoryview | bytes:
        """The bytes of the entry, a view of the file where it is stored as it is; ConfigError if it is damaged."""
        index = self._index
        whole = self._open()
        begin = self._begin(row, whole)
        end = begin + int(index.packed_sizes[row])
        if end > len(whole):
            raise self._damaged(row, "it ends behind the end of the file")
        data: memoryview | bytes = memoryview(whole)[begin:end]
        if index.methods[row] != STORED:
            data = self._unpack(row, data)
        if not self._sound[row]:
            if len(data) != index.sizes[row] or zlib.crc32(data) != index.checksums[row]:
                raise self._damaged(row, "its checksum does not fit")
            self._sound[row] = True
        return data

    def require_name(self, row: int) -> None:
        """Raise ConfigError if the entry has another name in front of it than in the table of contents."""
        self._begin(row, self._open())

    def _begin(self, row: int, whole: mmap.mmap) -> int:
        """Where the entry's bytes begin, behind its header, which must have its name."""
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

    def fingerprint(self) -> int:
        """A number made of the names and the checksums of the content."""
        return zlib.crc32(self._index.checksums.tobytes(), zlib.crc32(self.names.text))

    def close(self) -> None:
        """Let go of the file, which is closed when the last view of it is gone; reading again opens it again."""
        self._map = None

    def _open(self) -> mmap.mmap:
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{self.path} is no readable ZIP file: {one_line(error)}") from None
        return self._map

    def _unpack(self, row: int, data: memoryview | bytes) -> bytes:
        if self._index.methods[row] != _DEFLATED:
            raise self._damaged(row, "it is encrypted, or compressed in an unusual way; store entries uncompressed")
        unpacked_size = int(self._index.sizes[row])
        if unpacked_size > _MAX_UNPACKED_BYTES:
            raise self._damaged(row, f"it claims {unpacked_size} bytes unpacked, more than any picture has")
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, unpacked_size + 1)
        except zlib.error as error:
            raise self._damaged(row, one_line(error)) from None

    def _damaged(self, row: int, reason: str) -> ConfigError:
        return ConfigError(f"{self.describe(row)} cannot be read: {reason}")


class ShardedFiles:
    """Several ZIP files as one. A name that two of them have is refused, but for the file with the labels."""

    def __init__(self, path: Path, parts: Sequence[ZipFiles], *, shared: Iterable[str]) -> None:
        self.path = path
        self.parts = parts
        names = [name for part in parts for name in part.names]
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.names) for part in parts])
        row_of = np.concatenate([np.arange(len(part.names), dtype=np.int64) for part in parts])
        left_out = set(shared)
        order = sorted((i for i, name in enumerate(names) if name not in left_out), key=names.__getitem__)
        for i, j in pairwise(order):
            if names[i] == names[j]:
                both = " and ".join(str(parts[part_of[k]].path.name) for k in (i, j))
                raise ConfigError(f"{both} both hold {names[i]}; the shards of one data set share no file")
        self._part_of, self._row_of = part_of[order], row_of[order]
        self.names = NameTable([names[i] for i in order])

    def describe(self, row: int) -> str:
        """Where the file is, for messages."""
        return self.parts[self._part_of[row]].describe(int(self._row_of[row]))

    def read(self, row: int) -> memoryview | bytes:
        """The bytes of the file; ConfigError if it is damaged."""
        return self.parts[self._part_of[row]].read(int(self._row_of[row]))

    def fingerprint(self) -> int:
        """A number made of those of the parts."""
        return zlib.crc32(str([part.fingerprint() for part in self.parts]).encode())

    def close(self) -> None:
        """Let go of the files; reading again opens them again."""
        for part in self.parts:
            part.close()


Files = FolderFiles | ZipFiles | ShardedFiles


def open_files(path: Path, *, shared: Iterable[str] = ("dataset.json",)) -> Files:
    """The files of the data set at `path`: a folder, a ZIP file, or shards name-00000.zip, name-00001.zip, ...

    Shards are named by the `name.zip` that would hold them all, by a pattern such as `name-*.zip`, or by a folder with
    nothing else in it. Raises ConfigError where there is none of these.
    """
    if path.is_file():
        return ZipFiles(path)
    shards = find_shards(path)
    if shards:
        return ShardedFiles(path, [ZipFiles(shard) for shard in shards], shared=shared)
    if path.is_dir():
        return FolderFiles(path)
    raise ConfigError(f"data set {path} does not exist; give a folder or a ZIP file")


def find_shards(path: Path) -> list[Path]:
    """The ZIP files that `path` stands for as shards of one data set, sorted; none if it stands for something else.

    Raises ConfigError where one of name-00000.zip, name-00001.zip, ... is missing.
    """
    if path.is_dir():
        files = sorted(place for place in path.iterdir() if not place.name.startswith("."))
        shards = files if files and all(place.suffix == ".zip" and place.is_file() for place in files) else []
    elif any(sign in path.name for sign in "*?["):
        shards = sorted(path.parent.glob(path.name))
    else:
        shards = sorted(place for place in path.parent.glob("*.zip") if _shard_number(place, path.stem) is not None)
        if path.suffix != ".zip":
            shards = []
    numbers = [_shard_number(place) for place in shards]
    missing = [number for number, found in enumerate(sorted(n for n in numbers if n is not None)) if number != found]
    if missing:
        raise ConfigError(f"{path}: shard {missing[0]:05d} is missing of {len(shards) + 1}")
    return shards


def _plain(name: str) -> str:
    """A name as `zipfile` gives it."""
    return name.partition("\0")[0].replace("\\", "/")


def _shard_number(path: Path, stem: str | None = None) -> int | None:
    """The number in name-00012.zip, where `stem` is the name, or any."""
    match = re.fullmatch(r"(.*)-(\d{5})\.zip", path.name)
    return int(match[2]) if match and stem in (None, match[1]) else None
