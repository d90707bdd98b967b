"""One file over HTTP: in pieces where it has to be, checked, and without following a server to anywhere else.

Source: RFC 9110 (HTTP semantics), sections 13.1.5 (If-Range), 14 (ranges) and 15.4 (redirection).
"""

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
from dnnlib.errors import ConfigError

_CHUNK_BYTES = 1 << 16  # what a break-off may cost
_TIMEOUT_SEC = 30.0  # without a single byte
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt
_LONGEST_WAIT_SEC = 30.0
_MAX_REDIRECTS = 10
_MAX_LOOKUPS = 3  # of a host's name that fail
_MAY_PASS = (408, 416, 425, 429)  # of the 4xx answers, those worth another attempt

# Called with the bytes that are there and the bytes of the whole file, None where the server does not say.
Progress = Callable[[int, int | None], None]


class Stopped(Exception):
    """Another attempt would end the same way."""


class Broken(Exception):
    """The attempt failed; the next one may not. `wait_sec`, where the server asks for a pause."""

    def __init__(self, reason: str, wait_sec: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_sec = wait_sec


@dataclass(frozen=True, kw_only=True)
class Version:
    """Which version of a file the bytes are of, and how long it is."""

    validator: str | None = None  # a strong ETag, else the date of change; None = bytes cannot be added to
    length: int | None = None

    @property
    def by_tag(self) -> bool:
        """Whether the validator is an ETag, which is in quotes, and not a date."""
        return (self.validator or "").startswith('"')

    @classmethod
    def of(cls, headers: Any) -> "Version":
        """What a whole answer says of itself."""
        tag = headers.get("ETag")
        if tag is not None and tag.startswith("W/"):
            tag = None  # two versions may share a weak one
        return cls(validator=tag or headers.get("Last-Modified"), length=_integer(headers.get("Content-Length")))

    def save(self, path: Path) -> None:
        """Write it beside the bytes."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Version":
        """What `save` wrote; a version that fits nothing where that is missing or damaged."""
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
    """Make `file` (open for update) the body of `url`; what it holds already is kept if it is of the same `version`.

    `remember` gets the version as soon as it is known, for a later continuation. Raises ConfigError, with one line,
    where all attempts fail; OSError where `file` cannot be written.
    """
    import requests  # here, because most programs never download

    wait_sec, reason = _FIRST_WAIT_SEC, ""
    with requests.Session() as session:
        work = _Fetch(session, url, file, version, remember, progress)
        for attempt in range(num_attempts):
            asked_sec = 0.0
            try:
                work.attempt()
                return
            except Stopped as error:
                raise ConfigError(f"cannot download {url}: {error}") from None
            except Broken as error:
                reason, asked_sec = str(error), error.wait_sec
            except requests.RequestException as error:
                origin = _innermost(error)
                reason = " ".join(str(origin).split()) or type(origin).__name__
                if isinstance(origin, socket.gaierror) and attempt >= _MAX_LOOKUPS - 1:
                    break  # no such host, or no network at all: waiting for minutes would not help
            if attempt + 1 < num_attempts:
                time.sleep(min(max(wait_sec, asked_sec), _LONGEST_WAIT_SEC))
                wait_sec = min(wait_sec * 2, _LONGEST_WAIT_SEC)
    raise ConfigError(f"cannot download {url}: {reason}; check the address and the network connection")


class _Fetch:
    """A file on its way, over several attempts."""

    def __init__(
        self,
        session: Any,
        url: str,
        file: IO[bytes],
        version: Version,
        remember: Callable[[Version], None],
        progress: Progress,
    ) -> None:
        self._session = session
        self._url = url
        self._file = file
        self._version = version
        self._remember = remember
        self._progress = progress

    def attempt(self) -> None:
        """Fetch the whole file, or what is missing of it. Raises Stopped, Broken and requests' own errors."""
        present = self._file.seek(0, 2)
        headers = {"Accept-Encoding": "identity"}  # bytes as they are stored; else their number would be another
        asked_for_rest = present > 0 and self._version.validator is not None
        if asked_for_rest and present == self._version.length:
            return  # all was there when the program was killed
        if asked_for_rest:
            headers |= {"Range": f"bytes={present}-", "If-Range": str(self._version.validator)}
        with _get(self._session, self._url, headers) as response:
            if response.status_code == 206 and asked_for_rest:
                self._require_continuation(response.headers, present)
            elif response.status_code == 200:
                self._start_over()
                self._version = Version.of(response.headers)
                if self._version.validator is not None:
                    self._remember(self._version)
            else:
                self._refuse(response)
            self._copy(response)

    def _copy(self, response: Any) -> None:
        """Add the body to the file, and check that all of it is there."""
        pieces = response.iter_content(_CHUNK_BYTES)
        length = self._version.length
        present, complete = self._file.tell(), True
        while True:
            try:  # around the reading alone: errors of writing are of another kind
                piece = next(pieces, b"")
            except OSError:  # all of requests' errors
                complete = False
                break
            if not piece:
                break
            self._file.write(piece)
            present += len(piece)
            self._progress(present, length)
        self._file.flush()
        if not complete or length not in (None, present):
            if length is not None and present > length:
                self._start_over()
            raise Broken(f"the download broke off after {present} of {length or 'an unknown number of'} bytes")
        if present == 0:
            raise Broken("the file is empty")

    def _start_over(self) -> None:
        self._file.seek(0)
        self._file.truncate()

    def _require_continuation(self, headers: Any, present: int) -> None:
        """Raise Broken, with what is there given up, unless the answer goes on where the bytes end."""
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        total = _integer(match[3]) if match else None
        other_length = total is not None and self._version.length not in (None, total)
        # A server may heed Range and not If-Range; what it says of itself then tells that the file is another now.
        validator = headers.get("ETag" if self._version.by_tag else "Last-Modified")
        other_version = validator is not None and validator != self._version.validator
        if match is None or int(match[1]) != present or other_length or other_version:
            self._start_over()
            raise Broken("the server continues with another part of the file than was asked for")

    def _refuse(self, response: Any) -> None:
        """Raise for an answer that is not the file."""
        status = response.status_code
        reason = f"the server answers {status} {response.reason}".rstrip()
        if status == 416:  # what is there is not a beginning of the file
            self._start_over()
        if status >= 500 or status in _MAY_PASS:
            raise Broken(reason, wait_sec=_integer(response.headers.get("Retry-After")) or 0.0)
        raise Stopped(f"{reason}; check the address")


def _get(session: Any, url: str, headers: dict[str, str]) -> Any:
    """The answer for `url`, redirections followed within HTTP and not from a secured to an open connection."""
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


def _innermost(error: BaseException) -> BaseException:
    """Where a failed request began."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
