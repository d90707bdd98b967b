"""One file over HTTP: resumed where the connection broke, checked, and without following a server anywhere else.

Source: RFC 9110 (HTTP semantics), sections 13.1.5 (If-Range), 14 (ranges) and 15.4 (redirection).
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from dnnlib.atomic import write_text
from dnnlib.errors import ConfigError, one_line

_CHUNK_BYTES = 1 << 16  # the most that a broken connection can lose
_TIMEOUT_SEC = 30.0  # without a single byte
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt; the second attempt follows at once
_LONGEST_WAIT_SEC = 30.0  # also where the server asks for more
_MAX_REDIRECTS = 10
_MAX_LOOKUPS = 3  # failed lookups of a host's name
_TRANSIENT = (408, 416, 425, 429)  # the 4xx answers that are worth another attempt

# Called with the bytes received and the bytes of the whole file, None if the server does not say.
Progress = Callable[[int, int | None], None]


class Stopped(Exception):
    """The attempt failed, and another one would fail the same way."""


class Broken(Exception):
    """The attempt failed; the next one may not. `response` may ask for a pause (Retry-After)."""

    def __init__(self, reason: str, response: Any = None) -> None:
        super().__init__(reason)
        self.response = response


@dataclass(frozen=True, kw_only=True)
class Version:
    """The version of a file that the received bytes belong to, and its length."""

    validator: str | None = None  # a strong ETag, else the date of change; None: the download cannot be resumed
    length: int | None = None

    @classmethod
    def of(cls, headers: Any) -> "Version":
        """Version that the headers of a complete answer describe."""
        tag = headers.get("ETag")
        if tag is not None and tag.startswith("W/"):
            tag = None  # two versions may share a weak one
        return cls(validator=tag or headers.get("Last-Modified"), length=_integer(headers.get("Content-Length")))

    def save(self, path: Path) -> None:
        """Write it to `path`."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Version":
        """Read what `save` wrote; without a validator if the file is missing or damaged."""
        try:
            fields = json.loads(path.read_text("utf-8"))
            return cls(validator=str(fields["validator"]), length=_integer(fields["length"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


def fetch(
    url: str,
    file: IO[bytes],
    *,
    num_attempts: int,
    version: Version,
    remember: Callable[[Version], None],
    progress: Progress,
) -> None:
    """Make `file` (open for update) the body of `url`; bytes that it already has are kept if they are of `version`.

    `remember` gets the version as soon as it is known, so that a later call can resume. Raises ConfigError, with one
    line, if all attempts fail; OSError if `file` cannot be written.
    """
    import requests  # here, because most programs never download
    from urllib3.exceptions import MaxRetryError
    from urllib3.util import Retry

    retry = Retry(num_attempts - 1, backoff_factor=_FIRST_WAIT_SEC, backoff_max=_LONGEST_WAIT_SEC)
    with requests.Session() as session:
        work = _Fetch(session, url, file, version, remember, progress)
        while True:
            response = None
            try:
                return work.attempt()
            except Stopped as error:
                raise ConfigError(f"cannot download {url}: {error}") from None
            except Broken as error:
                reason, response = str(error), error.response
            except requests.RequestException as error:
                origin: BaseException = error
                while (inner := origin.__cause__ or origin.__context__) is not None:
                    origin = inner
                reason = one_line(origin)
                if isinstance(origin, socket.gaierror) and len(retry.history) >= _MAX_LOOKUPS - 1:
                    break  # no such host, or no network at all: waiting for minutes would not help
            try:
                retry = retry.increment()
            except MaxRetryError:
                break
            _wait(retry, response)
    raise ConfigError(f"cannot download {url}: {reason}; check the address and the network connection")


def _wait(retry: Any, response: Any) -> None:
    """Wait as long as the server asks, or twice as long as the last time, within a bound."""
    from urllib3.exceptions import InvalidHeader

    asked = None
    if response is not None:
        with contextlib.suppress(InvalidHeader):
            asked = retry.get_retry_after(response)
    time.sleep(min(asked or retry.get_backoff_time(), _LONGEST_WAIT_SEC))


@dataclass
class _Fetch:
    session: Any
    url: str
    file: IO[bytes]
    version: Version
    remember: Callable[[Version], None]
    progress: Progress

    def attempt(self) -> None:
        """Fetch the whole file, or what is missing of it. Raises Stopped, Broken and requests' own errors."""
        present = self.file.seek(0, 2)
        headers = {"Accept-Encoding": "identity"}  # the bytes as stored: a compressed body has another length
        resumes = present > 0 and self.version.validator is not None
        if resumes and present == self.version.length:
            return  # complete when the program was killed
        if resumes:
            headers |= {"Range": f"bytes={present}-", "If-Range": str(self.version.validator)}
        with _get(self.session, self.url, headers) as response:
            if response.status_code == 206 and resumes:
                self._require_continuation(response.headers, present)
            elif response.status_code == 200:
                self._start_over()
                self.version = Version.of(response.headers)
                if self.version.validator is not None:
                    self.remember(self.version)
            else:
                self._refuse(response)
            self._copy(response)

    def _copy(self, response: Any) -> None:
        pieces = response.iter_content(_CHUNK_BYTES)
        length = self.version.length
        present, complete = self.file.tell(), True
        while True:
            try:  # around the reading alone: an OSError of writing is about the disk
                piece = next(pieces, b"")
            except OSError:  # all of requests' errors
                complete = False
                break
            if not piece:
                break
            self.file.write(piece)
            present += len(piece)
            self.progress(present, length)
        self.file.flush()
        if not complete or length not in (None, present):
            if length is not None and present > length:
                self._start_over()
            raise Broken(f"the download broke off after {present} of {length or 'an unknown number of'} bytes")
        if present == 0:
            raise Broken("the file is empty")

    def _start_over(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def _require_continuation(self, headers: Any, present: int) -> None:
        """Start over and raise Broken unless the answer continues where the bytes end."""
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        total = _integer(match[3]) if match else None
        other_length = total is not None and self.version.length not in (None, total)
        # A server may heed Range but not If-Range; its own headers then tell that the file has changed.
        by_tag = (self.version.validator or "").startswith('"')  # a date is not quoted
        validator = headers.get("ETag" if by_tag else "Last-Modified")
        other_version = validator is not None and validator != self.version.validator
        if match is None or int(match[1]) != present or other_length or other_version:
            self._start_over()
            raise Broken("the server continues with another part of the file than was asked for")

    def _refuse(self, response: Any) -> None:
        status = response.status_code
        reason = f"the server answers {status} {response.reason}".rstrip()
        if status == 416:  # the bytes received are not a beginning of the file
            self._start_over()
        if status >= 500 or status in _TRANSIENT:
            raise Broken(reason, response)
        raise Stopped(f"{reason}; check the address")


def _get(session: Any, url: str, headers: dict[str, str]) -> Any:
    """Response for `url`, with redirections followed within HTTP and never from https to http."""
    for _ in range(_MAX_REDIRECTS + 1):
        response = session.get(url, stream=True, timeout=_TIMEOUT_SEC, headers=headers, allow_redirects=False)
        target = response.headers.get("Location")
        if not 300 <= response.status_code < 400 or target is None:
            return response
        response.close()
        target = urljoin(url, target)
        before, after = urlsplit(url).scheme.lower(), urlsplit(target).scheme.lower()
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise Stopped(f"the server points to {target}, which is not followed from {before}")
        url = target
    raise Stopped(f"the server redirects more than {_MAX_REDIRECTS} times")


def _integer(text: Any) -> int | None:
    return int(text) if isinstance(text, int) or (isinstance(text, str) and text.isdecimal()) else None
