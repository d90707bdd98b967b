"""Pictures in an LMDB whose values are encoded pictures, as LSUN has them."""

from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError
from training.conversion.image_source import Source
from training.dataset.item_files import one_line
from training.images.decode import Unreadable

_FILE = "data.mdb"


class LmdbReader:
    """Reads values by their keys; every process opens the database for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def keys(self) -> list[bytes]:
        """All keys, in the database's order, which is that of their bytes."""
        with self._begin() as transaction:
            return list(transaction.cursor().iternext(keys=True, values=False))

    def read(self, key: bytes) -> bytes:
        """The value of `key`."""
        try:
            with self._begin() as transaction:
                value = transaction.get(key)
        except _lmdb().Error as error:
            raise Unreadable(one_line(error)) from None
        if value is None:
            raise Unreadable("the database has lost this key")
        return value

    def close(self) -> None:
        """Close the database, which a process can have open but once; reading opens it again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _begin(self) -> Any:
        if self._opened is None:
            lmdb = _lmdb()
            # Read only and without a lock file, so that the source stays as it is.
            self._opened = lmdb.open(
                str(self._path), subdir=self._path.is_dir(), readonly=True, lock=False, readahead=False, create=False
            )
        return self._opened.begin(buffers=False)


def holds_lmdb(path: Path) -> bool:
    """Whether `path` is an LMDB: the folder or the file."""
    return (path / _FILE).is_file() if path.is_dir() else path.suffix in (".mdb", ".lmdb")


def lmdb_source(path: Path) -> Source:
    """The pictures of the LMDB at `path`, which has no labels."""
    lmdb = _lmdb()
    reader = LmdbReader(path)
    try:
        keys = reader.keys()
        reader.close()
    except lmdb.Error as error:
        raise ConfigError(f"--source={path} is no readable LMDB: {one_line(error)}") from None
    if not keys:
        raise ConfigError(f"--source={path} holds no images; the LMDB is empty")
    names = [key.decode("ascii", "backslashreplace") for key in keys]
    return Source(path=path, names=names, keys=keys, reader=reader, labels=None)


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise ConfigError("reading an LMDB needs the package lmdb; install it by pip install -e '.[formats]'") from None
    return lmdb
