"""The files of a data set: in a folder, in a ZIP file, or in several ZIP files that make up one set.

All kinds are `Files`: `names`, sorted, and `read(row)`, which returns the bytes of the file `names[row]`.
"""

import mmap
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.disk import require_plain
from dnnlib.errors import ConfigError, one_line, reason_of
from training.dataset.zip_index import STORED, NameTable, plain_name, read_index

LABELS_FILE = "dataset.json"
_DEFLATED = 8
# What is compressed may grow to FREE_BYTES, else MAX_RATIO times: labels shrink to a tenth, images hardly.
FREE_BYTES = 1 << 26
MAX_RATIO = 100
_SYSTEM_FOLDERS = ("lost+found", "System Volume Information")  # at the top of a disk, closed to users
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

    def checksums(self, rows: np.ndarray) -> np.ndarray:
        """Return CRC-32 values of the contents of files; of a folder's, at most 256: reading all would take long."""
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(int)]
        return np.array([zlib.crc32(self.read(int(row))) for row in some], dtype=np.uint32)

    def close(self) -> None:  # noqa: B027 not all kinds keep files open
        """Release open files; each closes when its last view is gone. The next read opens them again."""


class FolderFiles(Files):
    """The files below a folder. Their fingerprint covers the names only: reading the contents would take long.

    Links are followed. A file's name may contain backslashes on systems where these are ordinary characters, as left
    by programs that unpacked an archive of Windows; they are read as slashes.
    """

    def __init__(self, path: Path) -> None:
        found = list(_walk(str(path), "", ()))
        self._stored = {plain_name(name): name for name in found if "\\" in name}  # where the names on the disk differ
        names = sorted(plain_name(name) for name in found)
        for one, two in pairwise(names):
            if one == two:
                raise ConfigError(f"{path} has {one} twice, with / and with \\ in its name; remove one of them")
        super().__init__(path, NameTable(names))

    def read(self, row: int) -> bytes:
        """See Files."""
        name = self.names[row]
        try:
            return (self.path / self._stored.get(name, name)).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.describe(row)} cannot be read: {reason_of(error)}") from None


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the paths of the files in `folder`. `above`: the folders on the way, which a loop of links would repeat."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            return
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        if _is_hidden(prefix):
            return
        raise ConfigError(f"{folder} cannot be read: {reason_of(error)}") from None
    for entry in entries:
        name = prefix + entry.name
        # Unlike entry.is_dir(), isdir() accepts a link to itself.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(entry.path, f"{name}/", (*above, (status.st_dev, status.st_ino)))
        elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
            yield name
        elif not _is_hidden(name):
            require_plain(entry.path)
            raise ConfigError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist; correct or remove it"
            )


def _is_hidden(name: str) -> bool:
    return "/." in f"/{name}" or name.split("/")[0] in _SYSTEM_FOLDERS


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
        if self._map.size() < len(self._map):  # reading behind the end would kill the process
            raise ConfigError(f"{self.path} got shorter while it was read; leave the files of a data set as they are")
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

    def checksums(self, rows: np.ndarray) -> np.ndarray:
        """See Files; of all `rows`, from the table of contents."""
        return np.asarray(self._index.checksums[rows], dtype=np.uint32)

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
        if unpacked_size > max(FREE_BYTES, MAX_RATIO * len(data)):
            raise self._damaged(row, f"it claims {unpacked_size} bytes unpacked, too many; store entries uncompressed")
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

    def checksums(self, rows: np.ndarray) -> np.ndarray:
        """See Files; of all `rows`."""
        found = np.zeros(len(rows), dtype=np.uint32)
        for index, part in enumerate(self._parts):
            mine = self._part_of[rows] == index
            found[mine] = part.checksums(self._row_of[rows[mine]])
        return found

    def close(self) -> None:
        """See Files."""
        for part in self._parts:
            part.close()


def open_files(path: Path) -> Files:
    """Open a folder, a ZIP file, or shards, named as for ImageFolderDataset. Raises ConfigError for anything else."""
    require_plain(path)
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
    shards = _shard_files(path)
    numbers = sorted(number for shard in shards if (number := _shard_number(shard)) is not None)
    missing = [expected for expected, number in enumerate(numbers) if number != expected]
    if missing:
        raise ConfigError(f"{path}: shard {missing[0]:05d} is missing of {len(shards) + 1}")
    return shards


def _shard_files(path: Path) -> list[Path]:
    """Return the ZIP files in a folder of nothing else, those numbered after a name, or those that match a pattern."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        return files if all(file.suffix.lower() == ".zip" and file.is_file() for file in files) else []
    siblings = path.parent.iterdir() if path.suffix.lower() == ".zip" and path.parent.is_dir() else ()
    shards = sorted(file for file in siblings if _shard_number(file, path.stem) is not None)
    if shards or not any(sign in path.name for sign in "*?["):  # a pattern unless it is the name itself
        return shards
    return sorted(path.parent.glob(path.name))


def _plain(name: str) -> str:
    return plain_name(name.partition("\0")[0])


def _shard_number(path: Path, stem: str | None = None) -> int | None:
    """Return the number in name-00012.zip, where `stem` is the name; None stands for any name."""
    match = re.fullmatch(r"(.*)-(\d{5})\.zip", path.name, re.DOTALL | re.IGNORECASE)
    return int(match[2]) if match and stem in (None, match[1]) else None
