"""Sampling from pictures: which picture goes with which image, files in and out, and the command lines that do it."""

import json
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import pytest
import torch

import calculate_metrics
import dnnlib.cli
import generate_images as generate_script
import reconstruct_phema
import sweep
import train_edm2
from dnnlib.errors import ConfigError
from edm2.report.next_commands import commands_for
from edm2.report.record import read_run
from tests.helpers.small_network import small_network
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import tiny_config, train, write_dataset
from torch_utils.distributed import World
from training.condition.source_images import FileImages
from training.fast.prepare import PrepareNetwork
from training.metrics import available as plan
from training.run.run_folder import RunFolder
from training.sampling.generation import generate_images
from training.sharing.write_folder import save_folder
from training.snapshot import Snapshot, load_snapshot, save_snapshot
from training.training_loop import TrainingRun

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, [4, 16, 16, 3], dtype=np.uint8)
HOLE = np.zeros([16, 16], dtype=bool)
HOLE[3:9, 5:12] = True


def command(script: click.Command, *args: Any) -> int:
    try:
        dnnlib.cli.main(script, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def write(folder: Path, pictures: Any, suffix: str = "png") -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        PIL.Image.fromarray(picture).save(folder / f"{index}.{suffix}")
    return folder


def reduced(pixels: np.ndarray) -> np.ndarray:
    """By 4, halves up."""
    sums = pixels.reshape(-1, 4, 4, 4, 4, 3).astype(int).sum((2, 4))
    return ((sums + 8) // 16).astype(np.uint8)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained networks of 16x16 pixels, of five classes where their name does not say otherwise."""
    folder = tmp_path_factory.mktemp("nets")
    kinds: dict[str, tuple[str | None, dict[str, Any]]] = {
        "lowres": ("lowres:4", {"cond_channels": 3}),
        "lowres2": ("lowres:2", {"cond_channels": 3, "num_blocks": 0}),
        "inpaint": ("inpaint:0.1-0.5", {"cond_channels": 4, "label_dim": 0}),
        "grey": ("inpaint", {"cond_channels": 2, "img_channels": 1, "label_dim": 0}),
        "plain": (None, {}),
        "silent": (None, {"cond_channels": 3}),
        "wrong": ("inpaint", {"cond_channels": 3}),
    }
    for name, (condition, options) in kinds.items():
        info = {} if condition is None else {"condition": condition}
        save_snapshot(Snapshot(net=small_network(**options).eval(), info=info), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in kinds}


def made(net: Path, seeds: Any, **options: Any) -> np.ndarray:
    options = {"num_steps": 2, "device": "cpu", "prepare": PrepareNetwork()} | options
    batches = [b for b in generate_images(str(net), seeds=seeds, **options) if b.images is not None]
    return np.concatenate([b.images.numpy() for b in batches]).transpose(0, 2, 3, 1)


def test_small_pictures_and_full_ones_that_are_reduced_give_the_same(nets, tmp_path):
    full, small = write(tmp_path / "full", PICTURES), write(tmp_path / "small", reduced(PICTURES))
    first, second = (made(nets["lowres"], range(4), source=source, class_idx=1) for source in (full, small))
    assert np.array_equal(first, second)
    other = made(nets["lowres"], range(4), source=write(tmp_path / "other", PICTURES[::-1].copy()), class_idx=1)
    assert not np.array_equal(first, other)


def test_pictures_come_from_a_file_a_folder_or_an_archive(nets, tmp_path):
    folder = write(tmp_path / "folder", PICTURES)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    expected = made(nets["lowres"], range(4), source=folder, class_idx=0)
    assert np.array_equal(made(nets["lowres"], range(4), source=tmp_path / "all.zip", class_idx=0), expected)
    one = made(nets["lowres"], [7, 0], source=folder / "0.png", class_idx=0)
    assert np.array_equal(one[1], expected[0])


def test_pictures_go_to_the_seeds_in_turn_whatever_the_batch(nets, tmp_path):
    folder = write(tmp_path / "folder", PICTURES[:3])
    whole = made(nets["lowres"], range(8), source=folder, class_idx=0)
    assert (
        np.abs(made(nets["lowres"], range(8), source=folder, class_idx=0, max_batch_size=3).astype(int) - whole).max()
        <= 1
    )
    for position in (0, 4, 7):
        alone = made(nets["lowres"], [position], source=folder / f"{position % 3}.png", class_idx=0)
        assert np.abs(alone[0].astype(int) - whole[position]).max() <= 1


def test_known_pixels_are_those_of_the_picture_to_the_bit(nets, tmp_path):
    alpha = np.where(HOLE, 0, 255).astype(np.uint8)
    clear = write(tmp_path / "clear", [np.dstack([picture, alpha]) for picture in PICTURES])
    opaque = write(tmp_path / "opaque", PICTURES)
    mask = tmp_path / "mask.png"
    PIL.Image.fromarray((HOLE * 255).astype(np.uint8)).save(mask)
    masks = write(tmp_path / "masks", [(HOLE * 255).astype(np.uint8)] * 4)
    found = [
        made(nets["inpaint"], range(4), source=clear),
        made(nets["inpaint"], range(4), source=opaque, masks=mask),
        made(nets["inpaint"], range(4), source=opaque, masks=masks),
    ]
    for images in found:
        assert np.array_equal(images[:, ~HOLE], PICTURES[:, ~HOLE])
        assert np.array_equal(images, found[0])
    assert (found[0][:, HOLE] != PICTURES[:, HOLE]).mean() > 0.9
    more = np.zeros_like(HOLE)
    more[0, :4] = True
    PIL.Image.fromarray((more * 255).astype(np.uint8)).save(mask)  # beside what is transparent
    both = made(nets["inpaint"], range(4), source=clear, masks=mask)
    assert np.array_equal(both[:, ~(HOLE | more)], PICTURES[:, ~(HOLE | more)])
    assert (both[:, more] != PICTURES[:, more]).mean() > 0.5


def test_grey_networks_take_any_picture_as_grey(nets, tmp_path):
    grey = np.asarray(PIL.Image.fromarray(PICTURES[0]).convert("L"))
    mask = tmp_path / "mask.png"
    PIL.Image.fromarray(np.dstack([(HOLE * 255).astype(np.uint8)] * 3)).save(mask)
    colours, plain = write(tmp_path / "colours", PICTURES[:1]), write(tmp_path / "plain", [grey])
    images = [made(nets["grey"], [0], source=source, masks=mask)[0, :, :, 0] for source in (colours, plain)]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0][~HOLE], grey[~HOLE])


def test_images_have_the_classes_of_a_labelled_data_set(nets, tmp_path):
    data = write_dataset(tmp_path / "data.zip", num=5, size=16)
    classes = FileImages(data, 3).classes
    assert classes == [0, 1, 2, 0, 1]
    expected = made(nets["lowres"], range(5), source=data, class_idx=classes)
    assert np.array_equal(made(nets["lowres"], range(5), source=data), expected)
    assert not np.array_equal(made(nets["lowres"], range(5), source=data, class_idx=4), expected)


def test_skip_existing_knows_the_pictures(nets, tmp_path):
    folder = write(tmp_path / "folder", PICTURES[:2])
    options = {"outdir": tmp_path / "out", "skip_existing": True, "class_idx": 0}
    first = made(nets["lowres"], [0, 1], source=folder, **options)
    record = json.loads(PIL.Image.open(tmp_path / "out" / "000000.png").info["generate_images"])
    assert len(record["source"]) == 16
    again = generate_images(
        str(nets["lowres"]),
        seeds=range(3),
        source=folder,
        num_steps=2,
        device="cpu",
        prepare=PrepareNetwork(),
        **options,
    )
    assert again.existing == frozenset({0, 1})
    assert first.shape == (2, 16, 16, 3)
    PIL.Image.fromarray(PICTURES[3]).save(folder / "1.png")
    with pytest.raises(ConfigError, match="source"):
        made(nets["lowres"], [0, 1], source=folder, **options)
    with pytest.raises(ConfigError, match="seed 0 is asked for with two source images"):
        made(nets["lowres"], [0, 0], source=folder, **options)


def test_guides_see_the_pictures_or_do_without(nets, tmp_path):
    folder = write(tmp_path / "folder", PICTURES[:1])
    options = {"source": folder, "guidance": 1.5, "class_idx": 0}
    alone = made(nets["lowres"], [0], source=folder, class_idx=0)
    assert np.abs(made(nets["lowres"], [0], gnet=str(nets["lowres"]), **options).astype(int) - alone).max() <= 1
    assert not np.array_equal(made(nets["lowres"], [0], gnet=str(nets["plain"]), **options), alone)
    refused = {
        "lowres2": "the guide was trained with --condition=lowres:2, the main network with lowres:4",
        "inpaint": "--condition=inpaint:0.1-0.5, the main network with lowres:4",
    }
    for guide, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            made(nets["lowres"], [0], gnet=str(nets[guide]), **options)
    with pytest.raises(ConfigError, match="the guide is conditioned on images, and the main network is not"):
        made(nets["plain"], [0], gnet=str(nets["lowres"]), guidance=1.5)


def mistakes(nets: dict[str, Path], tmp: Path) -> dict[str, tuple[list[Any], str]]:
    full, odd = write(tmp / "full", PICTURES), write(tmp / "odd", [np.zeros([9, 9, 3], np.uint8)])
    small = write(tmp / "small", reduced(PICTURES))
    two_masks = write(tmp / "two", [np.full([16, 16], 255, np.uint8)] * 2)
    small_mask, black = tmp / "smallmask.png", tmp / "black.png"
    PIL.Image.fromarray(np.full([8, 8], 255, np.uint8)).save(small_mask)
    PIL.Image.fromarray(np.zeros([16, 16], np.uint8)).save(black)
    (tmp / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp / "empty").mkdir()
    (tmp / "text.txt").write_text("no pictures")
    lowres, inpaint = f"--net={nets['lowres']}", f"--net={nets['inpaint']}"
    return {
        "no pictures": ([lowres], "trained with --condition=lowres:4; give it images by --source=PATH"),
        "pictures for another network": ([f"--net={nets['plain']}", f"--source={full}"], "leave out --source"),
        "masks alone": ([inpaint, f"--masks={black}"], "add --source=PATH"),
        "missing": ([lowres, f"--source={tmp / 'nowhere'}"], "nowhere does not exist"),
        "missing masks": ([inpaint, f"--source={full}", f"--masks={tmp / 'nowhere'}"], "--masks="),
        "empty folder": ([lowres, f"--source={tmp / 'empty'}"], "contains no images"),
        "no archive": ([lowres, f"--source={tmp / 'text.txt'}"], "text.txt"),
        "damaged": ([lowres, f"--source={tmp / 'broken.png'}"], "broken.png cannot be read"),
        "another size": ([lowres, f"--source={odd}"], "give small images of 4x4, or full ones of 16x16"),
        "size to fill": ([inpaint, f"--source={small}"], "4x4 pixels; the network fills images of 16x16"),
        "masks for lowres": ([lowres, f"--source={full}", f"--masks={black}"], "is for networks that inpaint"),
        "nothing hidden": ([inpaint, f"--source={full}"], "nothing is hidden in"),
        "black mask": ([inpaint, f"--source={full}", f"--masks={black}"], "nothing is hidden in"),
        "number of masks": ([inpaint, f"--source={full}", f"--masks={two_masks}"], "2 images for the 4"),
        "size of a mask": ([inpaint, f"--source={full}", f"--masks={small_mask}"], "smallmask.png is 8x8"),
        "a file that does not say": ([f"--net={nets['silent']}", f"--source={full}"], "does not say of which kind"),
        "a file that lies": ([f"--net={nets['wrong']}", f"--source={full}"], "which inpaint:0.1-0.5 does not make"),
    }


def test_mistakes_are_one_line_and_exit_code_2(nets, tmp_path, capsys):
    for name, (args, message) in mistakes(nets, tmp_path).items():
        out = tmp_path / "out"
        assert command(generate_script.cmdline, "--device=cpu", "--steps=2", f"--outdir={out}", *args) == 2, name
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error, (name, error)
        assert not out.exists(), name


def test_training_and_sampling_by_command_line_for_both_conditions(tmp_path, capsys):
    data = write_dataset(tmp_path / "data.zip", size=16)
    train = ["--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1"]
    train += ["--batch=8", "--duration=16", "--rampup=0", f"--data={data}", "--format=safetensors", "--snapshot=16"]
    pictures = write(tmp_path / "pictures", PICTURES[:3])
    PIL.Image.fromarray((HOLE * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    for kind, more in (("lowres:4", []), ("inpaint", [f"--masks={tmp_path / 'mask.png'}"])):
        run = tmp_path / kind[:3]
        assert command(train_edm2.train_edm2, *train, f"--outdir={run}", f"--condition={kind}") == 0
        capsys.readouterr()
        out, sheet = run / "images", run / "sheet.png"
        args = [f"--net={run / 'network-snapshot-0000000.016-0.050.safetensors'}", f"--source={pictures}", *more]
        args += ["--device=cpu", "--steps=2", "--seeds=0-5", f"--outdir={out}", f"--grid={sheet}"]
        assert command(generate_script.cmdline, *args) == 0
        assert "Wrote 6 images" in capsys.readouterr().out
        images = [np.asarray(PIL.Image.open(path)) for path in sorted(out.glob("*.png"))]
        grid = np.asarray(PIL.Image.open(sheet))
        gap = (grid.shape[1] - 3 * 16) // 4
        tiles = [
            grid[t : t + 16, x : x + 16]
            for t in range(gap, len(grid), 16 + gap)
            for x in range(gap, grid.shape[1], 16 + gap)
        ]
        for index in range(3):  # a picture and the two images that were made from it
            seen, first, second = tiles[3 * index : 3 * index + 3]
            assert np.array_equal(first, images[index]) and np.array_equal(second, images[index + 3])
            if kind == "inpaint":
                assert np.array_equal(seen, np.where(HOLE[:, :, None], 128, PICTURES[index]))
                assert np.array_equal(first[~HOLE], PICTURES[index][~HOLE])
            else:
                assert np.array_equal(seen[::4, ::4], reduced(PICTURES[index : index + 1])[0])
        assert command(generate_script.cmdline, *args, "--skip-existing") == 0
        assert "6 existed already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--condition=lowres:5", "does not divide images of 16x16 pixels; use lowres:2, lowres:4"),
        ("--condition=blur", "condition 'blur' is unknown"),
        ("--condition=inpaint:0.9-0.1", "0 < MIN <= MAX <= 1"),
    ],
)
def test_conditions_that_cannot_be_are_refused_before_anything_is_written(option, message, tmp_path, capsys):
    data = write_dataset(tmp_path / "data.zip", size=16)
    args = ["--device=cpu", f"--data={data}", f"--outdir={tmp_path / 'run'}", "--dry-run", option]
    assert command(train_edm2.train_edm2, *args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_metrics_sweeps_and_reports_of_a_conditioned_run(tmp_path, monkeypatch, capsys):
    """A reconstructed network knows its condition; a sweep scores it as `calculate_metrics.py gen` scores its file."""
    monkeypatch.setattr(plan, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    data, indir = write_dataset(tmp_path / "data.zip", num=16), tmp_path / "run"
    config = tiny_config(
        data, condition="lowres:2", batch=256, duration=2048, snapshot=1024, snapshot_format="safetensors"
    )
    RunFolder(indir).start(config, nimg=0)
    train(TrainingRun(config, RunFolder(indir), world=World()))
    measuring = [
        f"--ref={tmp_path / 'ref.safetensors'}",
        "--metrics=fd_efflite0",
        "--num=8",
        "--steps=2",
        "--device=cpu",
    ]
    reference = ["ref", f"--data={data}", f"--dest={tmp_path / 'ref.safetensors'}", "--metrics=fd_efflite0"]
    assert command(calculate_metrics.cmdline, *reference, "--workers=0", "--device=cpu") == 0

    sweeping = [f"--indir={indir}", "--outstd=0.08", f"--json={tmp_path / 'sweep.json'}", *measuring]
    assert command(sweep.cmdline, *sweeping) == 2
    assert "give it images by --source" in capsys.readouterr().err
    assert command(sweep.cmdline, *sweeping, f"--source={data}") == 0
    assert f"--source={data}" in capsys.readouterr().out  # the command that makes such images
    (point,) = json.loads((tmp_path / "sweep.json").read_text())["points"]

    reconstructing = [f"--indir={indir}", f"--outdir={tmp_path / 'phema'}", "--outstd=0.08"]
    assert command(reconstruct_phema.cmdline, *reconstructing) == 0
    net = tmp_path / "phema" / "phema-0000002-0.080.pkl"
    assert load_snapshot(net).info["condition"] == "lowres:2"
    gen = ["gen", f"--net={net}", f"--json={tmp_path / 'gen.json'}", "--repeat=2", *measuring]
    assert command(calculate_metrics.cmdline, *gen) == 2
    assert "give it images by --source" in capsys.readouterr().err
    assert command(calculate_metrics.cmdline, *gen, f"--source={data}") == 0
    result = json.loads((tmp_path / "gen.json").read_text())
    assert result["source"]["path"] == str(data) and len(result["source"]["sha256"]) == 64
    first = result["results"]["fd_efflite0"]["values"][0]
    assert point["values"]["fd_efflite0"][0] == pytest.approx(first, rel=1e-3)

    told = [text for _, text in commands_for(read_run(indir)) if "generate_images.py" in text or " sweep.py" in text]
    assert len(told) == 3 and all("--source=IMAGES" in text and "--masks" not in text for text in told)


def test_a_network_that_is_no_file_is_told_its_condition(nets, tmp_path):
    folder = write(tmp_path / "folder", PICTURES[:1])
    net = load_snapshot(nets["lowres"]).net
    options: dict[str, Any] = {"seeds": [0], "source": folder, "device": "cpu", "num_steps": 2, "class_idx": 0}
    (batch,) = generate_images(net, condition="lowres:4", **options)
    expected = made(nets["lowres"], [0], source=folder, class_idx=0)
    assert batch.images is not None
    assert torch.allclose(batch.images.permute(0, 2, 3, 1).float(), torch.from_numpy(expected).float(), atol=1)
    with pytest.raises(ConfigError, match="does not say"):
        generate_images(net, **options)


def test_the_diffusers_pipeline_gives_the_same_images(nets, tmp_path):
    diffusers = pytest.importorskip("edm2.diffusers")
    folder = write(tmp_path / "folder", PICTURES[:2])
    pictures = [PIL.Image.fromarray(picture) for picture in PICTURES[:2]]
    mask = PIL.Image.fromarray((HOLE * 255).astype(np.uint8))
    mask.save(tmp_path / "mask.png")
    save_folder(load_snapshot(nets["inpaint"]), tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert 'image="images", mask_image="masks"' in card and "--source=images --masks=masks" in card
    expected = {
        "lowres": made(nets["lowres"], [3, 5, 8], source=folder, class_idx=1),
        "inpaint": made(nets["inpaint"], [3, 5, 8], source=folder, masks=tmp_path / "mask.png"),
    }
    for name, source in (("lowres", nets["lowres"]), ("inpaint", nets["inpaint"]), ("inpaint", tmp_path / "shared")):
        pipeline = diffusers.EDM2Pipeline.from_network(source)
        pipeline.set_progress_bar_config(disable=True)
        more: dict[str, Any] = {"class_labels": 1} if name == "lowres" else {"mask_image": mask}
        call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "return_dict": False, **more}
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 5, 8)]
        images, _ = pipeline(image=pictures, **call)
        assert np.abs(images * 255 - expected[name]).max() < 1.01, name
        paths = {"image": folder} | ({"mask_image": tmp_path / "mask.png"} if name == "inpaint" else {})
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 5, 8)]
        assert np.array_equal(pipeline(**{**call, **paths})[0], images)
        with pytest.raises(ConfigError, match="give it images by image=PATH"):
            pipeline(num_inference_steps=2)
    assert len(pipeline(image=pictures, mask_image=mask, num_inference_steps=2).images) == 2
    for wrong in ({"image": [3]}, {"image": pictures, "mask_image": [mask] * 3}, {"mask_image": mask}, {"image": []}):
        with pytest.raises(ConfigError):
            pipeline(num_inference_steps=2, **wrong)
