"""Files from the web, in a cache folder that all processes of a machine or a cluster may share."""

import contextlib
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dnnlib import fetch, hub
from dnnlib.atomic import write_text
from dnnlib.disk import require_space
from dnnlib.errors import ConfigError, reason_of
from dnnlib.fetch import Version
from dnnlib.parse import expand_home, require_possible, split_url

_POLL_SEC = 0.2  # between looks of a process that waits for the download of another one


def make_cache_dir_path(*paths: str) -> str:
    """Return a path below the cache folder: $DNNLIB_CACHE_DIR, else $HOME/.cache/dnnlib. Creates nothing."""
    root = os.environ.get("DNNLIB_CACHE_DIR")
    base = Path(expand_home(root)) if root else Path.home() / ".cache" / "dnnlib"
    return str(base.joinpath(*paths))


def is_url(source: str | os.PathLike[str]) -> bool:
    """Return True if `source` is an http(s) URL."""
    return re.match(r"https?://", str(source), re.IGNORECASE) is not None


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL such as s3://bucket/set.zip or file:///set.zip, not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::[^:]+)*://", path) is not None


def open_url(
    url: str,
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
) -> Any:
    """Open an http(s) URL or a local path for reading bytes; downloads are cached.

    hf://user/name/file is a file on the Hugging Face hub, in the cache of huggingface_hub (`dnnlib.hub`).

    `return_filename` returns the local file's path (a str) instead of an open file. `cache=False` reads the whole file
    into memory and keeps nothing. `cache_dir` replaces `make_cache_dir_path("downloads")`. `verbose` shows a progress
    bar if standard error is a terminal.

    If several processes want a file, one downloads it and the others wait. An interrupted download is resumed by the
    next call. Up to `num_attempts` attempts are made, with longer and longer waits. Raises ConfigError with one line if
    all fail.
    """
    if num_attempts < 1:
        raise ConfigError(f"num_attempts={num_attempts} must be at least 1")
    if return_filename and not cache:
        raise ConfigError("return_filename=True needs cache=True: without the cache, no file has a name")
    if hub.is_hub_url(url):
        return _open_from_hub(url, return_filename)
    if not is_url(url):
        return _open_local(url, return_filename)
    if not cache:
        return _read_into_memory(url, num_attempts, verbose)
    path = cached_path(url, cache_dir)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fill(path, url, num_attempts, verbose)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the download cache {path.parent}: {reason_of(error)};"
                " set DNNLIB_CACHE_DIR to a folder that can be written"
            ) from None
    return str(path) if return_filename else open(path, "rb")


def cached_path(url: str, cache_dir: str | None = None) -> Path:
    """Return the path of `url` in the cache: a hash of the URL, then the file's own name."""
    name = re.sub(r"[^0-9A-Za-z._-]", "_", split_url(url).path.rsplit("/", 1)[-1])[-128:] or "file"
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(cache_dir or make_cache_dir_path("downloads")) / f"{digest}_{name}"


def _open_from_hub(url: str, return_filename: bool) -> Any:
    name = hub.parse_hub_url(url)
    if name.file is None:
        raise ConfigError(f"'{url}' is a repository; name one of its files: {name}/FILE")
    path = hub.fetch_file(name)
    return str(path) if return_filename else open(path, "rb")


def _open_local(source: str, return_filename: bool) -> Any:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(source))
    if scheme:
        raise ConfigError(
            f"'{source}' has the scheme {scheme[1]}; give an http(s) URL, hf://user/name/file or a local path"
        )
    path = require_possible(source)
    if not path.is_file():
        raise ConfigError(f"'{source}' is not a file" if path.exists() else f"'{source}' does not exist")
    return str(path) if return_filename else open(path, "rb")


def _read_into_memory(url: str, num_attempts: int, verbose: bool) -> io.BytesIO:
    buffer = io.BytesIO()
    with _progress_bar(url, verbose) as progress:
        fetch.fetch(
            url, buffer, num_attempts=num_attempts, version=Version(), remember=lambda _: None, progress=progress
        )
    buffer.seek(0)
    return buffer


def _fill(path: Path, url: str, num_attempts: int, verbose: bool) -> None:
    start = time.time()
    failure = _next_to(path, "failed")
    with _locked(_next_to(path, "lock"), url, verbose) as waited:
        if path.is_file():
            return
        if waited and failure.is_file() and failure.stat().st_mtime > start:
            # If each of many processes tried by itself, one after the other, the same error would take far longer.
            raise ConfigError(failure.read_text("utf-8"))
        failure.unlink(missing_ok=True)
        try:
            _download_part(path, url, num_attempts, verbose)
        except ConfigError as error:
            text = f"{error}; or place the file by hand as {path}"
            write_text(failure, text)
            raise ConfigError(text) from None


def _download_part(path: Path, url: str, num_attempts: int, verbose: bool) -> None:
    """Download to a file of another name, and rename it at the end; a download that can be resumed stays."""
    part, about = _next_to(path, "part"), _next_to(path, "version")
    version = Version.load(about)
    try:
        with _progress_bar(url, verbose) as progress, _open_part(part) as file:
            if version.validator is None:
                file.truncate(0)
            known = fetch.fetch(
                url,
                file,
                num_attempts=num_attempts,
                version=version,
                remember=lambda version: version.save(about),
                progress=progress,
                require_room=lambda length: require_space(path, length),
            )
            file.flush()
            os.fsync(file.fileno())
        if verbose and not known:
            print(f"Nothing tells whether {url} came whole: its server does not announce a length", file=sys.stderr)
        os.replace(part, path)
        about.unlink(missing_ok=True)
    finally:
        if part.is_file() and (part.stat().st_size == 0 or not about.is_file()):
            part.unlink()
            about.unlink(missing_ok=True)


def _open_part(part: Path) -> IO[bytes]:
    """Open the file for update, created if missing; never one that a link at its place names."""
    if part.is_symlink():
        part.unlink()
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(part, flags, 0o666), "r+b")


def _next_to(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


@contextlib.contextmanager
def _locked(path: Path, url: str, verbose: bool) -> Iterator[bool]:
    """Hold the lock, which the system frees if the process is killed. Yields True if another process had it before."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
        waited = False
    except filelock.Timeout:
        if verbose:
            print(f"Waiting for another process that downloads {url}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=_POLL_SEC)
        waited = True
    try:
        yield waited
    finally:
        lock.release()


@contextlib.contextmanager
def _progress_bar(url: str, verbose: bool) -> Iterator[fetch.Progress]:
    from tqdm import tqdm

    name = split_url(url).path.rsplit("/", 1)[-1] or url
    with tqdm(
        desc=f"Downloading {name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        disable=None if verbose else True,
    ) as bar:

        def show(present: int, length: int | None) -> None:
            bar.total = length
            bar.update(present - bar.n)

        yield show
