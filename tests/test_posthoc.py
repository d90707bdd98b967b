"""Reconstruction from the snapshots of a small run: golden networks, streaming, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch

import reconstruct_phema as script
from dnnlib.errors import ConfigError
from tests.conftest import GOLDEN_DIR
from training import posthoc
from training.networks_edm2 import Precond
from training.snapshot import Snapshot, load_snapshot, save_snapshot

RUN_DIR = GOLDEN_DIR / "snapshots" / "run"
OUT_DIR = "reconstructed"


def build(inputs, stds, **options):
    return [output for step in posthoc.reconstruct_phema(inputs, stds, **options) for output in step.outputs]


def small_snapshot(path: Path, scale=1.0, **kwargs) -> None:
    torch.manual_seed(0)
    arguments = {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_channels": 8, "channel_mult": [1]}
    net = Precond(**{**arguments, "num_blocks": 1, "attn_resolutions": [], **kwargs}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    save_snapshot(Snapshot(net=net), path)


@pytest.fixture
def run_dir(tmp_path):
    """A folder with two inputs of one small network."""
    folder = tmp_path / "run"
    folder.mkdir()
    small_snapshot(folder / "net-0000001-0.050.pkl")
    small_snapshot(folder / "net-0000002-0.100.pkl", scale=2.0)
    return folder


def test_inputs_are_listed_as_the_golden_numbers_have_them():
    golden = json.loads((GOLDEN_DIR / "numbers.json").read_text())["phema_inputs"]
    files = posthoc.list_input_pickles(RUN_DIR)
    assert [(Path(f.path).name, f.nimg, f.std) for f in files] == [(g["name"], g["nimg"], g["std"]) for g in golden]


def test_filters_by_prefix_and_length_and_prefers_safetensors(tmp_path):
    names = ["a-0000001-0.100.pkl", "a-0000001-0.050.pkl", "a-0000001-0.050.safetensors", "b-0000002-0.050.pkl"]
    for name in [*names, "a-0000001.pkl", "a-0000001-0.050.pkl.tmp"]:
        (tmp_path / name).touch()

    def listed(**options):
        return [Path(file.path).name for file in posthoc.list_input_pickles(tmp_path, **options)]

    assert listed() == ["a-0000001-0.050.safetensors", "a-0000001-0.100.pkl", "b-0000002-0.050.pkl"]
    assert listed(in_prefix="a", in_std=[0.1]) == ["a-0000001-0.100.pkl"]
    assert listed(in_std=0.05) == ["a-0000001-0.050.safetensors", "b-0000002-0.050.pkl"]


@pytest.mark.parametrize("batch", [3])
def test_golden_reconstructions(golden, batch):
    wanted, _ = golden("phema-run.safetensors")
    groups: dict[int, list[float]] = {}
    for kimg, std in sorted({tuple(key.split(".unet")[0].split(".logvar")[0].split("-")) for key in wanted}):
        groups.setdefault(int(kimg), []).append(float(std))
    inputs = posthoc.list_input_pickles(RUN_DIR)
    compared = set()
    for kimg, stds in groups.items():
        nimg = next(file.nimg for file in inputs if file.nimg // 1000 == kimg)
        for output in build(inputs, stds, out_nimg=nimg, max_batch_size=batch):
            assert (output.snapshot.nimg, output.snapshot.ema_std) == (nimg, output.std)
            for name, value in output.snapshot.net.state_dict().items():
                key = f"{kimg:07d}-{output.std:.3f}.{name}"
                torch.testing.assert_close(value.float(), wanted[key].float(), rtol=1e-3, atol=1e-6)
                compared.add(key)
    assert compared == set(wanted)


def test_written_files_hold_what_the_iteration_gives(tmp_path):
    inputs = posthoc.list_input_pickles(RUN_DIR)
    outputs = build(inputs, [0.08, 0.03], out_dir=tmp_path / "new" / "folder", out_format="both")
    names = [path.name for output in outputs for path in output.paths]
    assert names == [f"phema-0033554-{std}.{kind}" for std in ("0.030", "0.080") for kind in ("pkl", "safetensors")]
    first = load_snapshot(inputs[0].path)
    for output in outputs:
        for path in output.paths:
            loaded = load_snapshot(path)
            assert (loaded.nimg, loaded.ema_std) == (33554432, output.std)
            assert loaded.dataset_kwargs == first.dataset_kwargs and type(loaded.encoder) is type(first.encoder)
            for name, value in loaded.net.state_dict().items():
                assert value.dtype == torch.float16
                assert torch.equal(value, output.snapshot.net.state_dict()[name].half())
    assert 0 < outputs[0].fit < 1 and outputs[0].gain > 0


def test_a_stored_length_comes_back_unchanged():
    inputs = posthoc.list_input_pickles(RUN_DIR)
    (output,) = build(inputs, 0.1)
    stored = load_snapshot(inputs[-1].path).net.state_dict()
    assert output.fit < 1e-7
    for name, value in output.snapshot.net.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=1e-3, atol=1e-6)


def test_every_pass_reads_every_input_once():
    inputs = posthoc.list_input_pickles(RUN_DIR)
    work = posthoc.reconstruct_phema(inputs, [0.03, 0.05, 0.08, 0.1, 0.2], max_batch_size=2)
    steps = list(work)
    assert len(work) == len(steps) == len(inputs) * 4
    assert [[step.input for step in steps if step.pass_idx == i] for i in range(4)] == [inputs] * 4
    assert [len(step.outputs) for step in steps if step.outputs] == [2, 2, 1]


def test_skip_leaves_existing_files_alone(tmp_path):
    inputs = posthoc.list_input_pickles(RUN_DIR)
    path = tmp_path / "phema-0033554-0.030.pkl"
    path.write_bytes(b"mine")
    outputs = build(inputs, [0.03, 0.08], out_dir=tmp_path, skip_existing=True)
    assert [output.std for output in outputs] == [0.08] and path.read_bytes() == b"mine"
    assert len(posthoc.reconstruct_phema(inputs, [0.03], out_dir=tmp_path, skip_existing=True)) == 0


def test_published_callers_may_pass_objects_of_their_own_and_numpy_lengths():
    class Mine:
        def __init__(self, file):
            self.path, self.nimg, self.std = file.path, file.nimg, file.std

    inputs = [Mine(file) for file in posthoc.list_input_pickles(RUN_DIR, in_std=0.05)]
    work = script.reconstruct_phema(inputs, np.array([0.08]), verbose=False)
    assert [output.std for step in work for output in step.outputs] == [0.08]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("net-0000003-0.050.pkl", {"model_channels": 16}, "has shape"),
        ("net-0000003-0.050.pkl", {"num_blocks": 2}, "only one of them has the tensor"),
        ("net-0000003-0.050.pkl", {"sigma_data": 0.7}, "network arguments"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused_by_name(run_dir, tmp_path, name, arguments, message):
    small_snapshot(run_dir / name, **arguments)
    with pytest.raises(ConfigError, match=f"{name} does not belong with net-0000001-0.050.pkl: .*{message}"):
        build(posthoc.list_input_pickles(run_dir), [0.08], out_dir=tmp_path / OUT_DIR)
    assert not (tmp_path / OUT_DIR).exists()


def test_pickles_and_safetensors_belong_together(run_dir):
    small_snapshot(run_dir / "net-0000003-0.050.safetensors")
    assert len(build(posthoc.list_input_pickles(run_dir), [0.08])) == 1


def run(*arguments):
    """Exit code, standard output and standard error of the script's command line."""
    return click.testing.CliRunner().invoke(script.cmdline, [str(a) for a in arguments], standalone_mode=False)


def test_the_script_prints_a_line_with_the_fit_for_every_output(tmp_path):
    result = run("--indir", RUN_DIR, "--outdir", tmp_path, "--outstd=0.05,0.08", "--outkimg=25165", "--batch=1")
    assert result.exception is None
    for std in ("0.050", "0.080"):
        path = tmp_path / f"phema-0025165-{std}.pkl"
        assert path.is_file()
        assert sum(f"{path}: fit " in line for line in result.output.splitlines()) == 1


def duplicate(folder):
    shutil.copy(folder / "net-0000001-0.050.pkl", folder / "other-0000001-0.050.pkl")


def foreign(folder):
    (folder / "net-0000003-0.050.pkl").write_bytes(b"not a network")


def blocked(folder):
    (folder.parent / OUT_DIR).write_text("in the way")


@pytest.mark.parametrize(
    "prepare, options, message",
    [
        (None, {"indir": "nowhere"}, "cannot read the input folder"),
        (None, {"inprefix": "other"}, "no snapshots .* with prefix 'other'"),
        (None, {"instd": "0.200"}, "no snapshots .* with EMA length 0.200"),
        (None, {"outkimg": "7"}, "no input snapshot at 7 kimg"),
        (None, {"outstd": "0.3"}, "above 0 and below 0.289"),
        (None, {"outstd": "0.1001,0.1002"}, "differ in three decimals"),
        (None, {"batch": "0"}, "batch"),
        (None, {"format": "zip"}, "format"),
        (None, {"outprefix": "net", "outstd": "0.1", "outdir": "run"}, "would replace an input"),
        (duplicate, {}, "same time and EMA length: net-0000001-0.050.pkl and other-0000001-0.050.pkl"),
        (foreign, {}, "net-0000003-0.050.pkl"),
        (blocked, {"outdir": f"{OUT_DIR}/deeper"}, "cannot be made"),
        (blocked, {}, "cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(run_dir, monkeypatch, capsys, prepare, options, message):
    monkeypatch.chdir(run_dir.parent)
    if prepare is not None:
        prepare(run_dir)
    before = sorted(run_dir.parent.rglob("*"))
    options = {"indir": "run", "outdir": OUT_DIR, "outstd": "0.080", **options}
    with pytest.raises(SystemExit) as stopped:
        script.main(script.cmdline, [f"--{name}={value}" for name, value in options.items()])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert stopped.value.code == 2 and len(error) == 1
    assert re.search(message, error[0])
    assert sorted(run_dir.parent.rglob("*")) == before


def test_published_names_import_from_the_script():
    assert script.parse_std_list("0.01,0.02,...,0.05") == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert script.list_input_pickles is posthoc.list_input_pickles
