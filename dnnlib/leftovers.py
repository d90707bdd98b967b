"""Temporary files of processes that were killed: how they are named, and how they are swept away."""

import hashlib
import os
import re
import socket
import uuid
from pathlib import Path

import psutil

# .{name}.{host}-{process}-{random}.tmp
_NAME = re.compile(r"\..+\.(?P<host>[0-9a-f]{6})-(?P<pid>[0-9]{1,9})-[0-9a-f]{12}\.tmp")


def temporary_name(name: str) -> str:
    """A new name for a file that will be called `name` when it is finished; it tells which process writes it."""
    return f".{name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp"


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files in `folder` that killed processes left there; the paths of those that were removed.

    For a folder that one process writes at a time, by a process whose turn has come and that has not begun: files that
    name another machine are taken for left behind, since this one cannot ask it. On this machine a process that lives
    keeps its files, unless it is younger than they are and has the number by chance.
    """
    removed = []
    for path in folder.glob(".*.tmp"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            if match["host"] == _host() and _writes(int(match["pid"]), path.stat().st_mtime):
                continue
            path.unlink()
        except OSError:  # removed by someone else, or not ours to remove
            continue
        removed.append(path)
    return removed


def _writes(pid: int, written_at: float) -> bool:
    """Whether process `pid` of this machine, another one than this, may be writing a file last changed `written_at`."""
    if pid == os.getpid():
        return False
    try:
        return psutil.Process(pid).create_time() <= written_at + 1
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _host() -> str:
    """Six digits for this machine's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
