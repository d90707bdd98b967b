"""dataset_tool.py convert as a user calls it: what it prints, and the same files from any number of processes."""

import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

import dataset_tool
from dnnlib.cli import main
from dnnlib.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.ranks import run_ranks
from torch_utils.distributed import World
from training.conversion.convert import ConvertOptions, DatasetConversion
from training.dataset import ImageFolderDataset

REPOSITORY_DIR = ROOT
RNG = np.random.default_rng(11)


@pytest.fixture
def images(tmp_path):
    """Thirty images of two classes."""
    for i in range(30):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def run(capfd, *args):
    """Exit code, stdout and stderr of `dataset_tool.py convert`, in this process."""
    try:
        main(dataset_tool.cmdline, ["convert", *map(str, args)])
        code = 0
    except SystemExit as request:
        code = request.code
    return code, *capfd.readouterr()


@pytest.fixture(autouse=True)
def _keep_signals():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def launched(*args, ranks=1):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, REPOSITORY_DIR / "dataset_tool.py", "convert", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_folder_becomes_a_zip_that_others_open(images, tmp_path):
    process = launched(f"--source={images}", f"--dest={tmp_path / 'out.zip'}", "--resolution=16x16", "--workers=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'out.zip'}: 30 images of 16x16; 2 classes: a (15), b (15)\n"
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        assert file.testzip() is None and len(file.namelist()) == 31


def test_a_tilde_in_an_option_is_the_home_folder(images, tmp_path, capfd, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    images.rename(home / "images")
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    code, _, error = run(capfd, "--source=~/images", "--dest=~/out.zip", "--resolution=16x16", "--workers=1")
    assert code == 0, error
    assert (home / "out.zip").exists() and not (tmp_path / "~").exists()


def test_what_is_left_out_is_listed_and_counted(images, tmp_path, capfd):
    (images / "a/bad.png").write_bytes(b"text")
    PIL.Image.new("RGB", (8, 8)).save(images / "b/small.png")
    code, out, err = run(
        capfd,
        f"--source={images}",
        f"--dest={tmp_path / 'out'}",
        "--resolution=16x8",
        "--transform=center-crop-wide",
        "--on-error=skip",
        "--workers=1",
    )
    assert code == 0
    assert out.endswith(
        "30 images of 16x16; left out 1 that are smaller; left out 1 that cannot be read; 2 classes: a (15), b (15)\n"
    )
    assert f"Left out: {images}: a/bad.png cannot be read: " in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "Missing option '--source'"),
        (["--source={0}/missing", "--dest={0}/out.zip"], "missing does not exist"),
        (["--source={0}/images", "--dest={0}/out.zip"], "24x20, which is not square; add --resolution=16x16"),
        (
            ["--source={0}/images", "--dest={0}/out.zip", "--resolution=64"],
            "--resolution=64 is not a size; write width and height",
        ),
        (["--source={0}/images", "--dest={0}/out.zip", "--resolution=0x0"], "is not a size"),
        (["--source={0}/images", "--dest={0}/out.zip", "--shard-size=10XB"], "'10XB' is not a size; write bytes"),
        (["--source={0}/images", "--dest={0}/out.zip", "--transform=center-crop"], "add --resolution=WxH"),
        (["--source={0}/images", "--dest={0}/images/out", "--resolution=16x16"], "lies inside of --source"),
        (["--source={0}/images", "--dest={0}/out.zip", "--resolution=16x16", "--shards=31"], "try --shards=30"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(images, tmp_path, capfd, args, told):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capfd, *(arg.format(tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert told in err and err.startswith("Error: ") and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")
def test_a_stopped_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    PIL.Image.fromarray(RNG.integers(0, 256, (1200, 1200, 3), dtype=np.uint8)).save(source / "0.jpg")
    for i in range(1, 2000):
        os.link(source / "0.jpg", source / f"{i}.jpg")
    process = launched(f"--source={source}", f"--dest={tmp_path / 'new/out.zip'}", "--resolution=16x16", "--workers=2")
    for _ in range(600):
        time.sleep(0.1)
        # Workers are there once images come from them; one that is stopped while it starts tells of it on stderr.
        if (tmp_path / "new").exists() and any(path.stat().st_size for path in (tmp_path / "new").iterdir()):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_write_the_shards_of_one(images, tmp_path, capfd):
    options = [f"--source={images}", "--resolution=16x16", "--shards=3", "--workers=1"]
    printed = run_ranks("dataset_tool.py", "convert", *options, f"--dest={tmp_path / 'two/set.zip'}")
    line = f"{tmp_path / 'two/set.zip'}: 30 images of 16x16 in 3 files; 2 classes: a (15), b (15)"
    assert line in printed.splitlines() and printed.count("Next: python train_edm2.py") == 1
    assert run(capfd, *options, f"--dest={tmp_path / 'one/set.zip'}")[0] == 0
    names = [f"set-{i:05d}.zip" for i in range(3)]
    for place in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / place).iterdir()) == names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_mistake_that_one_process_meets_leaves_nothing_of_any(images, tmp_path):
    (images / "b/29.png").write_bytes(b"text")  # in the last shard
    options = [f"--source={images}", f"--dest={tmp_path / 'new/set.zip'}", "--resolution=16x16", "--workers=1"]
    process = launched(*options, "--shards=2", ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Error (process 1): " in err and "b/29.png cannot be read" in err
    assert not list((tmp_path / "new").glob("*"))


def test_several_processes_need_shards(images, tmp_path, monkeypatch):
    options = ConvertOptions(source=images, dest=tmp_path / "out.zip", resolution=(16, 16))
    with pytest.raises(ConfigError, match=r"2 processes cannot write one file together; add --shards=2"):
        DatasetConversion(options, World(rank=1, size=2))


def test_transparent_and_dark_images_are_told_and_options_change_them(tmp_path, capfd):
    source = tmp_path / "source"
    source.mkdir()
    rgba = np.full((8, 8, 4), 99, dtype=np.uint8)
    rgba[:, :, 3] = 255
    rgba[:4, :, 3] = 0
    PIL.Image.fromarray(rgba).save(source / "0.png")
    PIL.Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(source / "1.png")
    common = [f"--source={source}", "--workers=1"]
    code, out, err = run(capfd, *common, f"--dest={tmp_path / 'a.zip'}")
    assert code == 0 and "1 of the images have transparent pixels" in out and "--range=0,1000 makes" in out, err
    options = ["--background=#00ff00", "--range=0,2000"]
    code, out, err = run(capfd, *common, *options, f"--dest={tmp_path / 'b.zip'}")
    assert code == 0 and "now on #00ff00" in out and "--range" not in out, err
    images = [image for image, _ in ImageFolderDataset(tmp_path / "b.zip")]
    assert images[0][:, 0, 0].tolist() == [0, 255, 0] and images[0][:, 7, 0].tolist() == [99, 99, 99]
    assert (images[1] == 128).all()
    for wrong in ("--background=no-color", "--range=1", "--range=5,1", "--range=0,inf"):
        code, _, err = run(capfd, *common, wrong, f"--dest={tmp_path / 'c.zip'}")
        assert code == 2 and wrong.partition("=")[0] in err and not (tmp_path / "c.zip").exists()
