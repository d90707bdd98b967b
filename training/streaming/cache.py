"""Shards of a data set on the local disk, within a bound, shared by the processes of a machine."""

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
from training.dataset.zip_index import index_copy
from training.streaming.remote import RemoteFile, download

_POLL_SEC = 0.1
_JOIN_SEC = 5.0
_THREADS = 4  # downloads at a time on a machine: its processes read the same shards in the same order


def cache_name(file: RemoteFile) -> str:
    """Return the name in the cache of this version of the file."""
    digest = hashlib.sha256(f"{file.url}\n{file.size}\n{file.version}".encode()).hexdigest()[:20]
    return f"{digest}-{re.sub(r'[^0-9A-Za-z._-]', '_', file.name)[-80:]}"


class ShardCache:
    """A folder of whole files, of at most `limit` bytes in all; the least recently used ones make room.

    Each file is downloaded once for all processes and threads. A download has the full size of its file from the
    start, under another name, so that it counts against the bound. Removing a file that is open elsewhere is safe on
    POSIX, where data outlives its name; elsewhere the file stays until it is closed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, file: RemoteFile) -> Path:
        """Path of the file in the cache, present or not."""
        return self.folder / cache_name(file)

    def fetch(
        self, file: RemoteFile, keep: Collection[RemoteFile] = (), stopped: Callable[[], bool] = lambda: False
    ) -> Path | None:
        """Return the path of the file, downloaded if needed; None if `keep` leaves no room for it, or if `stopped`."""
        path = self.path(file)
        if _touch(path):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path.name).acquire(poll_interval=_POLL_SEC):
                if _touch(path):
                    return path
                part = path.with_name(f".{path.name}.part")
                try:
                    room = self._reserve(part, file, {self.path(each).name for each in keep}, stopped)
                    if not room or not download(file, part, stopped):
                        return None
                    with self._lock("folder").acquire(poll_interval=_POLL_SEC):
                        os.replace(part, path)  # under the lock, as _contents would see neither name otherwise
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the data cache {self.folder}: {reason_of(error)}; "
                f"give another --data-cache, or a --data-cache-size that the disk holds"
            ) from None
        return path

    def discard(self, file: RemoteFile) -> None:
        """Remove the file from the cache."""
        _remove(self.path(file))

    def _lock(self, name: str) -> filelock.FileLock:
        # The system frees the lock when its process ends in any way.
        return filelock.FileLock(self.folder / f".{name}.lock", thread_local=False)

    def _reserve(self, part: Path, file: RemoteFile, keep: Collection[str], stopped: Callable[[], bool]) -> bool:
        """Make room and reserve it by `part`; False if `keep` leaves too little. Call with the file's lock held."""
        if file.size > self.limit:
            raise ConfigError(
                f"{file.url} has {file.size} bytes, more than --data-cache-size={self.limit}; allow more, or use "
                f"smaller shards (dataset_tool.py convert --shard-size)"
            )
        while not stopped():
            with self._lock("folder").acquire(poll_interval=_POLL_SEC):
                files, downloading = self._contents(part)
                excess = sum(num_bytes for _, _, num_bytes in files) + downloading + file.size - self.limit
                for _, path, num_bytes in sorted(files):
                    if excess <= 0:
                        break
                    if path.name not in keep and _remove(path):
                        excess -= num_bytes
                if excess <= 0:
                    with open(part, "wb") as out:
                        out.truncate(file.size)
                    return True
            if keep or not downloading:
                return False
            time.sleep(_POLL_SEC)
        return False

    def _contents(self, own_part: Path) -> tuple[list[tuple[int, Path, int]], int]:
        """Return (last use, path, bytes) of each file, and the bytes of downloads; removes abandoned downloads."""
        files: list[tuple[int, Path, int]] = []
        downloading = 0
        for path in self.folder.iterdir():
            if path == own_part or path.suffix in (".lock", ".index"):
                continue
            with contextlib.suppress(OSError):  # the file may vanish meanwhile
                if path.suffix != ".part":
                    status, index = path.stat(), index_copy(path)
                    num_bytes = status.st_size + (index.stat().st_size if index.exists() else 0)
                    files.append((status.st_mtime_ns, path, num_bytes))
                elif not self._clear(path):
                    downloading += path.stat().st_size
        return files, downloading

    def _clear(self, part: Path) -> bool:
        try:
            with self._lock(part.name.removeprefix(".").removesuffix(".part")).acquire(timeout=0):
                part.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False


class ReadAhead:
    """Downloads the shards of the current window and of the next one in the background.

    A failed download is ignored here: reading the shard tries again and reports the error.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._queue: list[RemoteFile] = []
        self._keep: list[RemoteFile] = []
        self._keep_first: list[RemoteFile] = []
        self._change = threading.Condition()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def enter(self, before: Sequence[RemoteFile], current: Sequence[RemoteFile], after: Sequence[RemoteFile]) -> None:
        """Take note of the shards of three successive windows when the run comes to the one in the middle."""
        with self._change:
            self._queue = [*current, *after]
            # Workers may still read the window before, and keep its shards open: these make room last.
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
            thread.join(_JOIN_SEC)  # a thread that waits for the network ends with the process
        self._threads = []

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                file, keep_first, keep = self._queue.pop(0), self._keep_first, self._keep
            with contextlib.suppress(ConfigError):
                if self._cache.fetch(file, keep_first, lambda: self._stopped) is None:
                    self._cache.fetch(file, keep, lambda: self._stopped)


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
        return True
    except OSError:
        return False


def _remove(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.unlink()
        index_copy(path).unlink(missing_ok=True)
        return True
    return False
