"""One file over HTTP: resumed where the connection broke, checked, and without following a server anywhere else.

Source: RFC 9110 (HTTP semantics), sections 13.1.5 (If-Range), 14 (ranges) and 15.4 (redirection).
"""

import contextlib
import json
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

from dnnlib.atomic import write_text
from dnnlib.errors import ConfigError, one_line
from dnnlib.parse import split_url
from dnnlib.whole import missing_end

_CHUNK_BYTES = 1 << 16  # the most that a broken connection can lose
_TIMEOUT_SEC = 30.0  # without a single byte
_FIRST_WAIT_SEC = 0.5  # doubled after every failed attempt; the second attempt follows at once
_LONGEST_WAIT_SEC = 30.0  # also where the server asks for more
_MAX_REDIRECTS = 10
_MAX_LOOKUPS = 3  # of a host's name that cannot be found: no such host, or no network at all
_MAX_UNANNOUNCED = 16 << 30  # bytes of a file whose length the server does not say
_MAX_VALIDATOR = 1000  # characters
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
        """Version that the headers of a complete answer describe. Raises Stopped for a length that is not one."""
        tag = headers.get("ETag")
        if tag is not None and tag.startswith("W/"):
            tag = None  # two versions may share a weak one
        validator = tag or headers.get("Last-Modified")
        if validator is not None and not (validator.isprintable() and len(validator) <= _MAX_VALIDATOR):
            validator = None  # it could not be sent back
        length = headers.get("Content-Length")
        lengths = {None if length is None else _integer(each.strip()) for each in (length or "").split(",")}
        if len(lengths) > 1 or (length is not None and None in lengths):
            raise Stopped(f"the server announces a length of {length[:40]!r}")
        return cls(validator=validator, length=lengths.pop())

    def save(self, path: Path) -> None:
        """Write it to `path`."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Version":
        """Read what `save` wrote; without a validator if the file is missing or damaged."""
        try:
            fields = json.loads(path.read_text("utf-8"))
            return cls(validator=str(fields["validator"]), length=_integer(fields["length"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls()


def fetch(
    url: str,
    file: IO[bytes],
    *,
    num_attempts: int,
    version: Version,
    remember: Callable[[Version], None],
    progress: Progress,
    require_room: Callable[[int], None] = lambda _: None,
) -> bool:
    """Make `file` (open for update) the body of `url`; bytes that it already has are kept if they are of `version`.

    `remember` gets the version as soon as it is known, so that a later call can resume. `require_room` gets the length
    that the server announces, and may raise. Returns False if nothing tells that the file is whole: its server does not
    announce a length, and its format has no end. Raises ConfigError, with one line, if all attempts fail or another
    one would fail the same way; OSError if `file` cannot be written.
    """
    split_url(url)
    import requests  # here, because most programs never download
    from urllib3.exceptions import LocationValueError, MaxRetryError
    from urllib3.util import Retry

    permanent = (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, requests.exceptions.MissingSchema,
                 requests.exceptions.InvalidHeader, LocationValueError, UnicodeError)  # fmt: skip
    retry = Retry(num_attempts - 1, backoff_factor=_FIRST_WAIT_SEC, backoff_max=_LONGEST_WAIT_SEC)
    with requests.Session() as session:
        session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]  # `_get` follows
        work = _Fetch(session, url, file, version, remember, progress, require_room)
        while True:
            response = None
            try:
                return work.attempt()
            except Stopped as error:
                raise ConfigError(f"cannot download {url}: {error}") from None
            except Broken as error:
                reason, response = str(error), error.response
            except permanent as error:
                raise ConfigError(f"cannot download {url}: {_explained(error)}") from None
            except requests.RequestException as error:
                origin = root_cause(error)
                reason = one_line(origin)
                if len(retry.history) + 1 >= worthwhile_attempts(origin, num_attempts):
                    break
            try:
                retry = retry.increment()
            except MaxRetryError:
                break
            _wait(retry, response)
    raise ConfigError(f"cannot download {url}: {reason}; check the address and the network connection")


def root_cause(error: BaseException) -> BaseException:
    """The error that the libraries in between have wrapped into `error`."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def worthwhile_attempts(cause: BaseException, most: int) -> int:
    """Return how often to try, of `most`, where `cause` is what a connection fails by."""
    if isinstance(cause, ssl.SSLCertVerificationError) or getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER":
        return 1
    return min(most, _MAX_LOOKUPS) if isinstance(cause, socket.gaierror) else most


def _explained(error: Exception) -> str:
    text = one_line(error).rstrip(".")
    if "SOCKS" in text:
        text += '; pip install "requests[socks]", or unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY'
    return text


def _wait(retry: Any, response: Any) -> None:
    """Wait as long as the server asks, or twice as long as the last time, within a bound."""
    from urllib3.exceptions import InvalidHeader

    asked = None
    if response is not None:
        with contextlib.suppress(InvalidHeader, ValueError, OverflowError):
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
    require_room: Callable[[int], None]

    def attempt(self) -> bool:
        """Fetch the whole file, or what is missing of it. Returns whether it is known to be whole.

        Raises Stopped, Broken and requests' own errors.
        """
        present = self.file.seek(0, 2)
        headers = {"Accept-Encoding": "identity"}  # the bytes as stored: a compressed body has another length
        resumes = present > 0 and self.version.validator is not None
        if resumes and present == self.version.length:
            return True  # complete when the program was killed
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
                self.require_room(self.version.length or 0)
            else:
                self._refuse(response)
            coding = response.headers.get("Content-Encoding", "").strip().lower()
            # Some servers announce as a coding what is the file itself.
            stored = coding in ("gzip", "x-gzip") and split_url(self.url).path.lower().endswith((".gz", ".tgz"))
            if coding not in ("", "identity") and not stored:
                self._start_over()
                raise Stopped(f"the server sends it compressed ({coding[:40]}), which was not asked for")
            return self._copy(response)

    def _copy(self, response: Any) -> bool:
        from urllib3.exceptions import HTTPError

        pieces = response.raw.stream(_CHUNK_BYTES, decode_content=False)
        length = self.version.length
        most = _MAX_UNANNOUNCED if length is None else length
        present, complete = self.file.tell(), True
        while True:
            try:  # around the reading alone: an OSError of writing is about the disk
                piece = next(pieces, b"")
            except (OSError, HTTPError):
                complete = False
                break
            if not piece:
                break
            present += len(piece)
            if present > most:
                self._start_over()
                raise Stopped(f"the server sends more than {'it announced' if length else 'is possible'}: {most} bytes")
            self.file.write(piece)
            self.progress(present, length)
        self.file.flush()
        if not complete or length not in (None, present):
            raise Broken(f"the download broke off after {present} of {length or 'an unknown number of'} bytes")
        if present == 0:
            raise Broken("the file is empty")
        missing = missing_end(self.file) if length is None else ""
        if missing:
            raise Broken(f"the server does not say how long the file is, and it was cut: {missing} is missing")
        return missing is not None

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
        if match is None or _integer(match[1]) != present or other_length or other_version:
            self._start_over()
            raise Broken("the server continues with another part of the file than was asked for")

    def _refuse(self, response: Any) -> None:
        status = response.status_code
        reason = f"the server answers {status} {(response.reason or '')[:100]}".rstrip()
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
        before = split_url(url).scheme
        try:
            target = urljoin(url, target.encode("latin-1").decode("utf-8"))  # as servers write it
            after = split_url(target).scheme
        except ValueError:
            raise Stopped(f"the server points to {target[:200]!r}, which is not a URL") from None
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise Stopped(f"the server points to {target}, which is not followed from {before}")
        url = target
    raise Stopped(f"the server redirects more than {_MAX_REDIRECTS} times")


def _integer(text: Any) -> int | None:
    """Return a count of bytes, from 0 to 10**18; None for anything else."""
    digits = str(text) if type(text) in (int, str) else ""
    return int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else None
