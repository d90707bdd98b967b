"""Files on the Hugging Face hub by name, hf://user/name[@revision][/file], in the cache of huggingface_hub.

That library reads the endpoint, the token, the cache folder and offline mode from its own environment variables
(HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE, ...). It is an optional dependency, imported on first use.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dnnlib.errors import ConfigError, one_line
from dnnlib.fetch import root_cause, worthwhile_attempts

INSTALL_HINT = 'pip install "edm2[hub]"'

_TIMEOUT_SEC = 10
_ATTEMPTS = 6  # of huggingface_hub, within half a minute
_PART = r"[0-9A-Za-z](?:[0-9A-Za-z._-]{0,94}[0-9A-Za-z])?"  # of a repository's name
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@/\s]+))?(?:/(?P<file>.+))?")
_SCHEME = "hf://"
_SYNTAX = "write hf://user/name, hf://user/name/file, or hf://user/name@revision/file"


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model repository on the hub, or one file of it."""

    repo: str  # user/name
    revision: str | None = None  # branch, tag or commit; None = the main branch
    file: str | None = None  # path within the repository

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{_SCHEME}{self.repo}{revision}" + ("" if self.file is None else f"/{self.file}")


def is_hub_url(source: str | os.PathLike[str]) -> bool:
    """Return True if `source` starts with hf://."""
    return str(source).lower().startswith(_SCHEME)


def parse_hub_url(source: str) -> HubName:
    """Parse hf://user/name[@revision][/file], where %2F is a slash within the revision. Raises ConfigError."""
    match = _NAME.fullmatch(source[len(_SCHEME) :].rstrip("/")) if is_hub_url(source) else None
    if match is None:
        raise ConfigError(f"'{source}' is not a name on the hub; {_SYNTAX}")
    return _name_of(match, source)


def parse_repository(source: str) -> HubName | None:
    """Parse a plain user/name or user/name@revision; None if `source` is anything else."""
    match = _NAME.fullmatch(source)
    return None if match is None or match["file"] is not None else _name_of(match, source)


def _name_of(match: re.Match[str], source: str) -> HubName:
    file = match["file"]
    if file is not None and any(part in ("", ".", "..") for part in re.split(r"[/\\]", file)):
        raise ConfigError(f"'{source}' does not name a file within a repository; {_SYNTAX}")
    return HubName(repo=match["repo"], revision=unquote(match["revision"]) if match["revision"] else None, file=file)


def fetch_file(name: HubName) -> Path:
    """Return the path of the file in huggingface_hub's cache, downloaded if missing. Raises ConfigError.

    The path is a link to the contents; it ends like the path in the repository, in a folder named by the commit.
    """
    assert name.file is not None
    library = _library(name)
    try:
        if library.try_to_load_from_cache(name.repo, name.file, revision=name.revision) is None:
            _require_reachable(library, name)
        return Path(library.hf_hub_download(name.repo, name.file, revision=name.revision))
    except Exception as error:  # of huggingface_hub, its HTTP library or the disk
        raise _explained(error, name) from None


def list_files(name: HubName) -> list[str]:
    """List the files of a repository; those in the cache if the hub cannot be reached. Raises ConfigError."""
    library = _library(name)
    try:
        if library.constants.HF_HUB_OFFLINE:
            raise library.utils.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = library.HfApi().model_info(name.repo, revision=name.revision, timeout=_TIMEOUT_SEC)
        return sorted(sibling.rfilename for sibling in info.siblings or [])
    except Exception as error:
        utils = library.utils
        final = (utils.RepositoryNotFoundError, utils.RevisionNotFoundError, utils.HFValidationError)
        cached = [] if isinstance(error, final) else _cached_files(library, name)
        if cached:
            return cached
        raise _explained(error, name) from None


def pinned(name: HubName, path: Path) -> HubName:
    """Return `name` with the commit of `path`, the result of `fetch_file`, as its revision."""
    assert name.file is not None
    snapshot = path.parents[len(name.file.split("/")) - 1]
    return replace(name, revision=snapshot.name)


def _require_reachable(library: Any, name: HubName) -> None:
    """Raise what the hub cannot be reached by if another attempt fails the same way: the library makes six of them."""
    if library.constants.HF_HUB_OFFLINE:
        return
    url = library.hf_hub_url(name.repo, name.file, revision=name.revision)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            library.get_hf_file_metadata(url, timeout=_TIMEOUT_SEC)
        except Exception as error:  # the download itself tells of those that may pass
            most = worthwhile_attempts(root_cause(error), _ATTEMPTS)
            if attempt == most < _ATTEMPTS:
                raise
            if most < _ATTEMPTS:
                continue
        return


def _library(name: HubName) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError:
        raise ConfigError(
            f"'{name}' is on the Hugging Face hub, and the library huggingface_hub is not installed;"
            f" try: {INSTALL_HINT}"
        ) from None
    return huggingface_hub


def _cached_files(library: Any, name: HubName) -> list[str]:
    """List the cached files: refs/{revision} has the name of a commit, snapshots/{commit} its files."""
    folder = Path(library.constants.HF_HUB_CACHE) / "--".join(["models", *name.repo.split("/")])
    revision = name.revision or library.constants.DEFAULT_REVISION
    try:
        reference = folder / "refs" / revision
        commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
        snapshot = folder / "snapshots" / commit
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    except (OSError, ValueError):  # the name of a revision may be impossible for a file
        return []


def _explained(error: Exception, name: HubName) -> ConfigError:
    import huggingface_hub.constants as constants
    import huggingface_hub.utils as utils

    if isinstance(error, utils.GatedRepoError):
        return ConfigError(
            f"{name.repo} asks users to accept its terms first: do so at {constants.ENDPOINT}/{name.repo},"
            " then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, utils.RepositoryNotFoundError):
        return ConfigError(
            f"no model repository {name.repo} at {constants.ENDPOINT}, or it is private: check the name, or"
            " log in with `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return ConfigError(f"{name.repo} has no revision {name.revision!r}; name a branch, a tag or a commit")
    if isinstance(error, utils.HFValidationError):
        return ConfigError(f"'{name}' is not a name on the hub: {one_line(error)}")
    offline = isinstance(error, utils.OfflineModeIsEnabled)
    if isinstance(error, utils.LocalEntryNotFoundError) or offline:
        if offline or constants.HF_HUB_OFFLINE:
            return ConfigError(
                f"'{name}' is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; unset it, or fetch"
                " it once with a connection"
            )
    elif isinstance(error, utils.EntryNotFoundError):
        where = "" if name.revision is None else f" at revision {name.revision}"
        return ConfigError(f"{name.repo} has no file {name.file}{where}")
    reason = one_line(error.__cause__ or error)
    return ConfigError(
        f"'{name}' is not in the cache and cannot be downloaded from {constants.ENDPOINT}: {reason};"
        " check the network connection"
    )
