"""The index of a ZIP file in a few flat arrays, and a copy of it beside an archive so large that reading it takes long.

`zipfile` needs half a kilobyte and ten microseconds for each entry, in every process that opens the archive; these
arrays need some sixty bytes, and a million entries load from the copy in well under a second.
"""

import bisect
import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError

STORED = 0  # compression methods, as numbered in ZIP files
_UNREADABLE = 255  # stands for encryption
_ENCRYPTED_FLAG = 1

# What zipfile and numbers that no file can have raise.
_UNSOUND = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, IndexError)

_END = struct.Struct("<10xH10x")  # of the record at the end: how many entries there are
_MAX_COMMENT = 0xFFFF

# From so many entries on, the index is kept beside the archive.
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
        """The table that has this `text` and these `ends`, [N + 1], of another one."""
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
        """The row of `name`, None if it is not there."""
        row = bisect.bisect_left(self, name)
        return row if row < len(self) and self[row] == name else None


@dataclass(frozen=True, kw_only=True)
class ZipIndex:
    """What a ZIP file's central directory says of its entries, in the order of their names."""

    names: NameTable
    offsets: np.ndarray  # of the local headers, int64
    sizes: np.ndarray  # bytes of the unpacked entries, int64
    packed_sizes: np.ndarray  # bytes of the entries as they lie in the file, int64
    checksums: np.ndarray  # CRC-32, uint32
    methods: np.ndarray  # of compression, uint8


def read_index(path: Path) -> ZipIndex:
    """The index of the ZIP file `path`, without its folders; ConfigError if that is no sound ZIP file.

    Of a huge archive a copy is kept as `path`.index, where that can be written, and used while the archive has the
    size and time of change that the copy was made from.
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
        raise ConfigError(f"{path} is no readable ZIP file: {one_line(error)}") from None
    return index


def _read_directory(path: Path) -> ZipIndex:
    with zipfile.ZipFile(path) as archive:
        require_all_entries(archive)
        # The last of several entries of one name is the one that counts.
        found = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
    names = sorted(found)
    entries = [found[name] for name in names]

    def column(name: str, values: list[int]) -> np.ndarray:
        return np.array(values, dtype=_ARRAYS[name])

    return ZipIndex(
        names=NameTable(names),
        offsets=column("offsets", [entry.header_offset for entry in entries]),
        sizes=column("sizes", [entry.file_size for entry in entries]),
        packed_sizes=column("packed_sizes", [entry.compress_size for entry in entries]),
        checksums=column("checksums", [entry.CRC for entry in entries]),
        methods=column("methods", [_method(entry) for entry in entries]),
    )


def require_all_entries(archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile where the table of contents gave fewer entries than the file says that it has.

    `zipfile` reads on behind a damaged length, and misses what lies between: the labels, for one.
    """
    file: Any = archive.fp
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _END.size - _MAX_COMMENT, 0))
    tail = file.read()
    # As zipfile does: the end record without a comment, else the last one that there is.
    place = len(tail) - _END.size
    if not (tail[place:].startswith(b"PK\5\6") and tail.endswith(b"\0\0")):
        place = tail.rfind(b"PK\5\6")
    (stated,) = _END.unpack_from(tail, place)
    count = len(archive.infolist())
    # Large archives have the count elsewhere, or its last 16 bits only.
    if stated not in (0xFFFF, count & 0xFFFF):
        raise zipfile.BadZipFile(f"its table of contents is damaged: {count} of {stated} entries can be found")


def _method(entry: zipfile.ZipInfo) -> int:
    return _UNREADABLE if entry.flag_bits & _ENCRYPTED_FLAG else min(entry.compress_type, _UNREADABLE)


def _copy_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _load_copy(path: Path, stamp: list[int]) -> ZipIndex | None:
    """The index from its copy; None where there is no copy, or one that does not fit the archive."""
    try:
        with np.load(_copy_path(path), allow_pickle=False) as copy:
            if copy["stamp"].tolist() != stamp:
                return None
            columns: dict[str, Any] = {name: copy[name].astype(dtype) for name, dtype in _ARRAYS.items()}
            text, ends = copy["text"].tobytes(), copy["ends"].astype(np.int64)
    except Exception:  # whatever NumPy and zipfile raise on damaged bytes; a dozen kinds
        return None
    lengths = {column.size if column.ndim == 1 else -1 for column in columns.values()}
    if (
        ends.ndim != 1
        or lengths != {len(ends) - 1}
        or ends[0] != 0
        or ends[-1] != len(text)
        or (np.diff(ends) < 0).any()
    ):
        return None
    return ZipIndex(names=NameTable.packed(text, ends), **columns)


def _save_copy(index: ZipIndex, path: Path, stamp: list[int]) -> None:
    columns = {name: getattr(index, name) for name in _ARRAYS}
    text = np.frombuffer(index.names.text, dtype=np.uint8)
    # Saves time, no more: a folder that cannot be written to is no mistake.
    with contextlib.suppress(OSError), atomic_path(_copy_path(path)) as temp, open(temp, "wb") as file:
        np.savez(file, stamp=np.array(stamp), text=text, ends=index.names.ends, **columns)


def one_line(error: BaseException) -> str:
    """The text of an exception without its line breaks, its class name where it has none.

    What comes from a file may be of any length, and hold anything.
    """
    text = " ".join(str(error).split())[:400] or type(error).__name__
    return "".join(sign if sign.isprintable() else "?" for sign in text)
