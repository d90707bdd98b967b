"""The index of a ZIP file in a few flat arrays, and for large archives a copy of it next to the file.

`zipfile` needs half a kilobyte and ten microseconds per entry, in every process that opens the archive. These arrays
need about sixty bytes per entry, and the copy loads a million entries in well under a second.
"""

import bisect
import contextlib
import io
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, one_line
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer

STORED = 0  # compression methods, as numbered in ZIP files
_UNREADABLE = 255  # stands for encryption
_ENCRYPTED_FLAG = 1
_UNIX = 3  # the system whose attributes an entry has

# Raised by zipfile, and by numbers that no file can have.
_UNSOUND = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, IndexError)

_END = struct.Struct("<10xH10x")  # of the record at the end: the number of entries
_MAX_COMMENT = 0xFFFF

# From this many entries on, a copy of the index is kept next to the archive.
_KEEP_ENTRIES = 100_000
_ARRAYS = {
    "offsets": np.int64,
    "sizes": np.int64,
    "packed_sizes": np.int64,
    "checksums": np.uint32,
    "methods": np.uint8,
}


class NameTable(Sequence[str]):
    """A sorted sequence of names in one block of bytes."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    @classmethod
    def packed(cls, text: bytes, ends: np.ndarray) -> "NameTable":
        """Return a table from the `text` and `ends`, int64 [N + 1], of another one."""
        table = cls([])
        table.text, table.ends = text, ends
        return table

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        return self.text[self.ends[row] : self.ends[row + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for begin, end in pairwise(self.ends.tolist()):
            yield self.text[begin:end].decode("utf-8", "surrogateescape")

    def find(self, name: str) -> int | None:
        """Return the row of `name`, None if it is missing."""
        row = bisect.bisect_left(self, name)
        return row if row < len(self) and self[row] == name else None

    def is_sound(self) -> bool:
        """Return whether the ends fit the text, as they do unless the table was read from a damaged file."""
        ends = self.ends
        if ends.ndim != 1 or ends.dtype != np.int64 or len(ends) == 0:
            return False
        return bool(ends[0] == 0 and ends[-1] == len(self.text) and (np.diff(ends) >= 0).all())


@dataclass(frozen=True, kw_only=True)
class ZipIndex:
    """The central directory of a ZIP file, in the order of the names."""

    names: NameTable
    offsets: np.ndarray  # of the local headers, int64
    sizes: np.ndarray  # bytes of the unpacked entries, int64
    packed_sizes: np.ndarray  # bytes of the entries as they lie in the file, int64
    checksums: np.ndarray  # CRC-32, uint32
    methods: np.ndarray  # of compression, uint8


def read_index(path: Path) -> ZipIndex:
    """Return the index of the ZIP file `path`, without folders. Raises ConfigError if it is damaged.

    For large archives the index is kept in `path`.index (if writable), and reused while size and mtime match.
    """
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        index = _load_copy(path, stamp)
        if index is None:
            index = _read_directory(path)
            if len(index.names) >= _KEEP_ENTRIES:
                _save_copy(index, path, stamp)
    except _UNSOUND as error:
        reason = POINTER_HINT if is_lfs_pointer(path) else one_line(error)
        raise ConfigError(f"{path} is not a readable ZIP file: {reason}") from None
    return index


def _read_directory(path: Path) -> ZipIndex:
    with zipfile.ZipFile(path) as archive:
        by_name = archive_files(archive)
    names = sorted(by_name)
    rows = [
        (entry.header_offset, entry.file_size, entry.compress_size, entry.CRC, _method(entry))
        for entry in map(by_name.__getitem__, names)
    ]
    values = zip(*rows, strict=True) if rows else [()] * len(_ARRAYS)
    columns: dict[str, Any] = {
        name: np.array(column, dtype=dtype) for (name, dtype), column in zip(_ARRAYS.items(), values, strict=True)
    }
    return ZipIndex(names=NameTable(names), **columns)


def plain_name(name: str) -> str:
    """Return a name out of an archive or a list with forward slashes, without ./ in front.

    Some programs write backslashes on Windows; `zipfile` replaces them there only.
    """
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def archive_files(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by plain name, without folders. Of several entries with one name, the last one counts.

    Raises BadZipFile for an incomplete table of contents, and for symbolic links, behind which images would be missing.
    """
    _require_all_entries(archive)
    entries = {plain_name(entry.filename): entry for entry in archive.infolist()}
    for name, entry in entries.items():
        if entry.create_system == _UNIX and stat.S_ISLNK(entry.external_attr >> 16):
            raise zipfile.BadZipFile(f"{name} is a symbolic link; make the file again with the content of its target")
    return {name: entry for name, entry in entries.items() if not name.endswith("/")}


def _require_all_entries(archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile if the table of contents has fewer entries than the end of the file states.

    After a damaged length, `zipfile` continues reading at the wrong place and misses the entries in between, such as
    the labels.
    """
    file: Any = archive.fp
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _END.size - _MAX_COMMENT, 0))
    tail = file.read()
    # As zipfile does: the end record without a comment, else the last end record.
    place = len(tail) - _END.size
    if not (tail[place:].startswith(b"PK\5\6") and tail.endswith(b"\0\0")):
        place = tail.rfind(b"PK\5\6")
    (stated,) = _END.unpack_from(tail, place)
    count = len(archive.infolist())
    # Large archives have the count elsewhere, or only its last 16 bits here.
    if stated not in (0xFFFF, count & 0xFFFF):
        raise zipfile.BadZipFile(f"its table of contents is damaged: {count} of {stated} entries can be found")


def _method(entry: zipfile.ZipInfo) -> int:
    return _UNREADABLE if entry.flag_bits & _ENCRYPTED_FLAG else min(entry.compress_type, _UNREADABLE)


def index_copy(path: Path) -> Path:
    """The file next to the archive `path` that keeps a copy of its index."""
    return path.with_name(f"{path.name}.index")


def _load_copy(path: Path, stamp: list[int]) -> ZipIndex | None:
    """Load the index from its copy; None if the copy is missing, damaged, or made from another archive."""
    try:
        with np.load(index_copy(path), allow_pickle=False) as copy:
            if copy["stamp"].tolist() != stamp:
                return None
            columns: dict[str, Any] = {name: copy[name].astype(dtype) for name, dtype in _ARRAYS.items()}
            names = NameTable.packed(copy["text"].tobytes(), copy["ends"].astype(np.int64))
    except Exception:  # NumPy and zipfile raise a dozen kinds on damaged bytes
        return None
    if b"\\" in names.text:  # of an older version, which did not replace them
        return None
    if not names.is_sound() or any(column.shape != (len(names),) for column in columns.values()):
        return None
    return ZipIndex(names=names, **columns)


def _save_copy(index: ZipIndex, path: Path, stamp: list[int]) -> None:
    columns = {name: getattr(index, name) for name in _ARRAYS}
    text = np.frombuffer(index.names.text, dtype=np.uint8)
    # The copy only saves time, so a folder that cannot be written to is not an error.
    with contextlib.suppress(OSError), atomic_path(index_copy(path)) as temp, open(temp, "wb") as file:
        np.savez(file, stamp=np.array(stamp), text=text, ends=index.names.ends, **columns)
