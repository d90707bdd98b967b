"""Runs that go on where they were interrupted: which files count, which are refused, and the same bytes at the end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngImageFile

import dnnlib.cli
import generate_images as script
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.sampling import collect, tiny_network
from torch_utils.distributed import World
from training.presets import REPOSITORY_DIR
from training.sampling.generation import generate_images
from training.sampling.output_files import KEYWORD, network_digest
from training.snapshot import load_snapshot, save_snapshot

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"  # 16x16 pixels
GUIDE = GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def generate(outdir: Path, **options: Any) -> list[int]:
    """The seeds in the batches of a run that skips what is there."""
    defaults = {"net": tiny_network(), "seeds": range(10), "max_batch_size": 3, "num_steps": 2, "device": "cpu"}
    images = generate_images(outdir=outdir, skip_existing=True, **{**defaults, **options})
    return [seed for batch in images for seed in batch.seeds]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    generate(tmp_path / "full")
    return tmp_path / "full"


def test_what_is_there_is_not_made_and_a_batch_in_pieces_becomes_the_same_bytes(full: Path):
    expected = contents(full)
    assert generate(full) == []
    for seed in (0, 1, 2, 4):  # batches of 3, 3, 2 and 2: a whole one, and one image of the next
        (full / f"{seed:06d}.png").unlink()
    untouched = (full / "000003.png").stat().st_mtime_ns
    assert generate(full) == [0, 1, 2, 3, 4, 5]
    assert contents(full) == expected
    assert (full / "000003.png").stat().st_mtime_ns == untouched


def test_files_cut_short_are_made_again_and_leftovers_go(full: Path):
    expected = contents(full)
    (full / "000009.png").write_bytes(expected["000009.png"][:-5])
    (full / ".000009.png.0123456789ab.tmp").write_bytes(b"half")
    (full / ".000077.png.0123456789ab.tmp").write_bytes(b"of another run")
    assert generate(full) == [8, 9]
    assert contents(full) == expected | {".000077.png.0123456789ab.tmp": b"of another run"}


def test_more_seeds_in_folders_of_a_thousand(tmp_path: Path):
    assert generate(tmp_path, subdirs=True, seeds=[999, 1000]) == [999, 1000]
    assert generate(tmp_path, subdirs=True, seeds=[998, 999, 1000, 1001], max_batch_size=1) == [998, 1001]
    assert sorted(contents(tmp_path)) == [
        "000000/000998.png",
        "000000/000999.png",
        "001000/001000.png",
        "001000/001001.png",
    ]


def test_files_of_other_programs_count_by_their_names(full: Path):
    for path in full.iterdir():
        PIL.Image.open(path).save(path)  # without the note
    before = contents(full)
    assert KEYWORD.encode() not in b"".join(before.values())
    assert generate(full, num_steps=3) == [] and contents(full) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3}, "num_steps 2, and this asks for 3"),
        ({"gnet": tiny_network(channels=3), "guidance": 2}, "gnet the default, and this asks for"),
        ({"class_idx": 1}, "class the default, and this asks for 1"),
        ({"solver": "euler"}, "solver the default, and this asks for euler"),
        ({"net": tiny_network(resolution=8)}, "is 3x4x4 .*, not 3x8x8"),
        ({"net": tiny_network(label_dim=4)}, "net [0-9a-f]+, and this asks for"),
        ({"sampler_fn": lambda net, noise, **_: noise}, "sampler the default, and this asks for <lambda>"),
    ],
)
def test_images_that_were_made_from_something_else_are_refused(full: Path, options: dict[str, Any], message: str):
    before = contents(full)
    (full / "000007.png").unlink()
    with pytest.raises(ConfigError, match=rf"000000\.png .*{message}.*leave out --skip-existing"):
        generate(full, **options)
    assert contents(full).items() <= before.items()


def test_what_plays_no_part_is_not_compared(full: Path):
    assert generate(full, max_batch_size=5, png_compression=6, guidance=1, gnet=tiny_network(), num_steps=2.0) == []
    assert generate(full, seeds=[5, 3], class_idx=None) == []


def test_a_file_notes_its_seed_and_class(tmp_path: Path):
    generate(tmp_path, seeds=[7], class_idx=2)
    with PIL.Image.open(tmp_path / "000007.png") as file:
        assert isinstance(file, PngImageFile)
        noted = json.loads(file.text[KEYWORD])
    digest = noted.pop("net")
    assert re.fullmatch("[0-9a-f]{16}", digest) and digest == network_digest(tiny_network())
    assert noted == {"seed": 7, "class": 2, "num_steps": 2, "device": "cpu"}


def test_a_network_is_the_same_in_either_format_and_another_one_is_not(tmp_path: Path):
    snapshot = load_snapshot(NET)
    save_snapshot(snapshot, tmp_path / "net.safetensors")
    digest = network_digest(snapshot.net)
    assert digest == network_digest(load_snapshot(tmp_path / "net.safetensors").net)
    assert digest == network_digest(snapshot.net.float())
    with torch.no_grad():
        next(iter(snapshot.net.parameters())).view(-1)[0] += 1
    assert digest != network_digest(snapshot.net) and network_digest(lambda x: x) is None


def test_processes_share_what_is_left_evenly(full: Path):
    for seed in range(6):
        (full / f"{seed:06d}.png").unlink()
    shares = [
        generate_images(
            tiny_network(), outdir=full, seeds=range(10), max_batch_size=1, num_steps=2, skip_existing=True,
            world=World(rank=rank, size=2),
        )
        for rank in range(2)
    ]  # fmt: skip
    seeds = [[seed for batch in share for seed in batch.seeds] for share in shares]
    assert seeds == [[0, 2, 4], [1, 3, 5]] and len(contents(full)) == 10


def test_without_a_folder_there_is_nothing_to_skip(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="--skip-existing looks for files in --outdir"):
        generate_images(tiny_network(), skip_existing=True)
    with pytest.raises(SystemExit) as end:
        dnnlib.cli.main(script.cmdline, [f"--net={NET}", "--grid=sheet.png", "--skip-existing"])
    assert end.value.code == 2 and "--skip-existing looks for files" in capsys.readouterr().err


def run_script(*args: Any) -> None:
    script.cmdline.main(["--device=cpu", f"--net={NET}", *map(str, args)], standalone_mode=False)


def test_a_contact_sheet_takes_what_is_there_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["--steps=2", "--seeds=0-5", "--batch=2", f"--outdir={tmp_path / 'out'}"]
    run_script(*args, f"--grid={tmp_path / 'first.png'}")
    (tmp_path / "out" / "000002.png").unlink()
    run_script(*args, f"--grid={tmp_path / 'second.png'}", "--skip-existing")
    assert "Wrote 1 images, 5 existed already" in capsys.readouterr().out
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_killed_run_goes_on_to_the_same_folder(tmp_path: Path):
    args = ["--steps=4", "--seeds=0-79", "--batch=4", "--subdirs"]
    out = tmp_path / "out"
    command = [sys.executable, REPOSITORY_DIR / "generate_images.py", "--device=cpu", f"--net={NET}", *args]
    process = subprocess.Popen(
        [str(part) for part in command] + [f"--outdir={out}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and len(list(out.rglob("*.png"))) < 6:
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=120)
    num_there = len(list(out.rglob("*.png")))
    assert 6 <= num_there < 80, errors
    run_script(*args, f"--outdir={out}", "--skip-existing")
    run_script(*args, f"--outdir={tmp_path / 'whole'}")
    assert contents(out) == contents(tmp_path / "whole")


def test_the_same_run_gives_the_same_images_with_and_without_files(full: Path):
    batches = generate_images(tiny_network(), seeds=range(10), max_batch_size=3, num_steps=2, device="cpu")
    for seed, image in enumerate(collect(batches)):
        with PIL.Image.open(full / f"{seed:06d}.png") as file:
            assert np.array_equal(np.asarray(file).transpose(2, 0, 1), image)
