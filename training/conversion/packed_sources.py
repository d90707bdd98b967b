"""Encoded images in one large file: the values of an LMDB, as LSUN has them, and the members of WebDataset tars."""

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, one_line
from training.conversion.class_folders import LabelChoice, find_labels
from training.conversion.image_source import Source, import_optional
from training.conversion.unpacked_tar import TAR_SUFFIXES, unpacked
from training.dataset.tar_files import TarFiles, index_tar, sample_of
from training.images.decode import Unreadable, is_image


class LmdbReader:
    """Reads values by their keys; every process opens the database for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: Any = None
        self._num_bytes = 0  # of the file, once it is open

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_database": None, "_num_bytes": 0}

    def read(self, key: bytes) -> bytes:
        """Return the value of `key`."""
        try:
            if self._database is None:
                self._database = _open_database(self._path)
                self._num_bytes = _bytes_needed(self._database)
            _require_bytes(self._path, self._num_bytes)
            with self._database.begin() as transaction:
                value = transaction.get(key)
        except _lmdb().Error as error:
            raise Unreadable(one_line(error)) from None
        if value is None:
            raise Unreadable("the database has lost this key")
        return value


def holds_lmdb(path: Path) -> bool:
    """Return whether `path` is the folder or the file of an LMDB."""
    return (path / "data.mdb").is_file() if path.is_dir() else path.suffix in (".mdb", ".lmdb")


def open_lmdb(path: Path) -> Source:
    """Open the LMDB at `path`. Images come in the order of the bytes of their keys, and have no labels."""
    try:
        # Closed again: a process can open a database only once.
        with _open_database(path) as database, database.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except _lmdb().Error as error:
        raise ConfigError(f"--source={path} is not a readable LMDB: {one_line(error)}") from None
    if not keys:
        raise ConfigError(f"--source={path} holds no images; the LMDB is empty")
    names = [key.decode("ascii", "backslashreplace") for key in keys]
    return Source(path=path, names=names, keys=keys, reader=LmdbReader(path), labels=None)


def _open_database(path: Path) -> Any:
    # Read only and without a lock file, which leaves the source as it is.
    database = _lmdb().open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False)
    try:
        _require_bytes(path, _bytes_needed(database))
    except BaseException:
        database.close()
        raise
    return database


def _bytes_needed(database: Any) -> int:
    num_bytes: int = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    return num_bytes


def _require_bytes(path: Path, num_bytes: int) -> None:
    """Raise an Error of LMDB if its file is shorter: reading behind the end of a mapped file kills the process."""
    size = (path / "data.mdb" if path.is_dir() else path).stat().st_size
    if size < num_bytes:
        raise _lmdb().Error(f"it is cut short: {size} of {num_bytes} bytes")


def _lmdb() -> Any:
    return import_optional("lmdb", "an LMDB")


@dataclass(frozen=True)
class TarReader:
    """Reads images of uncompressed tars in place, without unpacking. A key is (number of the tar, row in it)."""

    tars: Sequence[TarFiles]

    def read(self, key: tuple[int, int]) -> memoryview:
        """Return the bytes of an image."""
        return self.tars[key[0]].read(key[1])


def holds_tars(path: Path) -> bool:
    """Return whether `path` is a tar, or a folder of tars and nothing else."""
    if path.is_file():
        return path.name.endswith(TAR_SUFFIXES)
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    return bool(files) and all(file.name.endswith(TAR_SUFFIXES) and file.is_file() for file in files)


def open_tars(path: Path, choice: LabelChoice) -> Source:
    """Open the tar or the folder of tars at `path`; images are sorted by tar and sample."""
    sources = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name[0] != ".")
    with ExitStack() as stack:
        source = _open_tars(path, [unpacked(tar, stack) for tar in sources], choice)
        weakref.finalize(source.reader, stack.pop_all().close)
        return source


def _open_tars(path: Path, paths: Sequence[Path], choice: LabelChoice) -> Source:
    parts: list[tuple[TarFiles, list[str]]] = []
    names: list[str] = []
    keys: list[tuple[int, int]] = []
    for number, tar in enumerate(paths):
        with open(tar, "rb") as file:
            index = index_tar(file, str(tar))
        prefix = f"{tar.name}/" if len(paths) > 1 else ""
        samples = sorted((sample_of(name), row) for row, name in enumerate(index.names) if is_image(name))
        names += [prefix + index.names[row] for _, row in samples]
        keys += [(number, row) for _, row in samples]
        parts.append((TarFiles(tar, index), [index.names[row] for _, row in samples]))
    if not names:
        raise ConfigError(f"--source={path} holds no images; a WebDataset tar has files such as 000.jpg and 000.cls")
    found = find_labels(path, parts, choice)
    reader = TarReader([tar for tar, _ in parts])
    return Source.of(path=path, names=names, keys=keys, reader=reader, labels=found.labels, notes=found.notes)
