"""A stand-in for the Hugging Face hub, on the loopback, which the real huggingface_hub talks to.

It knows the requests that library makes to describe a repository and to download its files.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import huggingface_hub.hf_api
import pytest

from tests.helpers.loopback import LoopbackServer, QuietHandler, running


class FakeHub(LoopbackServer):
    """Model repositories by name: each a dictionary from revision to its files; `gated` ones ask for consent."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []  # method and path

    def add(self, repository: str, files: dict[str, bytes | Path], revision: str = "main") -> str:
        """Add a revision of a repository; return the name of its commit."""
        contents = {name: value if isinstance(value, bytes) else value.read_bytes() for name, value in files.items()}
        self.repositories.setdefault(repository, {})[revision] = contents
        return commit_of(contents)

    def add_folder(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Add a revision with all files below a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(repository, {path.relative_to(folder).as_posix(): path for path in paths}, revision)

    def files_at(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision, by its own name or that of its commit."""
        revisions = self.repositories[repository]
        by_commit = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)


def commit_of(files: dict[str, bytes]) -> str:
    """Forty hexadecimal digits that belong to these contents."""
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


class _Handler(QuietHandler):
    server: FakeHub

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/.+?)/(.+)", path)
        if info is not None:
            self._describe(info[1], info[3] or "main", tree=info[2] == "tree")
        elif file is not None:
            self._send_file(file[1], file[2], file[3])
        else:
            self._fail(404, "")

    def _files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        if repository not in self.server.repositories:
            self._fail(401, "RepoNotFound")
            return None
        files = self.server.files_at(repository, revision)
        if files is None:
            self._fail(404, "RevisionNotFound")
        return files

    def _describe(self, repository: str, revision: str, tree: bool) -> None:
        files = self._files(repository, revision)
        if files is None:
            return
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._send(200, json.dumps(entries).encode())
            return
        about = {
            "id": repository,
            "modelId": repository,
            "sha": commit_of(files),
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files],
        }
        self._send(200, json.dumps(about).encode())

    def _send_file(self, repository: str, revision: str, name: str) -> None:
        files = self._files(repository, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": commit_of(files)}
        if repository in self.server.gated:
            self._fail(403, "GatedRepo", commit)
        elif name not in files:
            self._fail(404, "EntryNotFound", commit)
        else:
            tag = hashlib.sha1(files[name]).hexdigest()
            self._send(200, files[name], commit | {"ETag": f'"{tag}"'})

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", (headers or {}) | {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Yield a hub that huggingface_hub in this process uses as the real one, with its cache in the folder `cache`."""
    with running(FakeHub()) as hub:
        use_hub(hub.url, cache, monkeypatch)
        yield hub


def use_hub(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_ENDPOINT and HF_HUB_CACHE set, which the library reads only at import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    # What `from huggingface_hub import model_info` is a method of.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
