"""The files of a data set by name, wherever they lie: in a folder or in a ZIP file."""

import os
import zipfile
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError


class FolderFiles:
    """The files below a folder, named by their paths relative to it, with forward slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = frozenset(
            (Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names
        )

    def read(self, name: str) -> bytes:
        """The bytes of the file; ConfigError if it cannot be read."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.path}: {name} cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        """Nothing stays open between reads."""


class ZipFiles:
    """The entries of a ZIP file, which each process opens for itself.

    A forked worker inherits the file position along with the descriptor, and a spawned one neither, so the open file
    is remembered together with the process that opened it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # process id, file
        self.names = frozenset(name for name in self._zip().namelist() if not name.endswith("/"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, name: str) -> bytes:
        """The bytes of the file; ConfigError if it cannot be read."""
        try:
            return self._zip().read(name)
        except ConfigError:
            raise
        except Exception as error:  # zipfile raises half a dozen kinds, zlib's own among them
            raise ConfigError(f"{self.path}: {name} cannot be read: {one_line(error)}") from None

    def close(self) -> None:
        """Close what this process has open; the next read opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def _zip(self) -> zipfile.ZipFile:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            try:
                opened = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, OSError) as error:
                raise ConfigError(f"{self.path} is no readable ZIP file: {one_line(error)}") from None
            self._opened = opened
        return opened[1]


def open_files(path: Path) -> FolderFiles | ZipFiles:
    """The files of the data set at `path`; ConfigError if that is neither a folder nor a sound ZIP file."""
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file():
        return ZipFiles(path)
    raise ConfigError(f"data set {path} does not exist; give a folder or a ZIP file")


def one_line(error: BaseException) -> str:
    """The text of an exception without its line breaks, its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
