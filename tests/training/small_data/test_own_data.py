"""docs/own-data.md as it is written, command after command, on a tiny set of drawn pictures in place of the emoji."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch

import training.metrics.detectors
from tests.helpers.paths import ROOT
from tests.helpers.stand_in_detector import StandInDetector
from training.dataset.image_folder import ImageFolderDataset
from training.metrics import available as plan
from training.small_data import estimate

PAGE = ROOT / "docs" / "own-data.md"

# What makes a command small: options in the place of its own (the second list, only where it has them).
TINY = "--channels=4 --channel-mult=1,1,1 --num-blocks=1 --attn-resolutions=8 --batch=512 --duration=2Ki --snapshot=1Ki"
SMALL = {
    "train_edm2.py": (f"{TINY} --checkpoint=1Ki --status=1Ki --rampup=0", "--samples=1 --samples-steps=2"),
    "dataset_tool.py convert": ("--workers=1", ""),
    "dataset_tool.py encode": ("--model-url=./vae", ""),
    "calculate_metrics.py ref": ("--workers=0", ""),
    "calculate_metrics.py gen": ("--num=12 --steps=2", ""),
    "calculate_metrics.py calc": ("--num=12 --workers=0", ""),
    "sweep.py": ("--num=12 --steps=2 --outstd=0.05,0.1", "--guidance=1,2"),
    "reconstruct_phema.py": ("", ""),
    "generate_images.py": ("--seeds=0-8 --steps=2", ""),
}
DURATION = 54  # Ki, of the page's run
NOT_RUN = ("npm ", "tar ")  # the test draws what they bring


def commands() -> list[str]:
    """The commands of the page's blocks, each in one line."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in found if not language]
    return [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines() if line]


def made_small(words: list[str]) -> list[str]:
    """The command with its options replaced, and the training times in file names by those of the tiny run."""
    key = next((key for key in SMALL if " ".join(words).startswith(key)), None)
    put, instead = SMALL[key] if key is not None else ("", "")
    for option in put.split():
        words = [word for word in words if word.partition("=")[0] != option.partition("=")[0]] + [option]
    for option in instead.split():
        words = [option if word.partition("=")[0] == option.partition("=")[0] else word for word in words]
    text = "\n".join(words)
    text = re.sub(r"(network-snapshot)-(\d{7})-", lambda name: f"{name[1]}-{tiny_kimg(int(name[2]))}-", text)
    text = re.sub(r"(out/emoji)-\d{7}-\d\.\d{3}", rf"\1-0000002-{best_std():.3f}", text)
    return text.split("\n")


def tiny_kimg(kimg: int) -> str:
    """The training time in a file's name: the end of the run stays its end, all else is its first snapshot."""
    return "0000002" if kimg == DURATION * 1024 // 1000 else "0000001"


def best_std() -> float:
    """The length that the page reconstructs, as the tiny run does."""
    found = re.search(r"reconstruct_phema\.py .*--outstd=([0-9.]+)", "\n".join(commands()))
    assert found is not None
    return float(found[1])


def run(words: list[str]) -> None:
    with mock.patch.object(sys, "argv", words):
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0), f"exit code {end.code}: {' '.join(words)}"


def draw(size: int, shape: str, seed: int, *, alpha: bool) -> PIL.Image.Image:
    """A shape of one colour, on nothing."""
    rng = np.random.default_rng(seed)
    picture = PIL.Image.new("RGBA", (size, size), (0, 0, 0, 0) if alpha else (200, 220, 240, 255))
    pen = PIL.ImageDraw.Draw(picture)
    left, top = (int(x) for x in rng.integers(size // 8, size // 4, 2))
    box = (left, top, left + size // 2, top + size // 2)
    colour = tuple(int(x) for x in rng.integers(0, 256, 3))
    getattr(pen, shape)(box, fill=(*colour, 255))
    return picture


def draw_package(path: Path) -> None:
    """The npm package's layout, with three categories of drawn shapes, skin tones, and one to be left out."""
    pictures = path / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    emoji: list[dict[str, object]] = []
    for category, shape in (("Food & Drink", "ellipse"), ("Flags", "rectangle"), ("Symbols", "ellipse")):
        for _ in range(10):
            name = f"{len(emoji):04x}.png"
            draw(64, shape, len(emoji), alpha=True).save(pictures / name)
            emoji.append({"category": category, "image": name})
    draw(64, "ellipse", 99, alpha=True).save(pictures / "tone.png")
    emoji[0]["skin_variations"] = {"1F3FB": {"image": "tone.png"}, "1F3FC": {"image": "missing.png"}}
    emoji.append({"category": "Component", "image": "0000.png"})
    (path / "emoji.json").write_text(json.dumps(emoji), encoding="utf-8")


def draw_photos(path: Path) -> None:
    for name, shape in (("disks", "ellipse"), ("boxes", "rectangle")):
        (path / name).mkdir(parents=True)
        for index in range(2):
            draw(300, shape, index, alpha=False).convert("RGB").save(path / name / f"{index}.png")


def make_vae(path: Path) -> None:
    """A VAE with the geometry of the published one, 8 pixels to a latent of 4 channels, and hardly any weights."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=1,
        )
        vae.save_pretrained(path)


@pytest.mark.slow
def test_the_chain_of_the_page_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    for module in (training.metrics.detectors, plan):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    monkeypatch.setattr(estimate, "_MEASURE_SEC", 0)
    monkeypatch.setattr(estimate, "_CPU_OPS", 1e8)
    draw_package(tmp_path / "package")
    draw_photos(tmp_path / "photos")
    make_vae(tmp_path / "vae")
    ran = []
    for command in commands():
        if not command.startswith(NOT_RUN):
            program, *words = shlex.split(command)
            assert program == "python", command
            run(made_small(words))
            ran.append(words[0])
    assert {"data/sort_emoji.py", "data/nearest.py", *(key.partition(" ")[0] for key in SMALL), "report.py"} == set(ran)

    assert sorted(path.name for path in (tmp_path / "emoji").iterdir()) == ["flags", "food-drink", "symbols"]
    assert len(list((tmp_path / "emoji" / "food-drink").iterdir())) == 11  # with a skin tone
    first, _ = ImageFolderDataset(tmp_path / "datasets" / "emoji.zip")[0]
    assert (first[:, 0, 0] == 255).all()  # transparent in the source
    options = json.loads((tmp_path / "training-runs" / "emoji" / "training_options.json").read_text())
    assert (options["P_mean"], options["lr"], options["cond"]) == (-0.8, 0.012, True)
    text = capsys.readouterr().out
    assert "Chosen for 31 images of 32x32, 3 classes:" in text and "Chosen for 4 latents of 32x32, 2 classes:" in text
    assert {path.name for path in (tmp_path / "out" / "emoji").iterdir()} == {f"{seed:06d}.png" for seed in range(9)}
    for name in ("emoji-data.png", "emoji-nearest.png", "emoji-ema.png", "emoji-guidance.png", "emoji.png"):
        PIL.Image.open(tmp_path / "out" / name).verify()
    assert "9 generated images: distance to the nearest training image" in text
    assert len(re.findall(r"^fd_efflite0 +12 +[0-9.]+$", text, re.MULTILINE)) == 4  # before, after, real ones twice


def test_the_page_names_files_that_the_chain_makes():
    """Each snapshot is from a multiple of the snapshot interval, the network from the end of the run."""
    text = " ".join(commands())
    duration, interval = (int(re.search(rf"--{name}=(\d+)Ki", text)[1]) for name in ("duration", "snapshot"))
    assert duration % interval == 0 and duration == DURATION
    kimgs = {n * 1024 // 1000 for n in range(interval, duration + 1, interval)}
    assert {int(found) for found in re.findall(r"network-snapshot-(\d{7})-", text)} <= kimgs
    assert {int(found) for found in re.findall(r"out/emoji-(\d{7})-", text)} == {duration * 1024 // 1000}


def test_the_distance_to_a_picture_is_that_of_a_loop_and_to_itself_none():
    nearest = runpy.run_path(str(ROOT / "data" / "nearest.py"))
    a, b = (np.random.default_rng(seed).integers(0, 256, [3, 3, 4, 4], dtype=np.uint8) for seed in (0, 1))
    found = nearest["rms_distances"](a, np.concatenate([a, b]))
    assert np.diag(found) == pytest.approx([0, 0, 0], abs=1e-6)
    assert found[2, 4] == pytest.approx(float(np.sqrt(np.mean((a[2].astype(float) - b[1]) ** 2))))
