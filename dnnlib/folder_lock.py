"""One process at a time on a folder: a file in it that says who, and whose age says whether that one still lives.

The holder touches the file every few seconds. On the same machine a process is known to be gone at once; of another
machine, when the file has not been touched for `STALE_SEC`. Locks of the operating system would do the first part, but
many network file systems have none, or keep those of a machine that was taken away.
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

from dnnlib.disk import write_error
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder

REFRESH_SEC = 10.0
STALE_SEC = 120.0  # on another machine, without a sign of life

_NAME = "run.lock"
_SETTLE_SEC = 0.05  # in which others that took the same stale lock away put back what they should not have
_COUNTS_TICKS = Path("/proc/self/stat").exists()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a folder."""

    host: str
    pid: int
    started: float  # when the process began, see `_started`: process numbers are used again
    machine: str  # where process numbers mean the same: the boot of a machine, and a container in it
    token: str  # of this one lock

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """Holds `folder` from `acquire` to `release`; both may be called once.

    `say` is told, in a line, where a stale lock is taken over or another machine's is watched.
    """

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
        self._made: list[Path] = []  # folders
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder, which is made if missing. Raises ConfigError where another process holds it."""
        self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
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
        """Let go of the folder, and remove it if it was made for the lock and is empty."""
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
        """Raise ConfigError where another process has taken the folder over, as it may if this one stood still."""
        holder = self._read()
        if holder is not None and holder.token != self._me.token:
            raise ConfigError(
                f"{self.folder} was taken over by {holder} while this process gave no sign of life; it writes no more"
            )

    def _create(self) -> bool:
        """Make the file, with its content from the start; False where it is there already."""
        text = json.dumps(asdict(self._me)) + "\n"
        try:
            self._spare.write_text(text, encoding="utf-8")
            os.link(self._spare, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS):
                raise
            try:  # a file system without links
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
        finally:
            self._spare.unlink(missing_ok=True)
        return True

    def _read(self) -> Holder | None:
        """Who holds the lock; None where the file is gone. One that says nothing is watched, as another machine's."""
        try:
            text = self.path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return _parse(text)

    def _require_stale(self, holder: Holder) -> None:
        """Return when the holder is gone; raise ConfigError when it is seen to be alive."""
        if holder.host == self._me.host and holder.machine == self._me.machine:
            if _is_alive(holder):
                raise self._held(holder)
            self._say(f"{self.path} is of {holder}, which is gone; taking over.")
            return
        last = self._touched()
        if last is None:
            return
        age = (self._now() - last) / 1e9
        if age < self._stale_sec:
            self._say(f"{self.path} is of {holder}; waiting to see whether it lives, {self._stale_sec:.0f} s at most.")
        deadline = time.monotonic() + self._stale_sec - age
        while time.monotonic() < deadline:
            if self._ended.wait(min(self._refresh_sec, 1.0)):
                break
            touched = self._touched()
            if touched is None:
                return
            if touched != last:
                raise self._held(holder)
        self._say(f"{self.path} is of {holder}, without a sign of life for {self._stale_sec:.0f} s; taking over.")

    def _held(self, holder: Holder) -> ConfigError:
        return ConfigError(
            f"--outdir={self.folder} is in use by {holder}; wait for its end, stop it, or choose another folder"
        )

    def _take_away(self, holder: Holder) -> None:
        """Remove the lock of `holder`, unless it is another's by now: two processes may find it stale."""
        try:
            os.replace(self.path, self._spare)
        except FileNotFoundError:
            return
        if _parse(self._spare.read_text("utf-8", errors="replace")).token == holder.token:
            self._spare.unlink()
        else:
            os.replace(self._spare, self.path)

    def _touched(self) -> int | None:
        """When the holder gave the last sign of life, ns; None where the file is gone."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _now(self) -> int:
        """The time by the clock of the disk, ns: that of another machine may be wrong by minutes."""
        try:
            self._spare.touch()
            return self._spare.stat().st_mtime_ns
        finally:
            self._spare.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._ended.wait(self._refresh_sec):
            with contextlib.suppress(OSError, ConfigError):  # a disk may be gone for a while
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
    """Whether the process is there, on this machine, and is not another one with the same number."""
    try:
        if psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(_started(holder.pid) - holder.started) < (1.0 if _COUNTS_TICKS else 60.0)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True  # it cannot be looked at, so it is there


def _started(pid: int) -> float:
    """When a process of this machine began: in ticks since the boot, which no clock that is set changes (Linux), or in
    seconds since 1970, which move with the clock. Raises psutil.Error where there is no such process."""
    if not _COUNTS_TICKS:
        return psutil.Process(pid).create_time()
    try:
        return float(Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[19])
    except OSError:
        raise psutil.NoSuchProcess(pid) from None


def _machine() -> str:
    """A text that is the same where process numbers mean the same: not after a reboot, nor in another container."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
