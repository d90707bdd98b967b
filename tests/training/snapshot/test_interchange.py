"""Everything that is published opens, from a path and from a URL, whichever versions of NumPy and torch wrote it."""

import io
import pickle
import pickletools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnnlib import EasyDict
from tests.helpers.paths import GOLDEN_DIR
from torch_utils.pickles.safe_pickle import read_pickle
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.loss import EDM2Loss
from training.metrics.reference import load_stats
from training.snapshot import Snapshot, load_snapshot
from training.snapshot.pickle_file import flatten
from training.toy.toy_files import load_toy_model

GOLDEN = GOLDEN_DIR
NETWORKS = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("snapshots/**/*.pkl"))
NETWORKS.remove("snapshots/toy.pkl")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server of tests/golden."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(GOLDEN), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.fixture(params=["path", "URL"])
def place(
    request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Where to find a golden file."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    return (lambda name: f"{server}/{name}") if request.param == "URL" else (lambda name: str(GOLDEN / name))


def assert_holds(net: torch.nn.Module, stored: Any) -> None:
    """The network has the file's tensors, all of them and no others."""
    state, tensors = net.state_dict(), flatten(stored)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name].to(value.dtype)) for name, value in state.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_network_opens(name: str, place: Callable[[str], str]) -> None:
    tree = read_pickle(GOLDEN / name)
    snapshot = load_snapshot(place(name))
    assert_holds(snapshot.net, tree["ema"])
    assert type(snapshot.encoder).__name__ == tree["encoder"].class_name
    assert isinstance(snapshot.loss_fn, EDM2Loss)
    for key in ("P_mean", "P_std", "sigma_data"):
        assert getattr(snapshot.loss_fn, key) == tree["loss_fn"].state[key]
    assert (snapshot.nimg is None) == ("run/" not in name) == (snapshot.ema_std is None)
    assert isinstance(snapshot.encoder, StabilityVAEEncoder if "latent" in name else StandardRGBEncoder)


def test_the_published_toy_model_opens(place: Callable[[str], str]) -> None:
    net = load_toy_model(place("snapshots/toy.pkl"))
    assert_holds(net, read_pickle(GOLDEN / "snapshots/toy.pkl"))
    assert net(torch.zeros(3, 2), torch.tensor(1.0)).shape == (3,)


def test_published_statistics_open(place: Callable[[str], str]) -> None:
    stats = load_stats(place("dataset-ref.pkl"))
    assert stats["num_images"] == 50000
    with open(GOLDEN / "dataset-ref.pkl", "rb") as file:
        expected = pickle.load(file)  # it holds NumPy arrays and nothing else
    for name in ("fid", "fd_dinov2"):
        for key in ("mu", "sigma"):
            assert stats[name][key].dtype == np.float64
            np.testing.assert_array_equal(stats[name][key], expected[name][key])


def respelled(content: bytes, core: str) -> bytes:
    """The pickle `content` as written by NumPy 1 (core 'core') or 2 ('_core')."""
    frames = [(position, 9) for opcode, _, position in pickletools.genops(content) if opcode.name == "FRAME"]
    for position, length in reversed(frames):  # they tell lengths, which change
        content = content[: position or 0] + content[(position or 0) + length :]
    for module in ("multiarray", "numeric"):
        new = f"numpy.{core}.{module}".encode()
        for old in (f"numpy.core.{module}".encode(), f"numpy._core.{module}".encode()):
            # As protocols 2 and 3 have it, then 4 and 5.
            content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            content = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    return content


@pytest.mark.parametrize("core", ["core", "_core"])
def test_files_of_either_numpy_open(core: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(respelled((GOLDEN / "dataset-ref.pkl").read_bytes(), core))
    assert f"numpy.{core}.".encode() in path.read_bytes()
    expected = load_stats(GOLDEN / "dataset-ref.pkl")
    np.testing.assert_array_equal(load_stats(path)["fid"]["sigma"], expected["fid"]["sigma"])
    for name in ("snapshots/latent-cond.pkl", "snapshots/rgb-cond.pkl"):
        content = (GOLDEN / name).read_bytes()
        path.write_bytes(respelled(content, core))
        assert_holds(load_snapshot(path).net, read_pickle(GOLDEN / name)["ema"])


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_statistics_of_any_protocol_and_numpy_open(protocol: int, core: str, tmp_path: Path) -> None:
    stats = {"num_images": np.int64(7), "fid": {"mu": np.arange(3.0), "sigma": np.asfortranarray(np.eye(3))}}
    path = tmp_path / "file.pkl"
    path.write_bytes(respelled(pickle.dumps(stats, protocol), core))
    loaded = load_stats(path)
    assert loaded["num_images"] == 7 and np.array_equal(loaded["fid"]["sigma"], np.eye(3))


def zip_storage(storage: Any) -> Any:
    """How a storage would be pickled with torch.save's ZIP form."""
    buffer = io.BytesIO()
    torch.save(storage, buffer, _use_new_zipfile_serialization=True)
    return torch.storage._load_from_bytes, (buffer.getvalue(),)


def content_of(snapshot: Snapshot) -> EasyDict:
    return EasyDict(encoder=snapshot.encoder, dataset_kwargs=EasyDict(a=1), loss_fn=snapshot.loss_fn, ema=snapshot.net)


@pytest.mark.parametrize("form", ["older", "zip", "cuda"])
@pytest.mark.parametrize("parameters", ["plain", "with state", "channels last", "bfloat16"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_tensors_of_any_protocol_and_form_open(
    protocol: int, parameters: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = load_snapshot(GOLDEN / "snapshots/rgb-cond-guide.pkl")
    if form == "zip":
        for cls in (torch.TypedStorage, torch.UntypedStorage):
            monkeypatch.setattr(cls, "__reduce__", zip_storage)
    elif form == "cuda":
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    if parameters == "with state":
        for parameter in snapshot.net.parameters():
            parameter.note = "mine"  # type: ignore[attr-defined]
    elif parameters == "channels last":
        snapshot.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif parameters == "bfloat16":
        snapshot.net.bfloat16()
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(content_of(snapshot), protocol))
    content = path.read_bytes()
    assert (b"PK\x03\x04" in content or protocol == 2) == (form == "zip" or protocol == 2)
    assert (b"_rebuild_parameter_with_state" in content) == (parameters == "with state")
    again, state = load_snapshot(path).net.state_dict(), snapshot.net.state_dict()
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in again.items())
    assert again.keys() == state.keys() and all(value.is_contiguous() for value in again.values())
