"""Reconstruction from the snapshots of a small run: golden networks, streaming, and what is refused."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import psutil
import pytest
import safetensors
import safetensors.torch
import torch

import reconstruct_phema as script
from dnnlib.errors import ConfigError
from tests.helpers.killed import killed_at_replace, needs_sigkill
from tests.helpers.paths import GOLDEN_DIR
from training import phema
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.networks_edm2 import Precond
from training.posthoc import reconstruction, sums
from training.posthoc import response_plot as plot
from training.posthoc import stored_averages as posthoc_files
from training.posthoc.inputs import parse_std_list
from training.snapshot import Snapshot, load_snapshot, save_snapshot

RUN_DIR = GOLDEN_DIR / "snapshots" / "run"
NUMBERS = json.loads((GOLDEN_DIR / "numbers.json").read_text(encoding="utf-8"))
OUT_DIR = "reconstructed"


def build(inputs, stds, **options):
    return [output for step in reconstruction.reconstruct_phema(inputs, stds, **options) for output in step.outputs]


def small_snapshot(path: Path, scale=1.0, seed=0, encoder=None, nimg=None, ema_std=None, **kwargs) -> None:
    torch.manual_seed(seed)
    arguments = {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_channels": 8, "channel_mult": [1]}
    net = Precond(**{**arguments, "num_blocks": 1, "attn_resolutions": [], **kwargs}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    save_snapshot(Snapshot(net=net, encoder=encoder, nimg=nimg, ema_std=ema_std), path)


@pytest.fixture
def run_dir(tmp_path):
    """A folder with two inputs of one small network."""
    folder = tmp_path / "run"
    folder.mkdir()
    small_snapshot(folder / "net-0000001-0.050.pkl")
    small_snapshot(folder / "net-0000002-0.100.pkl", scale=2.0)
    return folder


@pytest.mark.parametrize("case", NUMBERS["parse_std_list"], ids=lambda case: case["text"])
def test_lists_of_lengths_parse_as_published(case):
    assert parse_std_list(case["text"]) == pytest.approx(case["value"], rel=1e-9)


@pytest.mark.parametrize("text", ["", "a", "0", "-0.1", "0.289", "nan", "inf", "0.1,,0.2"])
def test_lengths_out_of_range_are_refused(text):
    with pytest.raises(ConfigError, match=r"above 0 and below 0\.289"):
        parse_std_list(text)


@pytest.mark.parametrize("text", ["...,0.2", "0.1,...,0.2", "0.1,0.15,...", "0.2,0.1,...,0.25", "0.1,0.2,...,0.15"])
def test_a_spacing_that_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match=r"0\.010,0\.015,\.\.\.,0\.250"):
        parse_std_list(text)


def test_inputs_are_listed_as_the_golden_numbers_have_them():
    golden = NUMBERS["phema_inputs"]
    files = reconstruction.list_input_pickles(RUN_DIR)
    assert [(Path(f.path).name, f.nimg, f.std) for f in files] == [(g["name"], g["nimg"], g["std"]) for g in golden]


def test_filters_by_prefix_and_length_and_prefers_safetensors(tmp_path):
    names = ["a-0000001-0.100.pkl", "a-0000001-0.050.pkl", "a-0000001-0.050.safetensors", "b-0000002-0.050.pkl"]
    for name in [*names, "a-0000001.pkl", "a-0000001-0.050.pkl.tmp"]:
        (tmp_path / name).touch()

    def listed(**options):
        return [Path(file.path).name for file in reconstruction.list_input_pickles(tmp_path, **options)]

    assert listed() == ["a-0000001-0.050.safetensors", "a-0000001-0.100.pkl", "b-0000002-0.050.pkl"]
    assert listed(in_prefix="a", in_std=[0.1]) == ["a-0000001-0.100.pkl"]
    assert listed(in_std=0.05) == ["a-0000001-0.050.safetensors", "b-0000002-0.050.pkl"]


def test_an_output_does_not_depend_on_those_built_with_it():
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    stds = [0.04 + 0.01 * i for i in range(9)]
    together = {output.std: output.snapshot for output in build(inputs, stds, max_batch_size=9)}
    for output in build(inputs, stds, max_batch_size=1):
        assert output.snapshot.info == together[output.std].info
        expected = together[output.std].net.state_dict()
        for name, value in output.snapshot.net.state_dict().items():
            assert torch.equal(value, expected[name]), (output.std, name)


@pytest.mark.parametrize("batch", [3])
def test_golden_reconstructions(golden, batch):
    wanted, _ = golden("phema-run.safetensors")
    groups: dict[int, list[float]] = {}
    for kimg, std in sorted({tuple(key.split(".unet")[0].split(".logvar")[0].split("-")) for key in wanted}):
        groups.setdefault(int(kimg), []).append(float(std))
    inputs = reconstruction.list_input_pickles(RUN_DIR)
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
    inputs = reconstruction.list_input_pickles(RUN_DIR)
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
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    (output,) = build(inputs, 0.1)
    stored = load_snapshot(inputs[-1].path).net.state_dict()
    assert output.fit < 1e-7
    for name, value in output.snapshot.net.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=1e-3, atol=1e-6)


def test_every_pass_has_as_many_steps_as_there_are_inputs_and_its_last_one_has_the_outputs():
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    work = reconstruction.reconstruct_phema(inputs, [0.03, 0.05, 0.08, 0.1, 0.2], max_batch_size=2)
    steps = list(work)
    assert len(work) == len(steps) == len(inputs) * 4
    assert [step.pass_idx for step in steps] == [i for i in range(4) for _ in inputs]
    assert [(i, len(step.outputs)) for i, step in enumerate(steps) if step.outputs] == [(15, 2), (23, 2), (31, 1)]


def test_skip_leaves_existing_files_alone(tmp_path):
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    build(inputs, 0.03, out_dir=tmp_path)
    path = tmp_path / "phema-0033554-0.030.pkl"
    os.utime(path, ns=(10**18, 10**18))
    outputs = build(inputs, [0.03, 0.08], out_dir=tmp_path, skip_existing=True)
    assert [output.std for output in outputs] == [0.08] and path.stat().st_mtime_ns == 10**18
    assert len(reconstruction.reconstruct_phema(inputs, [0.03], out_dir=tmp_path, skip_existing=True)) == 0


def test_skip_makes_only_the_missing_format_and_removes_what_a_killed_process_left(tmp_path):
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    build(inputs, 0.03, out_dir=tmp_path, out_format="safetensors")
    left, other = tmp_path / ".phema-0033554-0.030.pkl.0123456789ab.tmp", tmp_path / ".phema.pkl.0123456789ab.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"of another file")
    (output,) = build(inputs, 0.03, out_dir=tmp_path, out_format="both", skip_existing=True)
    assert [path.name for path in output.paths] == ["phema-0033554-0.030.pkl"] and output.paths[0].is_file()
    assert not left.exists() and other.exists()


@needs_sigkill
def test_a_killed_reconstruction_goes_on_with_what_is_missing(tmp_path):
    """Killed when the second output has all its bytes, and not its name."""
    inputs, stds = reconstruction.list_input_pickles(RUN_DIR), [0.03, 0.08, 0.12]
    build(inputs, stds, out_dir=tmp_path / "whole", max_batch_size=1)
    code = f"""
from training.posthoc import reconstruction
inputs = reconstruction.list_input_pickles({str(RUN_DIR)!r})
list(reconstruction.reconstruct_phema(inputs, {stds}, out_dir={str(tmp_path / "out")!r}, max_batch_size=1))
"""
    killed_at_replace(2, code)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(names) == 2 and sorted(Path(name).suffix for name in names) == [".pkl", ".tmp"]
    outputs = build(inputs, stds, out_dir=tmp_path / "out", skip_existing=True, max_batch_size=1)
    assert [output.std for output in outputs] == [0.08, 0.12]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    for path in (tmp_path / "whole").iterdir():
        whole, mended = (load_snapshot(each).net.state_dict() for each in (path, tmp_path / "out" / path.name))
        assert whole.keys() == mended.keys() and all(torch.equal(whole[name], mended[name]) for name in whole)


def test_skip_refuses_outputs_that_are_damaged_or_made_of_other_snapshots(tmp_path):
    inputs = reconstruction.list_input_pickles(RUN_DIR)
    build(inputs, 0.03, out_dir=tmp_path, out_format="safetensors")
    again = {"out_dir": tmp_path, "skip_existing": True, "out_format": "safetensors"}
    with pytest.raises(ConfigError, match=r"made of other snapshots \(8, now 7\); leave out --skip"):
        reconstruction.reconstruct_phema(inputs[1:], 0.03, 33554432, **again)
    path = tmp_path / "phema-0033554-0.030.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"damaged or cut short.*leave out --skip"):
        reconstruction.reconstruct_phema(inputs, 0.03, **again)


def test_published_callers_may_pass_objects_of_their_own_and_numpy_lengths():
    class Mine:
        def __init__(self, file):
            self.path, self.nimg, self.std = file.path, file.nimg, file.std

    inputs = [Mine(file) for file in reconstruction.list_input_pickles(RUN_DIR, in_std=0.05)]
    work = script.reconstruct_phema(inputs, np.array([0.08]), verbose=False)
    assert [output.std for step in work for output in step.outputs] == [0.08]


@pytest.mark.parametrize("read_bytes", [0, 1 << 30])
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model_channels": 16}, r"has shape .* \(model_channels=16 instead of 8\)"),
        ({"num_blocks": 2}, "only one of them has the tensor .*num_blocks=2 instead of 1"),
        ({"label_dim": 3}, "label_dim=3 instead of 0"),
        ({"sigma_data": 0.7}, "its network has sigma_data=0.7 instead of no sigma_data"),
        ({"encoder": StandardRGBEncoder()}, "its encoder has class='StandardRGBEncoder' instead of None"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused_by_name_before_anything_is_added(
    run_dir, tmp_path, monkeypatch, suffix, arguments, message, read_bytes
):
    small_snapshot(run_dir / f"net-0000003-0.050{suffix}", **arguments)
    monkeypatch.setattr(sums.WeightedSums, "add", None)
    with pytest.raises(ConfigError, match=f"net-0000003-0.050{suffix} does not belong with net-0000001-0.050.pkl: .*"):
        build(reconstruction.list_input_pickles(run_dir), [0.08], out_dir=tmp_path / OUT_DIR, read_bytes=read_bytes)
    assert not (tmp_path / OUT_DIR).exists()
    with pytest.raises(ConfigError, match=message):
        build(reconstruction.list_input_pickles(run_dir), [0.08])


def test_an_encoder_with_other_settings_is_refused(run_dir):
    for index, arguments in enumerate([{}, {"final_std": 0.7}]):
        path = run_dir / f"other-000000{index + 1}-0.050.safetensors"
        small_snapshot(path, encoder=StabilityVAEEncoder(**arguments))
    with pytest.raises(ConfigError, match=r"other-0000002-0.050.safetensors .* encoder has final_std=0.7 instead"):
        build(reconstruction.list_input_pickles(run_dir, in_prefix="other"), [0.08])


def test_a_file_whose_name_tells_another_time_or_length_than_its_header_is_refused(run_dir):
    for nimg, std in ((5000, 0.05), (3072, 0.07)):
        small_snapshot(run_dir / "net-0000003-0.050.safetensors", nimg=nimg, ema_std=std)
        with pytest.raises(ConfigError, match=rf"net-0000003-0.050.safetensors holds .* {std} at {nimg} images"):
            build(reconstruction.list_input_pickles(run_dir), [0.08])


def test_the_exact_image_count_of_a_header_is_used(run_dir):
    small_snapshot(run_dir / "net-0000003-0.050.safetensors", nimg=3999, ema_std=0.05)
    assert [file.nimg for file in reconstruction.list_input_pickles(run_dir)] == [1024, 2048, 3999]
    for out_nimg in (None, 3072):  # the command line knows the thousands only
        work = reconstruction.reconstruct_phema(reconstruction.list_input_pickles(run_dir), 0.08, out_nimg)
        assert work.out_nimg == 3999 and [o.snapshot.nimg for step in work for o in step.outputs] == [3999]


def test_a_pickle_of_the_same_time_and_length_as_an_exact_one_is_refused(run_dir):
    small_snapshot(run_dir / "exact-0000001-0.050.safetensors", nimg=1500, ema_std=0.05)
    inputs = reconstruction.list_input_pickles(run_dir)
    with pytest.raises(ConfigError, match=r"net-0000001-0.050.pkl and exact-0000001-0.050.safetensors"):
        reconstruction.reconstruct_phema(inputs, 0.08)


@pytest.fixture
def many(tmp_path):
    """Seven inputs with different numbers, in both formats."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(7):
        kind = "pkl" if i in (0, 2, 3, 5) else "safetensors"
        small_snapshot(folder / f"net-{i + 1:07d}-0.{5 + 5 * (i % 2):02d}0.{kind}", seed=i)
    return reconstruction.list_input_pickles(folder)


def plain_sums(inputs, stds):
    """Parameters of the outputs, by name, in float64."""
    profiles = [file.nimg for file in inputs], [file.std for file in inputs]
    weights = phema.solve_posthoc_coefficients(*profiles, inputs[-1].nimg, stds)
    nets = [dict(load_snapshot(file.path).net.named_parameters()) for file in inputs]
    return [
        {name: sum(w * net[name].double() for w, net in zip(column, nets, strict=True)) for name in nets[0]}
        for column in weights.T
    ]


@pytest.mark.parametrize("read_bytes", [1 << 30, 40_000, 0])
@pytest.mark.parametrize("block_bytes", [4 << 20, 1])
def test_sums_do_not_depend_on_blocks_or_on_how_many_files_are_open(many, monkeypatch, read_bytes, block_bytes):
    monkeypatch.setattr(sums, "BLOCK_BYTES", block_bytes)
    stds = [0.06, 0.08]
    outputs = build(many, stds, read_bytes=read_bytes)
    last = load_snapshot(many[-1].path).net
    for output, wanted in zip(outputs, plain_sums(many, stds), strict=True):
        assert output.snapshot.net.get_parameter("unet.out_gain").shape == ()
        for name, value in output.snapshot.net.named_parameters():
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-3, atol=1e-5)
        for ours, theirs in zip(output.snapshot.net.buffers(), last.buffers(), strict=True):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_a_sum_that_float16_cannot_hold_is_refused_and_nothing_is_written(run_dir, tmp_path):
    small_snapshot(run_dir / "net-0000003-0.100.pkl", scale=float("nan"))
    with pytest.raises(ConfigError, match=r"not finite in float16 for EMA length 0\.080"):
        build(reconstruction.list_input_pickles(run_dir), [0.08], out_dir=tmp_path / OUT_DIR)
    assert not (tmp_path / OUT_DIR).exists()


def test_networks_in_memory_are_those_of_the_files(many, tmp_path):
    files = build(many, [0.06, 0.07, 0.08], out_dir=tmp_path / OUT_DIR, out_format="safetensors")
    before = sorted(tmp_path.rglob("*"))
    networks = list(reconstruction.reconstruct_networks(many, [0.08, 0.06, 0.07], max_batch_size=2))
    assert [std for std, _ in networks] == [0.06, 0.07, 0.08] and sorted(tmp_path.rglob("*")) == before
    for (std, ours), output in zip(networks, files, strict=True):
        stored = load_snapshot(output.paths[0])
        assert (ours.nimg, ours.ema_std, std) == (stored.nimg, stored.ema_std, stored.ema_std)
        assert ours.info == stored.info | {"posthoc_fit": pytest.approx(stored.info["posthoc_fit"])}
        for name, value in ours.net.state_dict().items():
            assert torch.equal(value, stored.net.state_dict()[name])
    with pytest.raises(ConfigError, match="above 0 and below"):
        reconstruction.reconstruct_networks(many, [0.4])


def own_memory():
    """Bytes of this process that are no mapped files."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def peak_growth(work):
    """By how many bytes the process grows at most while `work` is iterated."""
    peak, done = [start := own_memory()], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in work:
        time.sleep(0.002)
    done.set()
    watcher.join()
    return peak[0] - start


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_memory_does_not_grow_with_the_number_of_inputs(tmp_path, suffix):
    torch.manual_seed(0)
    net = Precond(16, 1, 0, model_channels=128, channel_mult=[2, 3], num_blocks=1, attn_resolutions=[]).eval()
    size = 2 * sum(p.numel() for p in net.parameters())
    for index in range(12):
        save_snapshot(Snapshot(net=net), tmp_path / f"net-{index + 1:07d}-0.050{suffix}")
    del net
    inputs = reconstruction.list_input_pickles(tmp_path)
    list(reconstruction.reconstruct_phema(inputs[:2], 0.05))  # what the first use of anything allocates
    growth = peak_growth(reconstruction.reconstruct_phema(inputs, [0.06, 0.08], read_bytes=0))
    # Two outputs; from pickles also their sums in float32 and two files, one of them in the form in which it is read.
    bound = size * (2 + (4 + 3 if suffix == ".pkl" else 0)) + (20 << 20)
    assert size > 10 << 20 and growth < bound < (12 if suffix == ".pkl" else 5) * size


def test_the_responses_of_the_plot_are_those_of_the_fit():
    inputs = [reconstruction.Input(path="", nimg=i << 20, std=std) for i in range(1, 9) for std in (0.05, 0.1)]
    stds = [0.03, 0.08, 0.2]
    times, stored, wanted, achieved = plot.responses(inputs, 8 << 20, stds, num=20000)
    assert (times[0], times[-1]) == (0, 8 << 20)
    for curves in (stored, wanted, achieved):
        np.testing.assert_allclose(np.trapezoid(curves, times, axis=0), 1, rtol=5e-3)
    profiles = [file.nimg for file in inputs], [file.std for file in inputs]
    weights = phema.solve_posthoc_coefficients(*profiles, 8 << 20, stds)
    fit = np.sqrt(((achieved - wanted) ** 2).sum(axis=0) / (wanted**2).sum(axis=0))
    np.testing.assert_allclose(fit, phema.posthoc_fit(*profiles, 8 << 20, stds, weights), rtol=2e-2)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_script_draws_a_panel_for_the_inputs_and_one_for_each_output(run_dir, suffix):
    path = run_dir / f"profiles{suffix}"
    result = run("--indir", run_dir, "--outdir", run_dir / "out", "--outstd=0.05,0.08,0.15", f"--plot={path}")
    assert result.exception is None and f"Profiles in {path}" in result.output
    assert sorted(p.name for p in run_dir.glob("*profiles*")) == [path.name]
    data = path.read_bytes()
    if suffix == ".png":
        pixels = np.asarray(PIL.Image.open(path).convert("RGB"), dtype=int)
        purple = (np.abs(pixels - [212, 194, 229]) < 6).all(axis=2)  # tab:purple at 40 % over white
        dark = (pixels < 60).all(axis=2)
        assert purple.mean() > 0.01 and dark.mean() > 0.005
    elif suffix == ".svg":
        assert data.decode().count('id="axes_') == 4
    else:
        assert data.startswith(b"%PDF")


def test_pickles_and_safetensors_belong_together(run_dir):
    small_snapshot(run_dir / "net-0000003-0.050.safetensors")
    assert len(build(reconstruction.list_input_pickles(run_dir), [0.08])) == 1


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
        (None, {"plot": "profiles.txt"}, "profiles.txt has none of the suffixes .png, .pdf, .svg"),
        (None, {"plot": "nowhere/profiles.png"}, "cannot write nowhere/profiles.png"),
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
    assert script.parse_std_list([0.2]) == [0.2]
    assert script.list_input_pickles is reconstruction.list_input_pickles
    for case in NUMBERS["kimg_to_nimg"]:
        assert script.kimg_to_nimg(case["kimg"]) == case["nimg"]
    assert script.pkl_path("a", "phema", 8388608, 0.05) == os.path.join("a", "phema-0008388-0.050.pkl")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pieces_of_a_file_are_those_of_its_tensors(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"any": "text"})
    with safetensors.safe_open(path, "pt") as file:
        reader = posthoc_files._file_reader(str(path), file)
        assert isinstance(reader, sums.Float16File) == (dtype == torch.float16)
        for name, value in tensors.items():
            for start in range(value.numel() + 1):
                row = torch.empty(value.numel() - start)
                reader.copy_to(row, name, start)
                assert torch.equal(row, value.flatten()[start:].float())
        if dtype == torch.float16:
            with open(path, "r+b") as cut:
                cut.truncate(path.stat().st_size - 4)
            with pytest.raises(ConfigError, match=r"net\.safetensors has become shorter"):
                reader.copy_to(torch.empty(7), "b", 0)
