"""Hostile files end in one clear error at every door: nothing of them runs, and memory stays bounded by their size."""

import copyreg
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnnlib.download import open_url
from dnnlib.errors import ConfigError
from tests.helpers.hostile import corpus, record_running
from tests.helpers.hostile_headers import hostile_headers
from tests.helpers.paths import GOLDEN_DIR
from torch_utils import persistence
from training.metrics.reference import load_stats, save_stats
from training.networks_edm2 import Precond
from training.snapshot import Snapshot, load_snapshot, read_header, save_snapshot
from training.toy.model import ToyModel
from training.toy.toy_files import load_toy_model, save_toy_model

KINDS = list(corpus("x"))
DOORS: dict[str, Callable[[str], Any]] = {
    "network": load_snapshot,
    "header": read_header,
    "toy network": load_toy_model,
    "statistics": load_stats,
}


@pytest.fixture(scope="module", autouse=True)
def _everything_imported() -> None:
    """Use each reader once, because imports on first use are not the work of a hostile file."""
    golden = GOLDEN_DIR
    load_snapshot(golden / "snapshots" / "rgb-cond.pkl")
    load_stats(golden / "dataset-ref.pkl")
    load_toy_model(golden / "snapshots" / "toy.pkl")


def refused(open_file: Callable[[str], Any], source: str) -> str:
    """The message with which a file is refused; it is one printable line, names the file, and nothing ran."""
    with record_running() as ran, pytest.raises(ConfigError) as caught:
        open_file(source)
    message = str(caught.value)
    assert ran == [] and message.isprintable() and source in message and len(message) < len(source) + 600, message
    return message


def reset_peak() -> int:
    """The process's memory in kB, from which `peak_kb` is measured; 0 where the system cannot tell."""
    if sys.platform != "linux":
        return 0
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS:")


def peak_kb() -> int:
    return _status("VmHWM:") if sys.platform == "linux" else 0


def _status(entry: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(entry)).split()[1])


def test_the_corpus_has_many_kinds() -> None:
    # Variants of a kind differ in the function that is called, and in how it is named.
    families = {kind.partition(" of ")[0] if " by " in kind or "INST" in kind else kind for kind in KINDS}
    families = {"global" if kind.startswith("global ") else kind for kind in families}
    print(f"{len(families)} kinds of hostile pickles, {len(KINDS)} files; {len(headers())} hostile headers")
    assert len(families) >= 120 and len(KINDS) >= 250


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the corpus would write if any of it ran."""
    return tmp_path_factory.mktemp("marked") / "ran"


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_refused_at_every_door_and_runs_nothing(kind: str, marker: Path, tmp_path: Path) -> None:
    """Memory grows by at most 16 MiB, 8 bytes for each of the file, and 256 for each of the first 600,000."""
    path = tmp_path / "file.pkl"
    content = corpus(str(marker))[kind]
    path.write_bytes(content)
    before = reset_peak()
    refused(load_snapshot, str(path))
    bound_kb = (16 << 10) + (8 * len(content) + 256 * min(len(content), 600_000)) // 1024
    assert peak_kb() - before < bound_kb
    for door in ("header", "toy network", "statistics") if len(content) < 20_000 else ():
        refused(DOORS[door], str(path))
    assert os.listdir(tmp_path) == ["file.pkl"] and not marker.exists()


def test_the_corpus_would_run_in_an_ordinary_unpickler(marker: Path) -> None:
    """The record of what runs sees it, too."""
    kinds = [f"{code} of os system by GLOBAL" for code in ("REDUCE", "OBJ")] + ["INST of os system"]
    kinds += ["REDUCE of builtins eval by GLOBAL", "getattr chain to os.system", "array of objects", "protocol 0"]
    for kind in kinds:
        assert not marker.exists()
        with record_running() as ran:
            pickle.loads(corpus(str(marker))[kind])
        assert marker.exists() and any("pickle.find_class" in event for event in ran), kind
        assert len(ran) > 1, kind
        marker.unlink()


def test_registered_extension_codes_are_refused(marker: Path, tmp_path: Path) -> None:
    module, path = os.system.__module__, tmp_path / "file.pkl"
    copyreg.add_extension(module, "system", 0xF0)
    try:
        for size in ("one byte", "two bytes", "four bytes"):
            content = corpus(str(marker))[f"extension code of {size}"]
            pickle.loads(content)
            assert marker.exists()
            marker.unlink()
            path.write_bytes(content)
            assert "EXT" in refused(load_snapshot, str(path)) and not marker.exists()
    finally:
        copyreg.remove_extension(module, "system", 0xF0)


def test_the_error_names_the_offending_global(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    for kind, name in [
        ("INST of os system", "INST"),
        ("NEWOBJ_EX of os system by GLOBAL", "'os.system'"),
        ("payload with a call, torch.save", "'__builtin__.eval'"),
        ("payload in a payload, six deep", "in 'torch.storage._load_from_bytes': it refers to 'torch.storage._load"),
        ("the same as a network file", "'Network'"),
        ("masked array", "'numpy.ma.core._mareconstruct'"),
    ]:
        path.write_bytes(corpus("x")[kind])
        assert name in refused(load_snapshot, str(path)), kind


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server of the folder tmp_path/files."""
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "files"), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}"
        (tmp_path / "files" / "first").write_bytes(b"any")
        open_url(f"{url}/first", num_attempts=1).close()  # what a download imports at its first use does not count
        yield url
        http.shutdown()


@pytest.mark.parametrize("door", ["network", "toy network", "statistics"])
def test_downloads_go_through_the_same_door(door: str, server: str, marker: Path, tmp_path: Path) -> None:
    files = corpus(str(marker))
    for number, kind in enumerate([*KINDS[::11], "a module source that writes a file", "zip bomb as payload"]):
        (tmp_path / "files" / f"{number}.pkl").write_bytes(files[kind] or b"\x80")
        for _ in range(2):  # downloaded, then from the cache
            refused(DOORS[door], f"{server}/{number}.pkl")
    assert not marker.exists()


def test_embedded_source_that_writes_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are right in all else: they open, with our classes, or are refused for a class that is not ours."""
    marker, path = tmp_path / "ran", tmp_path / "file.pkl"
    source = f"open({str(marker)!r}, 'w')\n"
    for cls in list(persistence._sources):
        monkeypatch.setitem(persistence._sources, cls, source)
    for save, open_file in [(small_network, load_snapshot), (small_toy, load_toy_model)]:
        save(path)
        assert source.encode() in path.read_bytes()
        with record_running() as ran:
            open_file(str(path))
        assert ran == []
    path.write_bytes(pickle.dumps(Stranger()))
    assert "'Stranger'" in refused(load_snapshot, str(path)) and "'Stranger'" in refused(load_toy_model, str(path))
    assert not marker.exists()


@persistence.persistent_class
class Stranger(torch.nn.Module):
    """Not one of ours."""


def small_network(path: Path) -> None:
    net = Precond(4, 1, 0, model_channels=2, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=2)
    save_snapshot(Snapshot(net=net), path)


def small_toy(path: Path) -> None:
    save_toy_model(ToyModel(num_layers=1, hidden_dim=2), path)


def small_stats(path: Path) -> None:
    save_stats({"num_images": 9, "fid": {"mu": np.ones(2), "sigma": np.eye(2)}}, path)


SMALL = {
    "network": (small_network, load_snapshot),
    "toy network": (small_toy, load_toy_model),
    "statistics": (small_stats, load_stats),
}


@pytest.fixture
def without_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without the source text, which is longer than all the rest."""
    for cls in list(persistence._sources):
        monkeypatch.setitem(persistence._sources, cls, "pass")


@pytest.mark.usefixtures("without_source")
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
@pytest.mark.parametrize("door", SMALL)
def test_every_truncation_is_refused(door: str, suffix: str, tmp_path: Path) -> None:
    save, open_file = SMALL[door]
    path = tmp_path / f"file{suffix}"
    save(path)
    content = path.read_bytes()
    assert len(content) < 40_000
    for length in range(0, len(content), 1 if len(content) < 1500 else 7 if len(content) < 5000 else 97):
        path.write_bytes(content[:length])
        refused(open_file, str(path))


@pytest.mark.usefixtures("without_source")
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
@pytest.mark.parametrize("door", SMALL)
def test_flipped_bits_give_data_or_one_error(door: str, suffix: str, tmp_path: Path) -> None:
    save, open_file = SMALL[door]
    path = tmp_path / f"file{suffix}"
    save(path)
    content, generator, outcomes = path.read_bytes(), random.Random(0), set()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with record_running() as ran:
            try:
                open_file(str(path))
                outcomes.add("data")
            except ConfigError as error:
                assert str(error).isprintable() and str(path) in str(error)
                outcomes.add("error")
        assert ran == []
    assert "error" in outcomes


def test_tensors_cannot_multiply_their_bytes(tmp_path: Path) -> None:
    """Many names of one tensor, each of which would be copied; in a real network each has a storage of its own."""
    small_network(path := tmp_path / "file.pkl")
    net = load_snapshot(path).net
    shared = net.unet.out_conv.weight
    for number in range(100):
        net.unet.register_buffer(f"copy{number}", shared)
    path.write_bytes(pickle.dumps({"ema": net}))
    assert "share their memory" in refused(load_snapshot, str(path))


@cache
def headers() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        small_network(path := Path(folder) / "net.safetensors")
        return hostile_headers(path.read_bytes())


@pytest.mark.parametrize("kind", list(headers()))
def test_a_hostile_header_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(headers()[kind])
    messages = [refused(open_file, str(path)) for open_file in DOORS.values()]
    assert "toy" in messages[2] or "damaged" in messages[2] or "edm2" in messages[2], messages[2]


def test_a_toy_network_and_statistics_with_hostile_headers_are_refused(tmp_path: Path) -> None:
    for save, open_file in (SMALL["toy network"], SMALL["statistics"]):
        save(path := tmp_path / "file.safetensors")
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        for change in ({"dtype": "O"}, {"shape": [2**40, 2**40]}, {"data_offsets": [0, 2**40]}, {"dtype": "I8"}):
            header = json.loads(content[8:end])
            next(entry for name, entry in header.items() if name != "__metadata__").update(change)
            packed = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[end:])
            refused(open_file, str(path))
