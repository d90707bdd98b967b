"""Images in a format that Pillow reads by starting a program, under a usual name: every script refuses them."""

import os
import zipfile
from pathlib import Path

import click.testing
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

import calculate_metrics
import dataset_tool
import report
from tests.helpers import train_command
from tests.helpers.report_run import write_run
from tests.helpers.stand_in_detector import StandInDetector
from training.condition.source_images import FileImages
from training.dataset.image_folder import ImageFolderDataset
from training.images.png import encode_png
from training.metrics import available

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%LanguageLevel: 2
%%Pages: 1
%%EndComments
%%Page: 1 1
0 0 8 8 rectfill
showpage
%%EOF
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a Ghostscript of ours writes when it is started."""
    marker, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(PIL.EpsImagePlugin, "gs_binary", None)
    (tmp_path / "probe.eps").write_bytes(EPS)
    with pytest.raises(OSError), PIL.Image.open(tmp_path / "probe.eps") as image:
        image.load()
    assert marker.exists()
    marker.unlink()
    return marker


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A ZIP file of seven images and an EPS file, all named .png."""
    path = tmp_path / "data.zip"
    image = encode_png(np.zeros([3, 8, 8], np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(7):
            archive.writestr(f"{i}.png", image)
        archive.writestr("7.png", EPS)
    return path


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Ghostscript is a shell script")
def test_no_image_starts_a_program(tmp_path, started, data, capfd, monkeypatch):
    monkeypatch.setattr(available, "make_detector", lambda name, device, weights=None: StandInDetector(name))

    def refused(command, *args):
        result = click.testing.CliRunner().invoke(command, [str(arg) for arg in args])
        assert result.exit_code != 0
        assert "7.png" in f"{result.output}{result.exception}", args
        assert not started.exists(), args

    refused(dataset_tool.cmdline, "convert", f"--source={data}", f"--dest={tmp_path / 'out.zip'}", "--workers=1")
    refused(dataset_tool.cmdline, "inspect", data)
    ref = tmp_path / "ref.pkl"
    measured = ["--metrics=fid", "--device=cpu", "--workers=0"]
    refused(calculate_metrics.cmdline, "ref", f"--data={data}", f"--dest={ref}", *measured)
    refused(calculate_metrics.cmdline, "calc", f"--images={data}", "--metrics=is", *measured[1:], "--num=8")

    cold = ["--cond=False", "--workers=0", f"--data={data}", f"--outdir={tmp_path / 'run'}"]
    assert train_command.run(*train_command.SHORT, *cold) == 2
    assert "7.png" in capfd.readouterr().err and not started.exists()
    for read in (lambda: ImageFolderDataset(data)[7], lambda: FileImages(data, 3).read(7)):
        with pytest.raises(ValueError, match=r"7\.png"):
            read()
    folder = write_run(tmp_path / "reported")
    newest = max(folder.glob("samples-*.png"))
    newest.write_bytes(EPS)
    result = click.testing.CliRunner().invoke(report.cmdline, [str(folder)])
    assert result.exit_code == 0, result.output
    assert not started.exists()
