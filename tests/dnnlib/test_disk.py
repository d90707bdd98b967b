"""Output folders that cannot be, explained before anything is made."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError


def test_a_read_only_file_system_is_not_a_matter_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "ST_RDONLY", 1, raising=False)
    for flag, reason in ((1, "is on a read-only file system"), (0, "no permission for")):
        monkeypatch.setattr(os, "statvfs", lambda path, flag=flag: SimpleNamespace(f_flag=flag), raising=False)
        with pytest.raises(ConfigError, match=reason):
            require_folder(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jpg", "set.ZIP", "run/net.pkl", "x.json"])
def test_names_of_files_are_not_made_into_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"has the name of a file; name a folder, such as {Path(name).stem}"):
        make_folder(tmp_path / name)
    assert not [*tmp_path.iterdir()]
    (tmp_path / name).mkdir(parents=True)
    make_folder(tmp_path / name)  # it exists, so it is meant


def test_dots_in_names_are_fine(tmp_path: Path) -> None:
    make_folder(tmp_path / "run-v1.5" / "lr0.01")
    assert (tmp_path / "run-v1.5" / "lr0.01").is_dir()
