"""Source code in files runs only where the caller trusts it, who is told of it before."""

import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dnnlib.cli
import generate_images
from dnnlib import EasyDict
from dnnlib.errors import ConfigError
from torch_utils import persistence
from training.encoders import StandardRGBEncoder
from training.networks_edm2 import Block, Precond
from training.snapshot import load_snapshot, read_header
from training.snapshot.code import EmbeddedCode

SOURCE = """
import numpy as np
import torch
from torch_utils import persistence

with open({marker!r}, "a") as file:
    file.write("ran ")

@persistence.persistent_class
class Custom(torch.nn.Module):
    def __init__(self, width, inner=None):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.sigma_data = 4, 3, 0, 0.5
        self.dtype, self.scale = torch.float32, np.float64(width)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, 3))
        self.inner = inner
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x, sigma, class_labels=None, **kwargs):
        x = self.layers(x.to(self.dtype).movedim(1, -1)) * self.scale + self.shift
        return x.movedim(-1, 1)
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the source writes to whenever it runs."""
    return tmp_path / "ran"


@pytest.fixture
def module(tmp_path: Path, marker: Path) -> Iterator[Any]:
    """A module of someone else."""
    path = tmp_path / "someones_networks.py"
    path.write_text(SOURCE.format(marker=str(marker)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("someones_networks", path)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules["someones_networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["someones_networks"]


def write(path: Path, net: Any) -> Path:
    path.write_bytes(pickle.dumps(EasyDict(encoder=StandardRGBEncoder(), ema=net)))
    return path


@pytest.fixture
def path(module: Any, marker: Path, tmp_path: Path) -> Path:
    """A network file of the module's class; the marker is not there yet."""
    torch.manual_seed(0)
    result = write(tmp_path / "custom.pkl", module.Custom(5))
    marker.unlink()
    return result


def test_the_default_is_a_refusal_that_names_the_class(path: Path, marker: Path) -> None:
    for open_file in (load_snapshot, read_header):
        with pytest.raises(ConfigError, match=r"custom\.pkl: .*'Custom'.*Precond.*--trust-code"):
            open_file(path)
    assert not marker.exists()


def test_with_trust_the_network_is_what_was_written(path: Path, marker: Path, module: Any) -> None:
    told: list[EmbeddedCode] = []

    def trust(code: EmbeddedCode) -> None:
        assert not marker.exists()
        told.append(code)

    snapshot = load_snapshot(path, trust)
    torch.manual_seed(0)
    original, x = module.Custom(5), torch.randn(2, 3, 4, 4)
    assert torch.equal(snapshot.net(x, 1.0), original(x, 1.0))
    assert snapshot.net.state_dict().keys() == original.state_dict().keys()
    assert not snapshot.net.training and [p.requires_grad for p in snapshot.net.parameters()] == [False] * 4
    assert type(snapshot.net) is not module.Custom and type(snapshot.encoder) is StandardRGBEncoder
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert told == [EmbeddedCode(class_names=("Custom",), source=source)]
    assert told[0].sha256 == hashlib.sha256(source.encode()).hexdigest() and told[0].num_lines == source.count("\n")


def test_who_is_told_may_refuse(path: Path, marker: Path) -> None:
    def refuse(code: EmbeddedCode) -> None:
        raise ConfigError("not this one")

    with pytest.raises(ConfigError, match="not this one"):
        load_snapshot(path, refuse)
    assert not marker.exists()


def test_our_classes_keep_to_our_code(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(4, 4, 2, channels_per_head=4)
    for cls in (Block, Precond):
        monkeypatch.setitem(persistence._sources, cls, "raise RuntimeError('ran')")
    told: list[EmbeddedCode] = []
    net: Any = load_snapshot(write(tmp_path / "a.pkl", module.Custom(5, block)), told.append).net
    assert type(net.inner) is Block and [code.class_names for code in told] == [("Custom",)]
    own = Precond(4, 1, 0, model_channels=2, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=2)
    assert type(load_snapshot(write(tmp_path / "b.pkl", own), told.append).net) is Precond
    assert len(told) == 1


def test_everything_else_stays_closed(path: Path, marker: Path, module: Any) -> None:
    net = module.Custom(5)
    net.call = print
    with pytest.raises(ConfigError, match=r"builtins\.print"):
        load_snapshot(write(path, net), lambda code: None)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise ValueError('a\\x1bb')", "ValueError: a[?]b"),
        ("import missing_module", "missing_module"),
        ("a b", "Syntax"),
    ],
)
def test_source_that_fails_is_one_line(
    line: str, message: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(persistence._sources, module.Custom, line)
    with pytest.raises(ConfigError, match=message) as caught:
        load_snapshot(write(tmp_path / "custom.pkl", module.Custom(5)), lambda code: None)
    assert "custom.pkl: its embedded source fails" in str(caught.value) and str(caught.value).isprintable()


def test_the_script_says_what_it_runs(
    path: Path, marker: Path, module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"--net={path}", f"--outdir={tmp_path / 'out'}", "--seeds=0-1", "--steps=2", "--device=cpu"]
    with pytest.raises(SystemExit) as end:
        dnnlib.cli.main(generate_images.cmdline, args)
    assert end.value.code == 2 and "--trust-code" in capsys.readouterr().err and not marker.exists()
    generate_images.cmdline.main([*args, "--trust-code"], standalone_mode=False)
    digest = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    assert f"lines of source code from the file, sha256 {digest}, for Custom\n" in capsys.readouterr().out
    assert marker.exists() and len(list((tmp_path / "out").glob("*.png"))) == 2
