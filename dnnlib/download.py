"""Files from the web, kept in a cache folder."""

import hashlib
import io
import os
import re
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SEC = 30
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt
_LONGEST_WAIT_SEC = 30.0


def make_cache_dir_path(*paths: str) -> str:
    """Path below the cache folder: $DNNLIB_CACHE_DIR, else $HOME/.cache/dnnlib. Nothing is created."""
    root = os.environ.get("DNNLIB_CACHE_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "dnnlib"
    return str(base.joinpath(*paths))


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is an http(s) URL rather than a path."""
    return re.match(r"https?://", str(source), re.IGNORECASE) is not None


def open_url(
    url: str,
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
) -> Any:
    """Open an http(s) URL or a local path for reading bytes; downloads are kept in the cache and reused.

    `return_filename` gives the local file's path (a str) in place of an open file. `cache=False` reads the whole file
    into memory and keeps nothing. `cache_dir` takes the place of `make_cache_dir_path("downloads")`. `verbose` is
    accepted for scripts that pass it and prints nothing: progress is the caller's. Failed attempts are repeated up to
    `num_attempts` times, waiting longer each time. Raises ConfigError with one line where the file cannot be had.
    """
    if num_attempts < 1:
        raise ConfigError(f"num_attempts={num_attempts}; at least 1 is needed")
    if return_filename and not cache:
        raise ConfigError("return_filename=True needs cache=True: there is no file to name otherwise")
    if not is_url(url):
        return _open_local(url, return_filename)
    if not cache:
        buffer = io.BytesIO()
        _download(url, buffer, num_attempts, "")
        buffer.seek(0)
        return buffer
    path = cached_path(url, cache_dir)
    if not path.is_file():
        advice = f"; or place the file by hand as {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temp, open(temp, "wb") as file:
                _download(url, file, num_attempts, advice)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the download cache {path.parent}: {error.strerror or error};"
                " set DNNLIB_CACHE_DIR to a folder that can be written"
            ) from None
    return str(path) if return_filename else open(path, "rb")


def cached_path(url: str, cache_dir: str | None = None) -> Path:
    """Where `open_url` keeps the file of `url`: a hash of the URL, then the file's own name."""
    name = re.sub(r"[^0-9A-Za-z._-]", "_", urlsplit(url).path.rsplit("/", 1)[-1])[-128:] or "file"
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(cache_dir or make_cache_dir_path("downloads")) / f"{digest}_{name}"


def _open_local(source: str, return_filename: bool) -> Any:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(source))
    if scheme:
        raise ConfigError(f"'{source}' has the scheme {scheme[1]}; give an http(s) URL or a local path")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"'{source}' is no file" if path.exists() else f"'{source}' does not exist")
    return str(path) if return_filename else open(path, "rb")


def _download(url: str, file: IO[bytes], num_attempts: int, advice: str) -> None:
    """Write the body of `url` to `file`, which is started over on every attempt."""
    import requests  # here, because most programs never download

    wait_sec = _FIRST_WAIT_SEC
    problem = ""
    for attempt in range(num_attempts):
        if attempt:
            time.sleep(wait_sec)
            wait_sec = min(wait_sec * 2, _LONGEST_WAIT_SEC)
        file.seek(0)
        file.truncate()
        try:
            with _get(requests, url) as response:
                if response.status_code == 200:
                    problem = _copy_body(response, file)
                    if not problem:
                        return
                else:
                    problem = f"the server answers {response.status_code} {response.reason}"
                    if 400 <= response.status_code < 500 and response.status_code not in (408, 425, 429):
                        break
        except requests.RequestException as error:
            problem = _reason(error)
    raise ConfigError(f"cannot download {url}: {problem}; check the address and the network connection{advice}")


def _get(requests: Any, url: str) -> Any:
    # Bytes as they are stored: with a content encoding the announced length would not be that of the file.
    return requests.get(url, stream=True, timeout=_TIMEOUT_SEC, headers={"Accept-Encoding": "identity"})


def _copy_body(response: Any, file: IO[bytes]) -> str:
    """Copy the body; what is wrong with it, or an empty string."""
    announced = response.headers.get("Content-Length")
    chunks = response.iter_content(_CHUNK_BYTES)
    num_bytes = 0
    complete = True
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError:  # all of requests' errors; those of writing are not meant
            complete = False
            break
        if not chunk:
            break
        file.write(chunk)
        num_bytes += len(chunk)
    file.flush()
    if not complete or (announced is not None and announced.isdigit() and int(announced) != num_bytes):
        return f"the download broke off after {num_bytes} of {announced or 'an unknown number of'} bytes"
    return "" if num_bytes else "the file is empty"


def _reason(error: Exception) -> str:
    """The innermost reason of a failed request, in one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, Exception):
            break
        error = inner
    return " ".join(str(error).split()) or type(error).__name__
