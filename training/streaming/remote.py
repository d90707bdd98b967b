"""Files behind URLs, through fsspec: listing them, reading parts of them, downloading them.

Temporary failures (a connection that breaks, a server that is busy) are retried, from the byte where they occurred.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dnnlib.download import is_remote
from dnnlib.errors import ConfigError, one_line
from dnnlib.fetch import root_cause, worthwhile_attempts
from dnnlib.parse import split_url

_ATTEMPTS = 6  # without a byte between them
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt
_LONGEST_WAIT_SEC = 30.0
_CHUNK_BYTES = 8 << 20  # per request, and so at most the loss when a connection breaks
_TIMEOUT_SEC = 30.0  # without a single byte, over HTTP
_READ_AHEAD_BYTES = 256 << 10  # least size of a request for a part of a file
_MAY_PASS = (408, 425, 429)  # 4xx answers that are worth another attempt

# Names in fsspec's file systems for the version of a file, the most specific first.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "mtime"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "created"),
)

T = TypeVar("T")


class NotThere(ConfigError):
    """The file does not exist."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One version of a file."""

    url: str
    size: int  # bytes
    version: str  # the mark by which the store tells versions apart; may be empty

    @property
    def name(self) -> str:
        """Name of the file, without folders and queries."""
        return _path_of(self.url).rpartition("/")[2]

    def require_unchanged(self) -> None:
        """Raise ConfigError if the store has another version now."""
        now = find_file(self.url)
        if now != self:
            raise ConfigError(
                f"{self.url} has changed since the data set was opened: {now.size} bytes, version {now.version!r}; "
                f"it was {self.size} bytes, version {self.version!r}; put it back, or start a new run on the new data"
            )


def suffix_of(url: str) -> str:
    """Return the ending of the file's name, from its last dot on, in lower case."""
    name = _path_of(url).rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def find_file(url: str) -> RemoteFile:
    """Return size and version of a file. Raises NotThere if the store denies that it exists, else ConfigError."""
    system, path = _system(url)
    limit = {"timeout": _TIMEOUT_SEC} if _is_http(url) else {}
    info = _retrying(lambda: system.info(path, **limit), url)
    if info.get("type") == "directory":
        raise NotThere(f"{url} is a folder; name its ZIP files or tars, as in {url.rstrip('/')}/set-*.zip")
    if info.get("size") is None:
        raise ConfigError(f"the server does not report the size of {url}; use one that does")
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return RemoteFile(url=url, size=int(info["size"]), version=version)


def find_matches(url: str) -> list[str]:
    """Return the URLs that match a pattern with *, sorted; for stores that can list their files.

    Other signs that fsspec has in patterns stand for themselves.
    """
    system, path = _system(url)
    path = path if _is_http(url) else re.sub(r"[\[?]", r"[\g<0>]", path)
    try:
        found = _retrying(lambda: system.glob(path), url)
    except NotThere:
        return []
    return sorted(each if is_remote(each) else system.unstrip_protocol(each) for each in found)


def is_named_so(url: str) -> bool:
    """Return whether a file has the very name of a pattern. Always False for web addresses, where asking takes long."""
    if _is_http(url):
        return False
    try:
        find_file(url)
    except ConfigError:
        return False
    return True


class RemoteReader(io.RawIOBase):
    """A file that is read in parts, for zipfile. Raises ConfigError if the network fails for good."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0
        self._start, self._data = 0, b""  # the part in memory

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: D102
        self._position = max((0, self._position, self._file.size)[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, up to the end of the file."""
        begin = self._position
        end = min(begin + len(buffer), self._file.size)
        if begin >= end:
            return 0
        if not self._start <= begin <= end <= self._start + len(self._data):
            stop = min(max(end, begin + _READ_AHEAD_BYTES), self._file.size)
            self._start = min(begin, max(stop - _READ_AHEAD_BYTES, 0))
            self._data = b"".join(_read(self._file, self._start, stop))
        buffer[: end - begin] = self._data[begin - self._start : end - self._start]
        self._position = end
        return end - begin


def download(file: RemoteFile, dest: Path, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Write this version to `dest`; False if `stopped`. Raises ConfigError, or OSError if `dest` cannot be written."""
    try:
        file.require_unchanged()
        with open(dest, "r+b" if dest.exists() else "wb") as out:
            for data in _read(file, 0, file.size):
                if stopped():
                    return False
                out.write(data)
            out.truncate()
        file.require_unchanged()
    except NotThere:
        raise ConfigError(f"{file.url} is gone since the data set was opened; put it back") from None
    return True


def _read(file: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        stop = min(begin + _CHUNK_BYTES, end)
        data = _retrying(lambda first=begin, last=stop: _read_range(file, first, last), file.url)  # type: ignore[misc]
        yield data
        begin += len(data)


def _read_range(file: RemoteFile, begin: int, end: int) -> bytes:
    system, path = _system(file.url)
    options: dict[str, Any] = {}
    if _is_http(file.url):
        import aiohttp

        # Without a size, the file system asks for it at every call; without a timeout, it waits for minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_SEC, sock_read=_TIMEOUT_SEC)
        options = {"size": file.size, "timeout": timeout}
    with system.open(path, "rb", cache_type="none", **options) as stream:
        if begin:
            stream.seek(begin)
        data: bytes = stream.read(end - begin)
    if not 0 < len(data) <= end - begin:
        raise EOFError(f"{len(data)} bytes came instead of {end - begin}")
    return data


def _retrying(action: Callable[[], T], url: str) -> T:
    """Return the result of `action`, retried on temporary failures. Raises ConfigError when that does not help."""
    wait_sec = _FIRST_WAIT_SEC
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except ConfigError:
            raise
        except ImportError as error:
            raise _missing_package(url, error) from None
        except Exception as error:  # each file system has its own
            reason = _reason(error)
            _require_temporary(error, reason, url)
        if attempt >= worthwhile_attempts(root_cause(reason), _ATTEMPTS):
            break
        time.sleep(wait_sec)
        wait_sec = min(wait_sec * 2, _LONGEST_WAIT_SEC)
    raise ConfigError(f"cannot read {url}: {one_line(reason)}; check the address and the network connection")


def _reason(error: Exception) -> BaseException:
    """Return the cause of an error: fsspec turns every failure over HTTP into a FileNotFoundError."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _require_temporary(error: Exception, reason: BaseException, url: str) -> None:
    """Raise if another attempt would fail the same way."""
    status = getattr(reason, "status", None)
    if status in (404, 410) or (isinstance(reason, FileNotFoundError) and status is None):
        raise NotThere(f"{url} does not exist") from None
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS
    if refused or isinstance(reason, PermissionError):
        raise ConfigError(f"cannot read {url}: {one_line(reason)}; check the address and your access to it") from None
    whole_only = isinstance(reason, ValueError) and "range" in str(reason).lower()
    if whole_only or isinstance(error, io.UnsupportedOperation):
        raise ConfigError(
            f"the server of {url} gives whole files only; use one that supports HTTP range requests"
        ) from None
    # Malformed addresses, missing credentials (each library has its own class), and what the store cannot do.
    if isinstance(reason, ValueError | TypeError | NotImplementedError) or "Credentials" in type(reason).__name__:
        raise ConfigError(f"cannot read {url}: {one_line(reason)}; check the address and your access to it") from None


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of `url` and the path in it. Raises ConfigError if a package for it is missing."""
    try:
        from fsspec.core import url_to_fs

        # A cached list of files would hide a change.
        system, path = url_to_fs(url, use_listings_cache=False)
        return system, path
    except ImportError as error:
        raise _missing_package(url, error) from None
    except Exception as error:
        raise ConfigError(f"{url} cannot be opened: {one_line(_reason(error))}") from None


def _is_http(url: str) -> bool:
    return re.match("https?:", url, re.IGNORECASE) is not None


def _missing_package(url: str, error: ImportError) -> ConfigError:
    scheme = url.partition("://")[0]
    if scheme.lower() in ("http", "https", "file"):
        return ConfigError(f"{url} needs packages that are not installed; try: pip install -e '.[streaming]'")
    return ConfigError(f"{url} needs the fsspec package for {scheme}://, which is not installed: {one_line(error)}")


def _path_of(url: str) -> str:
    """Return the path in a URL, without the query of a web address."""
    return split_url(url).path if _is_http(url) else url
