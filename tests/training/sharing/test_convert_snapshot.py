"""convert_snapshot.py: network files go to the other format and back with all that they hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import convert_snapshot
import dnnlib.cli
from tests.helpers.paths import GOLDEN_DIR, ROOT
from training.sharing import write_folder
from training.sharing.model_card import PUBLISHED_NOTICE
from training.snapshot import Snapshot, load_snapshot, save_snapshot

GOLDEN = GOLDEN_DIR / "snapshots"
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
        ([RUN, "--out=model"], "add --to=folder"),
        ([RUN, "--out=model.pkl", "--to=folder"], "name a folder for --to=folder"),
        ([RUN, "--out=net.pkl", "--to=safetensors"], "contradict each other"),
        ([RUN, "--out=net.safetensors", "--license=mit"], "add --to=folder"),
        ([RUN, "--out=model", "--to=folder", "--license=my own"], "is not an identifier"),
        ([RUN, "--out=model", "--to=folder", "--metrics=none.json"], "cannot read --metrics=none.json"),
        ([RUN, "--out=model", "--to=folder", f"--metrics={GOLDEN.parent / 'inception-tensors.json'}"], "not a result"),
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
    text = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")
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
    text = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")
    table = text.partition("## .safetensors")[2].partition("## ")[0]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == keys


FOLDER_FILES = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["rgb-cond.pkl", "latent-cond.pkl", "run/network-snapshot-0033554-0.100.pkl"])
def test_every_form_leads_to_every_other_without_loss(name: str, tmp_path: Path) -> None:
    original = load_snapshot(GOLDEN / name)
    folder, file, again, back = (tmp_path / part for part in ("model", "a.safetensors", "again", "back.pkl"))
    assert run(GOLDEN / name, f"--out={folder}", "--to=folder") == 0
    assert files_in(folder) == FOLDER_FILES
    assert run(folder, f"--out={file}") == 0 == run(file, f"--out={again}", "--to=folder")
    assert run(again, f"--out={back}", "--to=pkl") == 0
    for path in (folder, folder / FOLDER_FILES[-1], file, again, back):  # the folder's weights are a network file too
        assert_same(original, load_snapshot(path))


def test_names_in_an_output_folder_follow_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(RUN, GOLDEN / "rgb-cond.pkl", "--outdir=models", "--to=folder") == 0
    names = ["network-snapshot-0008388-0.050", "rgb-cond"]
    assert sorted(path.name for path in Path("models").iterdir()) == names
    assert run(*(f"models/{name}" for name in names), "--outdir=files") == 0
    assert run(RUN, "--outdir=files", "--to=pkl") == 0
    assert run("files/rgb-cond.safetensors", "--outdir=files", "--to=pkl") == 0
    written = sorted(path.name for path in Path("files").iterdir())
    assert written == sorted(name + suffix for name in names for suffix in (".pkl", ".safetensors"))


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    file.write_text("mine")
    (full / "notes.txt").write_text("mine")
    assert run(RUN, f"--out={full}", "--to=folder") == 2 and "is not empty" in capsys.readouterr().err
    assert run(RUN, f"--out={file}", "--to=folder") == 2 and "is not a folder" in capsys.readouterr().err
    assert run(RUN, f"--out={empty}", "--to=folder") == 0 and files_in(empty) == FOLDER_FILES
    assert run(RUN, f"--out={empty}", "--to=folder") == 2
    assert run(empty, f"--out={empty}", "--to=folder") == 2 and "is an input" in capsys.readouterr().err
    assert files_in(full) == ["notes.txt"] and file.read_text() == "mine"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_folder, "model_card", full_disk)
    assert run(RUN, f"--out={tmp_path / 'model'}", "--to=folder") == 2
    assert not list(tmp_path.iterdir())


def test_folders_without_a_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal() -> str:
        capsys.readouterr()
        assert run(tmp_path / "model", f"--out={tmp_path / 'net.pkl'}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert run(RUN, f"--out={tmp_path / 'model'}", "--to=folder") == 0
    config = tmp_path / "model" / "unet" / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel'; known is EDM2UNet"),
        ({"network": {**good["network"], "img_channels": 4}}, "has shape"),
        ({"network": {**good["network"], "source": "import os"}}, "unknown argument"),
        ({"network": None}, "lacks 'class' or 'arguments'"),
        ({"snapshot": []}, "is not an object"),
        ({"snapshot": {"encoder": {"class": "os.system", "arguments": {}}}}, "known are"),
        ({"snapshot": {"nimg": "many"}}, "int is needed"),
    ):
        config.write_text(json.dumps(good | change))
        assert message in refusal()
    config.write_text("[1]")
    assert "a JSON object" in refusal()
    config.write_text("{")
    assert "is not JSON" in refusal()
    config.unlink()
    assert "without a network in it" in refusal()
    assert not (tmp_path / "net.pkl").exists()


def test_the_card_tells_what_is_known(tmp_path: Path) -> None:
    training = tmp_path / "run"
    training.mkdir()
    source = training / RUN.name
    snapshot = load_snapshot(RUN)
    snapshot.info["training_command"] = "python train_edm2.py --preset=x"
    save_snapshot(snapshot, source)
    (training / "training_options.json").write_text(json.dumps({"batch": 2048, "data": "x.zip"}))
    kimg = snapshot.nimg / 1e3
    lines = [{"Progress/kimg": 1.0, "Metrics/fid-0.050": 99.0}, {"Progress/kimg": kimg, "Metrics/fid-0.050": 12.25}]
    lines[1]["Metrics/fid-0.100"] = 98.0
    (training / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"results": {"kid": {"minimum": 0.5, "mean": 0.625, "std": 0.125}}, "num_images": 50000, "command": "gen"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert run(source, f"--out={tmp_path / 'model'}", "--to=folder", f"--metrics={tmp_path / 'result.json'}") == 0
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\n")
    for line in (
        "| images seen in training | 8,388,608 |",
        "| EMA length | 0.050 |",
        "python train_edm2.py --preset=x",
        '"batch": 2048',
        "| fid | 12.25 |  | while training |",
        "| kid | 0.5 (mean 0.625 ± 0.125) | 50000 | `gen` |",
        "No license is stated yet",
    ):
        assert line in card
    assert "99" not in card and "98" not in card
    own = run(source, f"--out={tmp_path / 'own'}", "--to=folder", "--license=apache-2.0")
    assert own == 0 and "\nlicense: apache-2.0\n" in (tmp_path / "own" / "README.md").read_text("utf-8")


def test_published_weights_keep_their_license_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "edm2-img512-s-2147483-0.130.pkl"
    shutil.copy(RUN, source)
    assert run(source, f"--outdir={tmp_path / 'a'}", "--to=folder", "--license=apache-2.0") == 0
    assert run(tmp_path / "a" / source.stem, f"--out={tmp_path / 'net.safetensors'}") == 0
    assert run(tmp_path / "net.safetensors", f"--out={tmp_path / 'b'}", "--to=folder") == 0
    for folder in (tmp_path / "a" / source.stem, tmp_path / "b"):
        card = (folder / "README.md").read_text("utf-8")
        assert "\nlicense: cc-by-nc-sa-4.0\n" in card and PUBLISHED_NOTICE in card and "apache" not in card
