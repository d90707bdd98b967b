"""The memory that a container's limit leaves."""

from pathlib import Path

import pytest

from dnnlib.memory import container_free_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def group(folder: str, version: int, limit: str, used: int, cached: int) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    values = (f"{limit}\n", f"{used}\n", f"anon 5\n{key} {cached}\n")
    return {f"sys/fs/cgroup/{folder}{name}": value for name, value in zip([*names, "memory.stat"], values, strict=True)}


@pytest.mark.parametrize(
    ("lines", "groups", "expected"),
    [
        ("0::/\n", group("", 2, "1000", 300, 50), 750),
        ("0::/job/task\n", {**group("job/task/", 2, "max", 1, 0), **group("job/", 2, "1000", 990, 0)}, 10),
        ("0::/job\n", group("job/", 2, "1000", 1500, 0), 0),
        ("0::/\n", group("", 2, "max", 300, 50), None),
        ("5:cpu,memory:/docker/1a2b\n0::/\n", group("memory/", 1, "4000", 1000, 0), 3000),  # seen from inside
        ("4:memory:/slurm/job\n", {**group("memory/", 1, "9223372036854771712", 0, 0),
                                   **group("memory/slurm/job/", 1, "500", 100, 20)}, 420),
        ("4:cpu:/\n", group("memory/", 1, "10", 0, 0), None),
    ],
)  # fmt: skip
def test_what_is_left_by_the_tightest_limit(lines: str, groups: dict[str, str], expected: int, tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": lines, **groups})
    assert container_free_bytes(tmp_path) == expected


def test_other_systems_have_none(tmp_path: Path) -> None:
    assert container_free_bytes(tmp_path) is None
