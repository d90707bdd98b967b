"""Network files: published ones open without running their source, ours open in the published reader."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnnlib import EasyDict
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR, ROOT
from torch_utils.pickles.safe_pickle import read_pickle
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.loss import EDM2Loss
from training.networks_edm2 import Precond
from training.sharing.convert_network import convert_snapshots
from training.snapshot import (
    Snapshot,
    load_snapshot,
    name_of_nimg,
    nimg_from_kimg,
    nimg_from_name,
    parse_name,
    read_header,
    save_snapshot,
)
from training.snapshot.pickle_file import flatten

GOLDEN = GOLDEN_DIR / "snapshots"
NETWORKS = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.pkl") if path.name != "toy.pkl")
KWARGS: dict[str, Any] = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
KWARGS["channels_per_head"] = 8
SUFFIXES = [".pkl", ".safetensors"]


def make_snapshot(**changes: Any) -> Snapshot:
    torch.manual_seed(0)
    net = Precond((8, 16), 4, 3, sigma_data=0.4, **KWARGS)
    torch.nn.init.constant_(net.unet.out_gain, 0.8)
    defaults = dict(
        net=net.requires_grad_(False),
        encoder=StabilityVAEEncoder(raw_mean=[1, 2, 3, 4]),
        dataset_kwargs={"path": "data/img.zip", "use_labels": True},
        loss_fn=EDM2Loss(P_mean=-0.8),
        nimg=12345,
        ema_std=0.075,
        info={"preset": "tiny", "batch": 64},
    )
    return Snapshot(**(defaults | changes))


def run(net: Precond, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(inputs["x"], inputs["sigma"], inputs["labels"], force_fp32=True)


@pytest.fixture
def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4, 8, 16, generator=generator),
        "sigma": torch.tensor([0.3, 5.0]),
        "labels": torch.eye(3)[:2],
        "raw": torch.rand(2, 8, 8, 16, generator=generator),
        "eps": [torch.randn(2, 4, 8, 16, generator=generator)],
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_snapshot_opens_with_its_own_values(name: str) -> None:
    snapshot = load_snapshot(GOLDEN / name)
    stored = read_pickle(GOLDEN / name)["ema"]
    state = snapshot.net.state_dict()
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(flatten(stored), torch.float16)
    assert all(torch.equal(value, state[name]) for name, value in flatten(stored).items())
    assert not snapshot.net.training and not any(p.requires_grad for p in snapshot.net.parameters())
    for key in ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data"):
        assert getattr(snapshot.net, key) == stored.state[key]
    x = torch.randn(1, snapshot.net.img_channels, snapshot.net.img_resolution, snapshot.net.img_resolution)
    with torch.no_grad():
        assert snapshot.net(x, torch.tensor(1.0)).isfinite().all()
    assert snapshot.info == {}


def test_encoder_loss_and_data_set_come_along() -> None:
    snapshot = load_snapshot(GOLDEN / "latent-cond.pkl")
    assert type(snapshot.encoder) is StabilityVAEEncoder and type(snapshot.loss_fn) is EDM2Loss
    stored = read_pickle(GOLDEN / "latent-cond.pkl")["encoder"].state
    np.testing.assert_allclose(snapshot.encoder.scale, stored["scale"], rtol=1e-7)
    np.testing.assert_allclose(snapshot.encoder.bias, stored["bias"], rtol=1e-7)
    assert (snapshot.loss_fn.P_mean, snapshot.loss_fn.P_std) == (-0.8, 1.6)
    assert type(load_snapshot(GOLDEN / "rgb-cond.pkl").encoder) is StandardRGBEncoder
    assert snapshot.dataset_kwargs == {
        "class_name": "training.dataset.ImageFolderDataset", "path": "datasets/img.zip", "use_labels": True,
    }  # fmt: skip


def test_count_and_length_come_from_the_name() -> None:
    snapshot = load_snapshot(GOLDEN / "run/network-snapshot-0008388-0.050.pkl")
    assert (snapshot.nimg, snapshot.ema_std) == (8388608, 0.05)
    assert load_snapshot(GOLDEN / "rgb-cond.pkl").nimg is None
    assert parse_name("https://host/dir/edm2-img512-xs-2147483-0.135.pkl") == (2147483648, 0.135)
    assert parse_name("network-snapshot-0008388.pkl") is None


def test_kimg_gives_back_every_count_that_training_writes() -> None:
    published = {2147483: 2147483648, 134217: 134217728, 33554: 33554432, 1: 1024, 8388: 8388608, 939524: 939524096}
    assert {kimg: nimg_from_kimg(kimg) for kimg in published} == published
    for kimg in range(2000):
        wanted = [n for n in range(kimg * 1000, (kimg + 1) * 1000) if n % 1024 == 0]
        assert nimg_from_kimg(kimg) == (wanted[0] if wanted else kimg * 1000)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_written_snapshot_comes_back(suffix: str, tmp_path: Path, inputs: dict[str, Any]) -> None:
    snapshot = make_snapshot()
    path = tmp_path / f"network-snapshot-0000012-0.075{suffix}"
    save_snapshot(snapshot, path)
    again = load_snapshot(path)
    half = copy.deepcopy(snapshot.net).half().eval()
    assert torch.equal(run(again.net, **inputs), run(half, **inputs))
    assert again.net.img_resolution == [8, 16] and again.net.sigma_data == 0.4
    assert isinstance(again.encoder, StabilityVAEEncoder) and isinstance(again.loss_fn, EDM2Loss)
    assert snapshot.encoder is not None and again.encoder.bias == snapshot.encoder.bias  # type: ignore[attr-defined]
    assert again.dataset_kwargs == snapshot.dataset_kwargs and again.loss_fn.P_mean == -0.8
    assert again.ema_std == 0.075
    assert again.nimg == 12345 and again.info == snapshot.info
    assert snapshot.net.training and next(snapshot.net.parameters()).dtype == torch.float32
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_content_tells_the_format_and_fields_may_be_missing(suffix: str, tmp_path: Path) -> None:
    snapshot = Snapshot(net=make_snapshot().net)
    save_snapshot(snapshot, tmp_path / f"net{suffix}")
    again = load_snapshot((tmp_path / f"net{suffix}").rename(tmp_path / "renamed.bin"))
    assert (again.encoder, again.dataset_kwargs, again.loss_fn, again.nimg, again.ema_std) == (None,) * 5


def test_hooks_and_attributes_set_later_are_left_behind(tmp_path: Path) -> None:
    snapshot = make_snapshot()
    snapshot.net.register_forward_hook(lambda *args: None)  # cannot be pickled
    vars(snapshot.net)["note"] = "mine"
    save_snapshot(snapshot, tmp_path / "net.pkl")
    assert "note" not in read_pickle(tmp_path / "net.pkl")["ema"].state


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("encoder", [StandardRGBEncoder(), StabilityVAEEncoder(raw_mean=[1, 2, 3, 4])])
def test_the_published_reader_opens_ours(encoder: Any, converted: bool, tmp_path: Path, inputs: dict[str, Any]) -> None:
    snapshot = make_snapshot(encoder=encoder)
    if converted:
        save_snapshot(snapshot, tmp_path / "net.safetensors")
        list(convert_snapshots([str(tmp_path / "net.safetensors")], outdir=tmp_path))
    else:
        save_snapshot(snapshot, tmp_path / "net.pkl")
    if isinstance(encoder, StandardRGBEncoder):
        inputs["eps"] = []
    torch.save(inputs, tmp_path / "inputs.pt")
    # -I: neither this folder nor the environment's paths; the reader brings the two modules that the file may use.
    shutil.copy(ROOT / "tests" / "helpers" / "published_reader.py", tmp_path)
    command = [sys.executable, "-I", "published_reader.py", "net.pkl", "inputs.pt", "outputs.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(outputs["denoised"], run(load_snapshot(tmp_path / "net.pkl").net, **inputs))
    assert torch.equal(outputs["encoded"], encoder.encode_latents(inputs["raw"], *inputs["eps"]))
    assert outputs["loss"] == -0.8


def test_a_written_pickle_has_the_published_keys_in_order(tmp_path: Path) -> None:
    save_snapshot(make_snapshot(), tmp_path / "net.pkl")
    published = list(read_pickle(GOLDEN / "rgb-cond.pkl"))
    assert list(read_pickle(tmp_path / "net.pkl")) == [*published, "provenance"]
    save_snapshot(make_snapshot(info={}, nimg=12288), path := tmp_path / "network-snapshot-0000012-0.075.pkl")
    assert list(read_pickle(path)) == published and load_snapshot(path).nimg == 12288


def test_a_bare_network_pickle_opens(tmp_path: Path, inputs: dict[str, Any]) -> None:
    net = make_snapshot().net.eval()
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(net))
    assert torch.equal(run(load_snapshot(tmp_path / "net.pkl").net, **inputs), run(net, **inputs))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pickle, "dump", fail)
    with pytest.raises(ConfigError, match="No space left"):
        save_snapshot(make_snapshot(), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.pkl"]
    with pytest.raises(ConfigError, match="suffixes"):
        save_snapshot(make_snapshot(), tmp_path / "net.pt")


def altered(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A pickle whose constructor arguments or contents were changed."""
    snapshot = make_snapshot()
    content: dict[str, Any] = dict(
        ema=snapshot.net, encoder=snapshot.encoder, loss_fn=snapshot.loss_fn, dataset_kwargs={}
    )
    content = change(content) or content
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(EasyDict(content)))
    return path


def arguments(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["ema"]._init_kwargs.update(changes)


def remove(content: dict[str, Any]) -> None:
    del content["ema"].unet.out_conv


def twice(content: dict[str, Any]) -> None:
    content["ema"].unet.out_conv = content["ema"].unet.emb_noise


def integers(content: dict[str, Any]) -> None:
    unet = content["ema"].unet
    del unet.out_gain
    unet.register_buffer("out_gain", torch.tensor(1))


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown argument": (arguments(evil=1), "argument 'evil'"),
    "argument of another type": (arguments(model_channels="8"), "'model_channels'"),
    "huge width": (arguments(model_channels=2**40), "'model_channels'"),
    "wide": (arguments(model_channels=2**20), "has shape"),
    "wider": (arguments(model_channels=16), "has shape"),
    "many blocks": (arguments(num_blocks=2**19), "does not fit the file"),
    "many levels": (arguments(channel_mult=[1] * 60), "does not fit the file"),
    "more blocks": (arguments(num_blocks=2), "lacks tensors"),
    "fewer blocks": (arguments(num_blocks=0), "has tensors unknown"),
    "division by zero": (arguments(channels_per_head=0), "do not describe a network"),
    "negative width": (arguments(model_channels=-8), "do not describe a network"),
    "not a number": (arguments(sigma_data=float("nan")), "'sigma_data'"),
    "missing layer": (remove, "lacks tensors .* unet.out_conv.weight"),
    "layer that occurs twice": (twice, "occurs twice"),
    "integer weights": (integers, "dtype"),
    "foreign class": (lambda content: content.update(ema=StandardRGBEncoder()), "StandardRGBEncoder"),
    "foreign encoder": (lambda content: content.update(encoder=EDM2Loss()), "'EDM2Loss'"),
    "encoder of another type": (lambda content: content.update(encoder=3), "encoder is a value of type int"),
    "no network": (lambda content: {"a": 1}, "no network under the key 'ema'"),
    "provenance of another type": (lambda content: content.update(provenance={"nimg": "x", "info": {}}), "provenance"),
    "data set options of another type": (lambda content: content.update(dataset_kwargs=[1]), "dataset_kwargs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load_snapshot(altered(tmp_path, change))
    assert "file.pkl: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["network", "encoder", "loss", "dataset_kwargs", "nimg", "ema_std", "info"])
@pytest.mark.parametrize("text", ['{"class": 1}', "[" * 100_000, "nonsense", '"text"', "NaN", "true"])
def test_a_damaged_header_is_refused(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_snapshot(make_snapshot(), path)
    metadata = header(path)
    save_file(load_file(path), path, metadata | {key: text})
    if text == '{"class": 1}' and key in ("dataset_kwargs", "info"):
        load_snapshot(path)
        return
    with pytest.raises(ConfigError, match=f"net.safetensors: .*{key}"):
        load_snapshot(path)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_the_header_says_what_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_snapshot(make_snapshot(), path)
    metadata = header(path)
    assert (metadata.pop("format"), metadata.pop("format_version")) == ("edm2-network", "1")
    entries = {key: json.loads(value) for key, value in metadata.items()}
    documented = (ROOT / "docs/file-formats.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in documented for key in entries)
    assert entries["network"]["class"] == "Precond" and entries["network"]["arguments"]["model_channels"] == 8
    assert entries["loss"] == {"class": "EDM2Loss", "arguments": {"P_mean": -0.8}}
    assert entries["nimg"] == 12345 and entries["info"] == {"preset": "tiny", "batch": 64}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    save_snapshot(make_snapshot(), path)
    data = path.read_bytes()
    for length in (0, 1, 8, 9, 100, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ConfigError, match=f"net{suffix}: "):
            load_snapshot(path)


def test_what_is_no_network_file_is_named(tmp_path: Path) -> None:
    cases = [
        (GOLDEN / "toy.pkl", "ToyModel"),
        (GOLDEN.parent / "dataset-ref.pkl", "'ema'"),
        (tmp_path, "without a network in it"),
    ]
    text = tmp_path / "text.pkl"
    text.write_text("hello")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, foreign)
    cases += [(text, "neither"), (foreign, "header"), (tmp_path / "none.pkl", "does not exist")]
    for path, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            load_snapshot(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_header_alone_says_what_the_whole_file_says(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"network-snapshot-0000012-0.075{suffix}"
    save_snapshot(make_snapshot(), path)
    whole, header = load_snapshot(path), read_header(path)
    state = whole.net.state_dict()
    assert header.tensors == {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    assert list(header.tensors) == list(state)
    assert header.tensors.keys() - header.buffers == {name for name, _ in whole.net.named_parameters()}
    assert (header.nimg, header.ema_std) == (whole.nimg, whole.ema_std) and header.info == whole.info
    assert header.config == {
        "class": "Precond",
        "arguments": {"img_resolution": [8, 16], "img_channels": 4, "label_dim": 3, "sigma_data": 0.4, **KWARGS},
    }
    assert header.encoder == {"class": "StabilityVAEEncoder", "arguments": {"raw_mean": [1, 2, 3, 4]}}
    assert header.loss == {"class": "EDM2Loss", "arguments": {"P_mean": -0.8}}
    assert header.dataset_kwargs == whole.dataset_kwargs


def test_a_header_is_read_without_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_snapshot(make_snapshot(), path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert not next(load_snapshot(path).net.parameters()).isfinite().any()
    assert read_header(path).nimg == 12345
    shapes = read_pickle(GOLDEN / "toy.pkl", values=False)
    assert all(value.device.type == "meta" for value in flatten(shapes).values())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_file_has_a_header(name: str) -> None:
    net = load_snapshot(GOLDEN / name).net
    assert read_header(GOLDEN / name).tensors.keys() == net.state_dict().keys()


def test_names_tell_image_counts_apart_and_published_ones_stay() -> None:
    for nimg in (1024, 1000, 8388608, 2147483648, 65000):
        assert name_of_nimg(nimg) == f"{nimg // 1000:07d}"
    assert name_of_nimg(1536) == "0000001.536" and name_of_nimg(16) == "0000000.016"
    for interval in (8, 24, 125, 256, 500, 512, 1000, 1024, 1500):
        times = [n for n in range(8, 70_000, 8) if n // interval > (n - 8) // interval]
        names = {name_of_nimg(nimg, is_saved=times.__contains__): nimg for nimg in times}
        assert len(names) == len(times)
        if interval >= 1000 and interval % 8 == 0 and interval != 1500:
            assert all("." not in name for name in names)
    for nimg in (1, 999, 1024, 1536, 20480, 64512, 8388608):
        assert nimg_from_name(name_of_nimg(nimg)) == nimg
    assert parse_name("run/network-snapshot-0000001.536-0.050.pkl") == (1536, 0.05)


def test_a_printed_snapshot_is_one_line_about_the_network() -> None:
    path = GOLDEN / "rgb-cond.pkl"
    for content in (load_snapshot(path), read_header(path)):
        text = repr(content)
        assert "\n" not in text and len(text) < 1000 and "nimg=" in text
    assert "Precond of 3x" in repr(load_snapshot(path))
