"""One process at a time on a folder: a lock file that names its holder, and whose age tells whether that one is alive.

The holder touches the file every few seconds. On the same machine, a process that ended is noticed at once; on another
machine, when the file has not been touched for `STALE_SEC`. A lock of the operating system (filelock.FileLock) would do
for one machine, but many network file systems have none, or keep the locks of a machine that was taken away. The leases
of filelock (SoftFileLease) expire too. But a newcomer waits for the whole term even if the lock was left hours ago, and
learns that a holder is alive only at the end of it.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dnnlib.disk import make_folder, write_error
from dnnlib.errors import ConfigError

REFRESH_SEC = 10.0
STALE_SEC = 120.0  # without a touch from another machine
_OLD_LOCK_TOUCHES = 1.5  # intervals of touching for which an older lock is watched

_NAME = "run.lock"
# After this time, processes that took the same stale lock away have put back a new one that they took by mistake.
_SETTLE_SEC = 0.05
_COUNTS_TICKS = Path("/proc/self/stat").exists()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder."""

    host: str
    pid: int
    started: float  # start of the process, see `_started`: process numbers are reused
    machine: str  # process numbers are comparable within it: a boot of a machine and a container
    token: str  # identifies this one lock

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """Holds `folder` from `acquire` to `release`, once each; `say` gets lines about stale and other machines' locks."""

    def __init__(
        self,
        folder: Path,
        *,
        say: Callable[[str], None] = lambda text: None,
        refresh_sec: float = REFRESH_SEC,
        stale_sec: float = STALE_SEC,
    ) -> None:
        self.folder = folder
        self.path = folder / _NAME
        self._say = say
        self._refresh_sec = refresh_sec
        self._stale_sec = stale_sec
        self._me = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            machine=_machine(),
            token=uuid.uuid4().hex,
        )
        self._spare = self.path.with_name(f".{_NAME}.{self._me.token[:12]}.tmp")
        self._made: list[Path] = []  # folders created for the lock
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder, which is created if missing. Raises ConfigError if another process holds it."""
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        make_folder(self.folder)
        try:
            while not self._create():
                holder = self._read()
                if holder is not None:
                    self._require_stale(holder)
                    self._take_away(holder)
            self._ended.wait(_SETTLE_SEC)
            holder = self._read()
            if holder is not None and holder.token != self._me.token:
                raise self._held(holder)
        except OSError as error:
            raise write_error(self.path, error) from None
        self._thread = threading.Thread(target=self._refresh, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder up, and remove it if it was created for the lock and is empty."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(OSError, ConfigError):
                self.require_held()
                self.path.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def require_held(self) -> None:
        """Raise ConfigError if another process took the folder over, as it may after this one was suspended."""
        holder = self._read()
        if holder is not None and holder.token != self._me.token:
            raise ConfigError(
                f"{self.folder} was taken over by {holder} while this process gave no sign of life; it stops writing"
            )

    def _create(self) -> bool:
        text = json.dumps(asdict(self._me)) + "\n"
        try:
            self._spare.write_text(text, encoding="utf-8")
            os.link(self._spare, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS):
                raise
            try:  # a file system without hard links
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
        finally:
            self._spare.unlink(missing_ok=True)
        return True

    def _read(self) -> Holder | None:
        """Return the holder of the lock, None if the file is gone. An unreadable file counts as another machine's."""
        try:
            text = self.path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return _parse(text)

    def _require_stale(self, holder: Holder) -> None:
        if holder.host == self._me.host and holder.machine == self._me.machine:
            if _is_alive(holder):
                raise self._held(holder)
            self._say(f"{self.path} belongs to {holder}, which is gone; taking over.")
            return
        last = self._touched()
        if last is None:
            return
        # Clocks jump: the time may lie in the future, and the lock of a living process may look old for a moment.
        age = max((self._now() - last) / 1e9, 0.0)
        patience = max(self._stale_sec - age, _OLD_LOCK_TOUCHES * self._refresh_sec)
        self._say(f"{self.path} belongs to {holder}; waiting up to {patience:.0f} s for a sign of life.")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self._ended.wait(min(self._refresh_sec, 1.0)):
                break
            touched = self._touched()
            if touched is None:
                return
            if touched != last:
                raise self._held(holder)
        self._say(f"{self.path} belongs to {holder}, which gave no sign of life; taking over.")

    def _held(self, holder: Holder) -> ConfigError:
        return ConfigError(
            f"--outdir={self.folder} is in use by {holder}; wait until it ends, stop it, or choose another folder"
        )

    def _take_away(self, holder: Holder) -> None:
        """Remove the lock of `holder`, unless it has a new holder by now: two processes may find it stale."""
        try:
            os.replace(self.path, self._spare)
        except FileNotFoundError:
            return
        if _parse(self._spare.read_text("utf-8", errors="replace")).token == holder.token:
            self._spare.unlink()
        else:
            os.replace(self._spare, self.path)

    def _touched(self) -> int | None:
        """Return the time of the last touch in ns, None if the file is gone."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _now(self) -> int:
        """Return the time in ns by the disk's clock: the clocks of two machines may differ by minutes."""
        try:
            self._spare.touch()
            return self._spare.stat().st_mtime_ns
        finally:
            self._spare.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._ended.wait(self._refresh_sec):
            with contextlib.suppress(OSError, ConfigError):  # a network disk may be away for a while
                self.require_held()
                os.utime(self.path)


def _parse(text: str) -> Holder:
    try:
        said: dict[str, Any] = json.loads(text)
        return Holder(
            host=str(said["host"]),
            pid=int(said["pid"]),
            started=float(said["started"]),
            machine=str(said["machine"]),
            token=str(said["token"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Holder(host="an unknown machine", pid=0, started=0.0, machine="", token=text)


def _is_alive(holder: Holder) -> bool:
    try:
        if psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(_started(holder.pid) - holder.started) < (1.0 if _COUNTS_TICKS else 60.0)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True  # it may not be inspected, so it exists


def _started(pid: int) -> float:
    """Start of a process here: on Linux in ticks since the boot, which ignore the clock; else in seconds since 1970."""
    if not _COUNTS_TICKS:
        return psutil.Process(pid).create_time()
    try:
        return float(Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[19])
    except OSError:
        raise psutil.NoSuchProcess(pid) from None


def _machine() -> str:
    """Return a text that names the boot and the container: process numbers are comparable where it is the same."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
