"""Encoded images in one large file: the values of an LMDB, as LSUN has them, and the members of WebDataset tars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, one_line
from training.conversion.image_source import Source, import_optional
from training.dataset.label_file import Label
from training.dataset.tar_files import TarFiles, all_or_none, index_tar, sample_of
from training.images.decode import Unreadable, is_image


class LmdbReader:
    """Reads values by their keys; every process opens the database for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_database": None}

    def read(self, key: bytes) -> bytes:
        """Return the value of `key`."""
        try:
            if self._database is None:
                self._database = _open_database(self._path)
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
    return _lmdb().open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False)


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
        return path.name.endswith((".tar", ".tar.gz", ".tgz"))
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    return bool(files) and all(file.suffix == ".tar" and file.is_file() for file in files)


def open_tars(path: Path) -> Source:
    """Open the tar or the folder of tars at `path`; images are sorted by tar and sample."""
    if path.suffix in (".gz", ".tgz"):
        raise ConfigError(
            f"--source={path} is a compressed tar, which cannot be read in parallel; run gunzip on it first"
        )
    paths = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix == ".tar" and p.name[0] != ".")
    tars: list[TarFiles] = []
    names: list[str] = []
    keys: list[tuple[int, int]] = []
    labels: list[Label | None] = []
    for number, tar in enumerate(paths):
        with open(tar, "rb") as file:
            index, tar_labels, _ = index_tar(file, str(tar), selects=is_image)
        tars.append(TarFiles(tar, index))
        prefix = f"{tar.name}/" if len(paths) > 1 else ""
        samples = sorted((sample_of(name), row) for row, name in enumerate(index.names))
        for _, row in samples:
            names.append(prefix + index.names[row])
            keys.append((number, row))
            labels.append(None if tar_labels is None else tar_labels[row])
    if not names:
        raise ConfigError(f"--source={path} holds no images; a WebDataset tar has files such as 000.jpg and 000.cls")
    return Source(
        path=path, names=names, keys=keys, reader=TarReader(tars), labels=all_or_none(names, labels, str(path))
    )
