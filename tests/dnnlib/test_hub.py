"""Networks by their name on the hub: the real huggingface_hub against a server on loopback."""

import os
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch

from dnnlib import hub
from dnnlib.errors import ConfigError
from dnnlib.hub import HubName
from dnnlib.util import open_url
from tests.helpers.fake_hub import FakeHub, commit_of, serve_hub, use_hub
from tests.helpers.paths import GOLDEN_DIR, ROOT
from training.dataset.latents import vae_geometry
from training.encoders import StabilityVAEEncoder
from training.sharing.write_folder import save_folder
from training.snapshot import load_snapshot, read_header
from training.snapshot.locate import locate_network

PICKLE = GOLDEN_DIR / "snapshots" / "run" / "network-snapshot-0008388-0.050.pkl"
OTHER = GOLDEN_DIR / "snapshots" / "run" / "network-snapshot-0016777-0.050.pkl"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.chdir(tmp_path)
    with serve_hub(tmp_path / "cache", monkeypatch) as running:
        yield running


def message(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_snapshot(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://jo/net", HubName(repo="jo/net")),
        ("hf://jo/net/", HubName(repo="jo/net")),
        ("HF://jo/net@v1.0/a/b.pkl", HubName(repo="jo/net", revision="v1.0", file="a/b.pkl")),
        ("hf://jo/edm2-0.5@refs%2Fpr%2F1/x", HubName(repo="jo/edm2-0.5", revision="refs/pr/1", file="x")),
    ],
)
def test_names_are_taken_apart(text: str, name: HubName) -> None:
    assert hub.parse_hub_url(text) == name


@pytest.mark.parametrize("text", ["hf://", "hf://jo", "hf:///net", "hf://jo/net@/x", "hf://jo/net/../x", "hf://-/net"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write hf://user/name"):
        hub.parse_hub_url(text)


@pytest.mark.parametrize(
    "text", ["net", "a/b/c", "/a/b", "./a", "../a", "a/", "jo/net/x.pkl", r"a\b", "C:/net", "jo/n t"]
)
def test_paths_are_no_repositories(text: str) -> None:
    assert hub.parse_repository(text) is None


def test_a_file_is_downloaded_once_into_the_librarys_own_cache(server: FakeHub, tmp_path: Path) -> None:
    commit = server.add("jo/net", {"nets/" + PICKLE.name: PICKLE, "README.md": b""})
    source = f"hf://jo/net/nets/{PICKLE.name}"
    snapshot = load_snapshot(source)
    # Count and length come from the file's name, as they do for local files.
    assert (snapshot.nimg, snapshot.ema_std) == (8388608, 0.05)
    cached = tmp_path / "cache" / "models--jo--net" / "snapshots" / commit / "nets" / PICKLE.name
    assert cached.read_bytes() == PICKLE.read_bytes()
    assert read_header(source).nimg == 8388608 and open_url(source, return_filename=True) == str(cached)
    assert sum(request.startswith("GET") for request in server.requests) == 1


def test_a_repository_stands_for_its_only_network(server: FakeHub) -> None:
    server.add("jo/net", {"README.md": b"", PICKLE.name: PICKLE})
    for source in ("jo/net", "hf://jo/net", "jo/net@main"):
        assert load_snapshot(source).nimg == 8388608


def test_safetensors_come_before_a_pickle_of_the_same_name(server: FakeHub) -> None:
    server.add("jo/net", {"net.pkl": b"never read", "net.safetensors": ROOT / "models" / "fashion.safetensors"})
    assert load_snapshot("jo/net").nimg == 163840
    assert not any("net.pkl" in request for request in server.requests)


def test_a_repository_may_be_a_model_folder(server: FakeHub, tmp_path: Path) -> None:
    save_folder(load_snapshot(PICKLE), tmp_path / "model")
    server.add_folder("jo/model", tmp_path / "model")
    snapshot = load_snapshot("jo/model")
    assert (snapshot.nimg, snapshot.ema_std) == (8388608, 0.05)
    assert not any("README" in request for request in server.requests)


def test_a_revision_is_pinned(server: FakeHub) -> None:
    first = server.add("jo/net", {"net.pkl": PICKLE}, revision="v1")
    server.add("jo/net", {"net.pkl": OTHER})
    names = ["hf://jo/net@v1/net.pkl", f"hf://jo/net@{first}/net.pkl", "jo/net@v1", f"jo/net@{first}"]
    assert {locate_network(name).read_bytes() for name in names} == {PICKLE.read_bytes()}
    assert locate_network("hf://jo/net/net.pkl").read_bytes() == OTHER.read_bytes()


def test_a_branch_that_moves_is_noticed(server: FakeHub) -> None:
    for file in (PICKLE, OTHER):
        server.add("jo/net", {"net.pkl": file})
        assert locate_network("jo/net").read_bytes() == file.read_bytes()


def test_a_local_path_comes_first(server: FakeHub, tmp_path: Path) -> None:
    server.add("jo/net", {"net.pkl": OTHER})
    (tmp_path / "jo").mkdir()
    save_folder(load_snapshot(PICKLE), tmp_path / "jo" / "net")
    assert locate_network("jo/net") == Path("jo/net") and load_snapshot("jo/net").nimg == 8388608
    assert server.requests == []


def test_without_a_connection_the_cache_serves(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("jo/net", {PICKLE.name: PICKLE})
    load_snapshot("jo/net")
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in ("jo/net", f"hf://jo/net/{PICKLE.name}"):
        assert load_snapshot(source).nimg == 8388608
    assert len(server.requests) == asked
    told = message("jo/other")
    assert "HF_HUB_OFFLINE is set" in told and "'jo/other' does not exist here" in told
    assert "HF_HUB_OFFLINE is set" in message("hf://jo/net/other.pkl")


def test_a_hub_that_is_not_there_leaves_the_cache(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("jo/net", {PICKLE.name: PICKLE})
    load_snapshot("jo/net")
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)  # the discard port: nothing listens
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts that the library makes
    assert load_snapshot("jo/net").nimg == 8388608
    assert "cannot be downloaded from http://127.0.0.1:9" in message("hf://jo/other/x.pkl")
    assert "cannot be downloaded from http://127.0.0.1:9" in message("jo/other")


def test_mistakes_are_told_in_one_line(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("jo/net", {"a.pkl": PICKLE, "b.safetensors": b""})
    server.add("jo/empty", {"README.md": b"", "unet/config.json": b"{}"})
    server.add("jo/gated", {"net.pkl": PICKLE})
    server.gated.add("jo/gated")
    assert "no model repository jo/nothing at http://127.0.0.1" in message("jo/nothing")
    assert "no model repository jo/nothing at http://127.0.0.1" in message("hf://jo/nothing/x.pkl")
    assert "has 2 network files (b.safetensors, a.pkl); name one, as in hf://jo/net/b.safetensors" in message("jo/net")
    assert "has neither a model folder of this kind nor" in message("hf://jo/empty")
    assert "jo/net has no file x.pkl" in message("hf://jo/net/x.pkl")
    assert "jo/net has no revision 'v7'" in message("hf://jo/net@v7/a.pkl")
    assert "jo/net has no revision 'v7'" in message("jo/net@v7")
    assert "accept its terms" in message("hf://jo/gated/net.pkl")
    assert "neither a pickle nor" in message("hf://jo/net/b.safetensors")
    assert "does not exist" in message("jo/net.pkl")
    with pytest.raises(ConfigError, match="is a repository; name one of its files: hf://jo/net/FILE"):
        open_url("hf://jo/net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for source in ("jo/net", "hf://jo/net/a.pkl"):
        assert 'pip install "edm2[hub]"' in message(source)


def test_names_in_the_cache_cannot_lead_out_of_it(server: FakeHub) -> None:
    assert "does not name a file within a repository" in message("hf://jo/net/../../x")
    assert hub._cached_files(hub._library(HubName(repo="jo/net")), HubName(repo="jo/net", revision="../../..")) == []


def test_a_script_takes_a_name_and_the_librarys_variables(server: FakeHub, tmp_path: Path) -> None:
    save_folder(load_snapshot(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"), tmp_path / "model")
    commit = server.add_folder("jo/model", tmp_path / "model")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "other")}
    command = [sys.executable, str(ROOT / "convert_snapshot.py"), f"jo/model@{commit}", "--outdir=out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("Wrote ")
    assert load_snapshot("out/model.safetensors").net.label_dim > 0
    assert (tmp_path / "other" / "models--jo--model" / "snapshots" / commit).is_dir()
    assert commit == commit_of(server.repositories["jo/model"]["main"])


def test_no_network_is_said_soon_and_named(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file, and by the VAE of latents, whose library blames a missing file."""
    lookups: list[str] = []

    def lookup(name: str, *args: object, **options: object) -> None:
        lookups.append(name)
        raise socket.gaierror(-2, "Name or service not known")

    use_hub("https://nohost.invalid", tmp_path / "other", monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert "Name or service not known; check the network connection" in message("hf://jo/net/x.pkl")
    assert len(lookups) == 3 and sum(waits) < 5
    # The library is never asked.
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=None))
    for ask in (vae_geometry, lambda name: StabilityVAEEncoder(vae_name=name).init(torch.device("cpu"))):
        with pytest.raises(ConfigError, match="Name or service not known"):
            ask("jo/vae")
    assert len(lookups) == 9
