"""The memory limit of a container, by Linux control groups of version 1 and 2; the machine's numbers do not show it."""

from collections.abc import Iterator
from pathlib import Path

# By version: the folder in /sys/fs/cgroup, the files of limit and use, the key of cached files in memory.stat.
_VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


def container_free_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that limits of control groups leave to this process; None without a limit.

    Files in a group's cache count as free: the system drops them when memory is short. `root`: of the file system.
    """
    free = [left for group, version in _groups(root) if (left := _free(group, version)) is not None]
    return max(min(free), 0) if free else None


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's groups with their versions, and of the groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # another system
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        top = root / "sys/fs/cgroup" / _VERSIONS[version][0]
        group = top / path.lstrip("/")  # in a container this may be a name outside of it, and `top` is its group
        for folder in (group, *group.parents):
            yield folder, version
            if folder == top:
                break


def _free(group: Path, version: int) -> int | None:
    _, limit_file, use_file, cached_key = _VERSIONS[version]
    try:
        limit, used = (int((group / name).read_text()) for name in (limit_file, use_file))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return limit - used + int(stat.get(cached_key, 0))
