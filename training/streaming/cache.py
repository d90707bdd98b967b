"""Shards of a data set on the local disk, as many as a bound allows, shared by the processes of a machine."""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import filelock

from dnnlib.errors import ConfigError, reason_of
from training.streaming.remote import RemoteFile, download

_POLL_SEC = 0.1
_JOIN_SEC = 5.0
_THREADS = 4  # shards on their way at a time, a machine: processes want the same ones, in the same order


def cache_name(file: RemoteFile) -> str:
    """A name for what is kept of this version of the file."""
    digest = hashlib.sha256(f"{file.url}\n{file.size}\n{file.version}".encode()).hexdigest()[:20]
    return f"{digest}-{re.sub(r'[^0-9A-Za-z._-]', '_', file.name)[-80:]}"


class ShardCache:
    """A folder of whole files, of at most `limit` bytes in all; what was used longest ago makes room.

    Each file is downloaded once, whichever processes and threads want it. A file has its full size from the start of
    its download, under another name, so that what is on its way counts. Removing a file that is open elsewhere is safe
    where the system lets names go before data (POSIX); elsewhere it stays until it is closed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, file: RemoteFile) -> Path:
        """Where the file lies when it is here."""
        return self.folder / cache_name(file)

    def fetch(
        self, file: RemoteFile, keep: Collection[RemoteFile] = (), stopped: Callable[[], bool] = lambda: False
    ) -> Path | None:
        """Bring the file here, or find that it is. None where it does not fit beside those to `keep`, or if `stopped`.

        Raises ConfigError where the file cannot be had, and where the folder cannot be written.
        """
        path = self.path(file)
        if _touch(path):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path.name).acquire(poll_interval=_POLL_SEC):
                if _touch(path):
                    return path
                part = _part_of(path)
                try:
                    room = self._reserve(part, file, {self.path(each).name for each in keep}, stopped)
                    if not room or not download(file, part, stopped):
                        return None
                    with self._lock("folder").acquire(poll_interval=_POLL_SEC):
                        os.replace(part, path)  # not while somebody counts, who would see neither name
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the data cache {self.folder}: {reason_of(error)}; "
                f"give another --data-cache, or a --data-cache-size that the disk holds"
            ) from None
        return path

    def discard(self, file: RemoteFile) -> None:
        """Remove the file, if it is here."""
        _remove(self.path(file))

    def _lock(self, name: str) -> filelock.FileLock:
        # The system frees it when its process ends in any way.
        return filelock.FileLock(self.folder / f".{name}.lock", thread_local=False)

    def _reserve(self, part: Path, file: RemoteFile, keep: Collection[str], stopped: Callable[[], bool]) -> bool:
        """Make room for the file and take it, by making it `part` at its full size; False where `keep` is in the way.

        To be called with the file's lock held.
        """
        if file.size > self.limit:
            raise ConfigError(
                f"{file.url} has {file.size} bytes, more than --data-cache-size={self.limit}; allow more, or use "
                f"smaller shards (dataset_tool.py convert --shard-size)"
            )
        while not stopped():
            with self._lock("folder").acquire(poll_interval=_POLL_SEC):
                whole, on_their_way = self._contents(part)
                excess = sum(whole.values()) + on_their_way + file.size - self.limit
                for path in _oldest_first(whole):
                    if excess <= 0:
                        break
                    if path.name not in keep and _remove(path):
                        excess -= whole[path]
                if excess <= 0:
                    with open(part, "wb") as out:
                        out.truncate(file.size)
                    return True
            if keep or not on_their_way:
                return False
            time.sleep(_POLL_SEC)
        return False

    def _contents(self, own_part: Path) -> tuple[dict[Path, int], int]:
        """Bytes of each file that is here, with the index beside it, and of all that are on their way.

        What a process that was killed has left behind is removed.
        """
        whole: dict[Path, int] = {}
        on_their_way = 0
        for path in self.folder.iterdir():
            if path == own_part or path.suffix in (".lock", ".index"):
                continue
            with contextlib.suppress(OSError):  # it may vanish
                if path.suffix != ".part":
                    index = _index_of(path)
                    whole[path] = path.stat().st_size + (index.stat().st_size if index.exists() else 0)
                elif not self._clear(path):
                    on_their_way += path.stat().st_size
        return whole, on_their_way

    def _clear(self, part: Path) -> bool:
        """Remove a partial file that nobody works on."""
        try:
            with self._lock(part.name.removeprefix(".").removesuffix(".part")).acquire(timeout=0):
                part.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False


class ReadAhead:
    """Brings the shards of the current window and of the next one here, in the background.

    A shard that cannot be had is left to whoever reads it, and tells.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[RemoteFile] = []
        self._keep: list[RemoteFile] = []
        self._keep_first: list[RemoteFile] = []
        self._change = threading.Condition()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def enter(self, before: Sequence[RemoteFile], current: Sequence[RemoteFile], after: Sequence[RemoteFile]) -> None:
        """The shards of three windows in turn; the run has come to the one in the middle."""
        with self._change:
            self._wanted = [*current, *after]
            # Workers may still read the window before, and keep open what they read: it gives way, but as the last.
            self._keep = [*current, *after]
            self._keep_first = [*before, *self._keep]
            self._change.notify_all()
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """End the downloads."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_SEC)  # one that waits for the network ends with the process
        self._threads = []

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted or self._stopped)
                if self._stopped:
                    return
                file, keep_first, keep = self._wanted.pop(0), self._keep_first, self._keep
            with contextlib.suppress(ConfigError):
                if self._cache.fetch(file, keep_first, self._is_stopped) is None:
                    self._cache.fetch(file, keep, self._is_stopped)

    def _is_stopped(self) -> bool:
        return self._stopped


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _index_of(path: Path) -> Path:
    """What training/dataset/zip_index.py keeps beside a large archive."""
    return path.with_name(f"{path.name}.index")


def _touch(path: Path) -> bool:
    """Note that the file is used; False if it is not there."""
    try:
        os.utime(path)
        return True
    except OSError:
        return False


def _remove(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.unlink()
        _index_of(path).unlink(missing_ok=True)
        return True
    return False


def _oldest_first(paths: Collection[Path]) -> list[Path]:
    used: dict[Path, float] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            used[path] = path.stat().st_mtime_ns
    return sorted(used, key=used.__getitem__)
