"""Subjects of the fuzzer that are no data: values of options, answers of web servers, records of runs and results.

Options are files with a line --name=value for each option of a command, or parser=value.
"""

import contextlib
import importlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click

from dnnlib import parse
from dnnlib.cli import SOURCE
from dnnlib.download import open_url
from dnnlib.errors import ConfigError
from dnnlib.fetch import Version
from dnnlib.hub import parse_hub_url
from edm2.options.sampling import NUMBERS
from edm2.report import document
from edm2.report.next_commands import commands_for
from edm2.report.record import read_run
from tests.helpers.fuzz_formats import OPTION_VALUES
from tests.helpers.paths import ROOT
from tests.helpers.report_run import NOW, write_run
from training.condition.spec import parse_condition
from training.conversion.transforms import parse_resolution
from training.metrics.metric_table import parse_metrics
from training.posthoc.inputs import parse_kimg, parse_std_list
from training.sharing.convert_network import _read_result
from training.sharing.model_card import CardFacts, _scores
from training.snapshot import parse_name
from training.streaming.remote import RemoteReader, find_file
from training.streaming.streamed import expand_url

Files = dict[str, bytes]

_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "nimg": (parse.parse_nimg, "128Ki"), "bytes": (parse.parse_bytes, "4GB"), "list": (parse.parse_int_list, "1,5-9"),
    "pair": (parse.parse_pair, "0,4095"), "scale": (parse.parse_loss_scale, "auto"), "home": (parse.expand_home, "~"),
    "stds": (parse_std_list, "0.02,0.04,...,0.24"), "kimg": (parse_kimg, "1.536"), "metrics": (parse_metrics, "fid"),
    "condition": (parse_condition, "inpaint:0.1-0.5"), "resolution": (parse_resolution, "64x64"),
    "url": (parse.split_url, "https://host:80/a"), "hub": (parse_hub_url, "hf://user/name@main/file"),
    "shards": (expand_url, "https://host/a-{00..07}.zip"), "name": (parse_name, "net-0001024-0.100.pkl"),
    "half unit": (lambda text: [parse.half_unit(each) for each in NUMBERS.convert(text, None, None)], "2.90"),
}  # fmt: skip
MISSING = "missing/file.pkl"
_GIVEN = ("--net", "--outdir", "--data", "--dest", "--source", "--ref", "--indir", "--outstd")  # whatever else is
_NEVER_RUN = ("explore", "toy_example")  # they would serve or train


# Options.


def option_files() -> Files:
    """An example of every option of every script, and of every parser."""
    files = {"parsers": "\n".join(f"{name}={example}" for name, (_, example) in _PARSERS.items()).encode()}
    for name, command in _commands().items():
        lines = [f"{param.opts[0]}={_example(param)}" for param in _valued(command).values()]
        files[name] = "\n".join(lines).encode()
    return files


def _commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for path in sorted(ROOT.glob("*.py")):
        module = importlib.import_module(path.stem)
        command = getattr(module, "cmdline", None) or getattr(module, path.stem)
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        found |= {" ".join([path.stem, *([name] if name else [])]): each for name, each in inner.items()}
    return found


def _valued(command: click.Command) -> dict[str, click.Parameter]:
    params = [param for param in command.params if isinstance(param, click.Option) and not param.is_flag]
    return {param.opts[0]: param for param in params}


def _is_path(param: click.Parameter) -> bool:
    return isinstance(param.type, click.Path | click.File) or param.type is SOURCE


def _example(param: click.Parameter) -> str:
    if _is_path(param):
        return MISSING
    if param.opts[0] == "--outstd":
        return "0.1"
    if isinstance(param.type, click.Choice):
        return str(param.type.choices[0])
    if isinstance(param.default, str | int | float):
        return str(param.default)
    return "1,2" if param.type.name in ("list", "pair") else "1"


def values_of_options() -> dict[str, list[str]]:
    """What comes of every odd value for every option of every script and every parser, by name."""
    found = {name: [_outcome(parser, value) for value in OPTION_VALUES] for name, (parser, _) in _PARSERS.items()}
    for name, command in _commands().items():
        context = click.Context(command)
        for key, param in _valued(command).items():
            given = [[value] if param.multiple else value for value in OPTION_VALUES]
            found[f"{name} {key}"] = [_outcome(partial(param.type_cast_value, context), value) for value in given]
    return found


def read_options(templates: Files, folder: Path) -> list[str]:
    """Return the kinds of what comes of each line; a ConfigError or click's error counts as refused."""
    outcomes: list[str] = []
    for name, template in templates.items():
        content = (folder / name).read_bytes()
        changed = dict(_pairs(content))
        if name == "parsers":
            outcomes += [_outcome(_PARSERS[key][0], value) for key, value in changed.items() if key in _PARSERS]
            continue
        command = _commands()[name]
        params = _valued(command)
        context = click.Context(command)
        for key, value in changed.items():
            if key in params:
                param = params[key]
                given = [value] if param.multiple else value
                outcomes.append(_outcome(partial(param.type_cast_value, context), given))
        if content != template and name.split()[0] not in _NEVER_RUN:
            # The whole command, which ends at its missing input. Paths stay: / would be read, or written to.
            example = dict(_pairs(template))
            words = [MISSING for param in command.params if isinstance(param, click.Argument)]
            for key, value in changed.items():
                if key in params and (params[key].required or key in _GIVEN or value != example.get(key)):
                    words.append(f"{key}={example[key] if _is_path(params[key]) else value}")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcomes.append(_outcome(partial(command.main, standalone_mode=False), words))
            assert not Path(MISSING).parent.exists(), words
    return outcomes


def _pairs(content: bytes) -> Iterator[tuple[str, str]]:
    for line in os.fsdecode(content).splitlines():
        key, equals, value = line.partition("=")
        if equals:
            yield key, value


def _outcome(action: Callable[[Any], Any], value: Any) -> str:
    try:
        action(value)
        return "taken"
    except (ConfigError, click.ClickException, click.exceptions.Exit, SystemExit):
        return "refused"


# Answers of web servers.

_BODY = b"PK\5\6" + bytes(18) + b"content" * 30
_HEAD = b"HTTP/1.1 %s\r\nServer: x\r\nConnection: close\r\nContent-Type: application/octet-stream\r\n%s\r\n"
_WHOLE = (
    b'Content-Length: %d\r\nETag: "abc"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n'
)
ANSWERS: Files = {
    "whole": _HEAD % (b"200 OK", _WHOLE % len(_BODY)) + _BODY,
    "without length": _HEAD % (b"200 OK", b"Content-Encoding: identity\r\n") + _BODY,
    "chunks": _HEAD % (b"200 OK", b"Transfer-Encoding: chunked\r\n") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    "elsewhere": _HEAD % (b"302 Found", b"Location: /other?x=1\r\nContent-Length: 0\r\n"),
    "busy": _HEAD % (b"503 Service Unavailable", b"Retry-After: 5\r\nContent-Length: 4\r\n") + b"busy",
    "part": _HEAD % (b"206 Partial Content", _WHOLE % len(_BODY) + b"Content-Range: bytes 0-219/220\r\n") + _BODY,
}


class _Answering:
    """A server on the loopback that gives every request the same bytes."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/set.zip"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                request = b""
                while b"\r\n\r\n" not in request and (part := connection.recv(65536)):
                    request += part
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # closing earlier may reset what was sent
                    pass


_servers: list[_Answering] = []


def read_answers(folder: Path) -> dict[str, Any]:
    """Return what a download, a cached download and a stream get from each answer; the intact ones only once."""
    if not _servers:
        _servers.append(_Answering())
    server, found = _servers[0], {}
    real = socket.getaddrinfo

    def only_here(host: Any, *args: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **options)

    quiet = {"NO_PROXY": "*", "no_proxy": "*"}
    with (
        mock.patch.dict(os.environ, quiet),
        mock.patch.object(time, "sleep", lambda seconds: None),
        mock.patch.object(socket, "getaddrinfo", only_here),
    ):
        for name, intact in ANSWERS.items():
            server.answer = (folder / name).read_bytes()
            if server.answer == intact and _intact:
                found[name] = _intact[name]
            else:
                found[name] = [_got(action, server.url, folder) for action in (_download, _cached, _streamed)]
    _intact.update({} if _intact else found)
    return found


_intact: dict[str, Any] = {}


def _download(url: str, folder: Path) -> bytes:
    content: bytes = open_url(url, cache=False, num_attempts=2, verbose=False).read()
    return content


def _cached(url: str, folder: Path) -> bytes:
    with open_url(url, cache_dir=str(folder / "cache"), num_attempts=2, verbose=False) as file:
        return bytes(file.read())


def _streamed(url: str, folder: Path) -> bytes:
    file = find_file(url)
    return RemoteReader(file).read(min(file.size, 1 << 16))


def _got(action: Callable[[str, Path], bytes], url: str, folder: Path) -> bytes | None:
    try:
        return action(url, folder)
    except ConfigError as error:
        assert str(error).isprintable(), str(error)
        return None


# Records of runs and of results.


def run_files(scratch: Path) -> Files:
    """The folder of a run that report.py shows."""
    folder = write_run(scratch / "report")
    for grid in sorted(folder.glob("samples-*.png"))[2:]:
        grid.unlink()
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def read_report(folder: Path) -> list[Any]:
    """Return the page of a run's report with its commands; curves, which take a second, in the long suite only."""
    record = read_run(folder)
    drawn = os.environ.get("EDM2_FAULTS") == "long"
    with contextlib.nullcontext() if drawn else mock.patch.object(document, "svg", lambda *args, **options: ""):
        return [document.render(record, now=NOW), commands_for(record)]


RESULT = json.dumps(
    {"results": {"fid": {"minimum": 2.5, "mean": 2.6, "std": 0.1}}, "num_images": 50_000, "command": "python x.py"}
).encode()
VERSION = json.dumps({"validator": '"abc"', "length": 1234}).encode()


def read_results(path: Path) -> str:
    """Return the table of a model card."""
    snapshot: Any = SimpleNamespace(info={})
    return _scores(snapshot, CardFacts(results=(_read_result(path),)))


def read_version(path: Path) -> Version:
    """Return the version that a download left."""
    return Version.load(path)
