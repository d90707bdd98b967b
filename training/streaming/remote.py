"""Files behind URLs, through fsspec: which there are, parts of them, and whole ones brought to the local disk.

What passes by itself (a connection that breaks, a server that is busy) is tried again, from the byte where it stopped.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dnnlib.errors import ConfigError
from training.dataset.zip_index import one_line

_ATTEMPTS = 6  # without a byte between them
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt
_LONGEST_WAIT_SEC = 30.0
_CHUNK_BYTES = 8 << 20  # asked for at a time, so what a break-off may cost
_TIMEOUT_SEC = 30.0  # without a single byte, over HTTP
_READ_AHEAD_BYTES = 256 << 10  # least to ask for where only some of a file is wanted
_MAY_PASS = (408, 425, 429)  # of the 4xx answers, those worth another attempt

# What file systems call the mark of a file's version, the most telling first.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "mtime"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "created"),
)

T = TypeVar("T")


class NotThere(ConfigError):
    """There is no such file."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One version of a file."""

    url: str
    size: int  # bytes
    version: str  # whatever the store tells versions apart by; empty if nothing

    @property
    def name(self) -> str:
        """The file's own name, without folders and queries."""
        return _path_of(self.url).rpartition("/")[2]

    def require_unchanged(self) -> None:
        """Raise ConfigError if the store has another version by now."""
        now = find_file(self.url)
        if now != self:
            raise ConfigError(
                f"{self.url} has changed since the data set was opened: {now.size} bytes, version {now.version!r}; "
                f"it was {self.size} bytes, version {self.version!r}; put it back, or start a new run on the new data"
            )


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, such as https://host/set.zip or file:///set.zip, and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::[^:]+)*://", path) is not None


def suffix_of(url: str) -> str:
    """The ending of the file's name, from its last dot on, in lower case."""
    name = _path_of(url).rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def find_file(url: str) -> RemoteFile:
    """Size and version of the file. Raises NotThere where the store says that it does not exist, else ConfigError."""
    system, path = _system(url)
    limit = {"timeout": _TIMEOUT_SEC} if _is_http(url) else {}
    info = _persistently(lambda: system.info(path, **limit), url)
    if info.get("type") == "directory":
        raise NotThere(f"{url} is a folder; name its ZIP files or tars, as in {url.rstrip('/')}/set-*.zip")
    if info.get("size") is None:
        raise ConfigError(f"the server does not say how long {url} is; use one that tells a file's length")
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return RemoteFile(url=url, size=int(info["size"]), version=version)


def find_matches(url: str) -> list[str]:
    """The URLs that a pattern with * stands for, sorted; for stores that can list their files."""
    system, path = _system(url)
    try:
        found = _persistently(lambda: system.glob(path), url)
    except NotThere:
        return []
    return sorted(each if is_remote(each) else system.unstrip_protocol(each) for each in found)


class RemoteReader(io.RawIOBase):
    """A file that is read in parts, for zipfile and its like. Raises ConfigError where the network gives up."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0
        self._start, self._data = 0, b""  # what is in memory

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: D102
        self._position = max((0, self._position, self._file.size)[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the file goes."""
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
    """Write the file to `dest`, all of it and of this version; False where `stopped` called it off.

    Raises ConfigError where that fails, OSError where `dest` cannot be written.
    """
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
    """Bytes `begin` to `end` - 1 in pieces."""
    while begin < end:
        stop = min(begin + _CHUNK_BYTES, end)
        data = _persistently(lambda first=begin, last=stop: _read_range(file, first, last), file.url)  # type: ignore[misc]
        yield data
        begin += len(data)


def _read_range(file: RemoteFile, begin: int, end: int) -> bytes:
    system, path = _system(file.url)
    options: dict[str, Any] = {}
    if _is_http(file.url):
        import aiohttp

        # Else the file system asks for the length once more, at every call, and waits for minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_SEC, sock_read=_TIMEOUT_SEC)
        options = {"size": file.size, "timeout": timeout}
    with system.open(path, "rb", cache_type="none", **options) as stream:
        if begin:
            stream.seek(begin)
        data: bytes = stream.read(end - begin)
    if not 0 < len(data) <= end - begin:
        raise EOFError(f"{len(data)} bytes came instead of {end - begin}")
    return data


def _persistently(action: Callable[[], T], url: str) -> T:
    """What `action` returns, tried several times; ConfigError where it fails in the end, or in a way that will stay."""
    wait_sec = _FIRST_WAIT_SEC
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except ConfigError:
            raise
        except ImportError as error:
            raise _missing_package(url, error) from None
        except Exception as error:  # each file system has its own
            reason = _reason(error)
            _require_hope(error, reason, url)
        if attempt + 1 < _ATTEMPTS:
            time.sleep(wait_sec)
            wait_sec = min(wait_sec * 2, _LONGEST_WAIT_SEC)
    raise ConfigError(f"cannot read {url}: {one_line(reason)}; check the address and the network connection")


def _reason(error: Exception) -> BaseException:
    """What lies behind an error; fsspec says of whatever goes wrong over HTTP that there is no such file."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _require_hope(error: Exception, reason: BaseException, url: str) -> None:
    """Raise where another attempt would end the same way."""
    status = getattr(reason, "status", None)
    if status in (404, 410) or (isinstance(reason, FileNotFoundError) and status is None):
        raise NotThere(f"{url} does not exist") from None
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS
    if refused or isinstance(reason, PermissionError):
        raise ConfigError(f"cannot read {url}: {one_line(reason)}; check the address and your access to it") from None
    whole_only = isinstance(reason, ValueError) and "range" in str(reason).lower()
    if whole_only or isinstance(error, io.UnsupportedOperation):
        raise ConfigError(
            f"the server of {url} gives whole files only; use one that knows HTTP range requests"
        ) from None


def _system(url: str) -> tuple[Any, str]:
    """The file system of `url` and the path in it. Raises ConfigError where a package for it is missing."""
    try:
        from fsspec.core import url_to_fs

        # Lists of files that are remembered would hide a change.
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
    """The path in a URL, without the query of a web address."""
    return urlsplit(url).path if _is_http(url) else url
