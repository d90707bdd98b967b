"""Sources of images for dataset_tool.py, made of given entries."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any


def pack(path: Path, files: dict[str, Any]) -> Path:
    """Write {name: bytes, text or JSON value} to a ZIP, a tar or a folder, by the end of `path`; names as they are."""
    files = {
        name: data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
        for name, data in files.items()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo("x")
                entry.filename = name  # the constructor would replace backslashes on Windows
                archive.writestr(entry, data)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path
