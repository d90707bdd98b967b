"""convert_snapshot.py: network files go to the other format and back with all that they hold."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import convert_snapshot
import dnnlib.cli
from training.snapshot import Snapshot, load_snapshot

GOLDEN = Path(__file__).parent / "golden" / "snapshots"
RUN = GOLDEN / "run" / "network-snapshot-0008388-0.050.pkl"


def run(*args: Any) -> int:
    try:
        dnnlib.cli.main(convert_snapshot.cmdline, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def assert_same(a: Snapshot, b: Snapshot) -> None:
    first, second = a.net.state_dict(), b.net.state_dict()
    assert list(first) == list(second) and all(torch.equal(value, second[name]) for name, value in first.items())
    assert a.net.img_resolution == b.net.img_resolution and type(a.encoder) is type(b.encoder)
    assert vars(a.loss_fn) == vars(b.loss_fn) or a.loss_fn.P_mean == b.loss_fn.P_mean
    assert (a.nimg, a.ema_std, a.dataset_kwargs, a.info) == (b.nimg, b.ema_std, b.dataset_kwargs, b.info)


@pytest.mark.parametrize("name", ["rgb-cond.pkl", "latent-cond.pkl", "run/network-snapshot-0033554-0.100.pkl"])
def test_a_published_file_goes_there_and_back(name: str, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.pkl"
    assert run(GOLDEN / name, "--out", there) == 0 == run(there, f"--out={back}")
    assert_same(load_snapshot(GOLDEN / name), load_snapshot(there))
    assert_same(load_snapshot(there), load_snapshot(back))  # count and length, too, which this name does not tell


def test_names_are_kept_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RUN, GOLDEN / "rgb-cond.pkl", f"--outdir={tmp_path / 'new'}") == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["network-snapshot-0008388-0.050.safetensors", "rgb-cond.safetensors"]
    assert "0.050.safetensors (8388608 images, EMA length 0.05)" in capsys.readouterr().out


def test_inputs_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = tmp_path / "net.pkl", tmp_path / "net.safetensors"
    shutil.copy(RUN, own)
    run(own, f"--outdir={tmp_path}")
    (tmp_path / "link.pkl").symlink_to(own)
    before = {path: path.read_bytes() for path in (own, other)}
    for args in (
        [own, f"--out={own}"],
        [own, f"--out={tmp_path / 'folder' / '..' / 'net.pkl'}"],
        [own, f"--out={tmp_path / 'link.pkl'}"],
        [own, other, f"--outdir={tmp_path}"],
    ):
        capsys.readouterr()
        assert run(*args) == 2 and "is an input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (own, other)} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([RUN], "--outdir=DIR or --out=FILE"),
        ([RUN, "--out=a.pkl", "--outdir=b"], "--outdir=DIR or --out=FILE"),
        ([RUN, RUN, "--out=a.safetensors"], "one file for 2 inputs"),
        ([RUN, "--out=a.pt"], "none of the suffixes"),
        (["net.bin", "--outdir=b"], "name its output by --out=FILE"),
        ([RUN, RUN, "--outdir=b"], "several inputs"),
        (["missing.pkl", "--outdir=b"], "does not exist"),
        ([GOLDEN / "toy.pkl", "--outdir=b"], "ToyModel"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    args: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("Error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_documented_reader_reads_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(GOLDEN / "run" / "network-snapshot-0033554-0.100.pkl", "--out=net.safetensors") == 0
    text = (Path(__file__).parents[1] / "docs" / "file-formats.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert 5 <= code.count("\n") <= 10
    names: dict[str, Any] = {}
    exec(code, names)
    snapshot = load_snapshot("net.safetensors")
    assert names["config"]["class"] == "Precond" and names["nimg"] == snapshot.nimg == 33554432
    assert names["ema_std"] == 0.1 and names["encoder"]["class"] == type(snapshot.encoder).__name__
    assert names["tensors"].keys() == snapshot.net.state_dict().keys()


def test_every_header_key_is_documented_and_no_other(tmp_path: Path) -> None:
    assert run(RUN, f"--out={tmp_path / 'net.safetensors'}") == 0
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        keys = set(file.metadata())
    text = (Path(__file__).parents[1] / "docs" / "file-formats.md").read_text(encoding="utf-8")
    table = text.partition("## .safetensors")[2].partition("## ")[0]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == keys
