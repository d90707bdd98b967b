"""`dataset_tool.py inspect`: everything that is wrong with a data set, and whether training agrees."""

import io
import json
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from dnnlib.cli import main
from training.conversion.inspect import Inspection, describe
from training.dataset import ImageFolderDataset

RNG = np.random.default_rng(9)


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def image(size=8):
    return png(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8))


def write(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    return path


def inspected(path):
    inspection = Inspection(path)
    assert len(list(inspection)) == len(inspection)
    return inspection.report


@pytest.fixture
def sound(tmp_path):
    """Eight images, two of class 0, six of class 2."""
    files = {f"{i}.png": image() for i in range(8)}
    labels = {"labels": [[f"{i}.png", 0 if i < 2 else 2] for i in range(8)]}
    return write(tmp_path / "sound.zip", {**files, "dataset.json": labels})


def test_counts_and_moments_of_a_sound_data_set(sound):
    report = inspected(sound)
    assert report.accepted and not report.damaged and not report.duplicates
    assert (report.num_items, report.other_files, report.shapes) == (8, 1, {"8x8x3": 8})
    assert report.classes == {0: 2, 2: 6}
    pixels = ImageFolderDataset(sound).read_batch(range(8))[0].astype(float)
    assert np.allclose(report.mean, pixels.mean((0, 2, 3))) and np.allclose(report.std, pixels.std((0, 2, 3)))
    assert any("1 classes below 2 have no images: 1" in note for note in report.notes)
    text = describe(report)
    assert "8 of 8x8, 3 channels" in text and "Training would take this data set." in text


def test_everything_wrong_is_listed_at_once(tmp_path):
    twin = image()
    files = {"a.png": twin, "b.png": twin, "c.png": image(16), "d.png": b"text", "e.png": image()[:90]}
    path = write(tmp_path / "bad.zip", {**files, "dataset.json": {"labels": [["a.png", 0]]}})
    report = inspected(path)
    assert not report.accepted
    assert report.shapes == {"8x8x3": 2, "16x16x3": 1} and report.duplicates == [["a.png", "b.png"]]
    assert [line.split(":")[0] for line in report.damaged] == ["d.png", "e.png"]
    for part in ("no label for 4 of 5 images", "2 items cannot be read", "2 different sizes", "for example c.png"):
        assert sum(part in problem for problem in report.problems) == 1, part
    assert "Training would not take this data set." in describe(report)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a.png": png(np.zeros((12, 12), np.uint8))}, "12x12"),
        ({"a.png": png(np.zeros((8, 16), np.uint8))}, "16x8"),
        ({"a.png": png(np.zeros((8, 8), np.uint8)), "b.npy": npy(np.zeros((8, 8, 8), np.float32))}, "are mixed"),
        ({"a.npy": npy(np.zeros((6, 8, 8), np.float32))}, "latents of 6 channels"),
        ({"a.npy": npy(np.full((8, 8, 8), np.nan, np.float32))}, "not finite"),
        ({"a.png": png(np.zeros((8, 8), np.uint8)), "dataset.json": b"{"}, "not JSON"),
    ],
)
def test_each_problem_by_its_name(tmp_path, files, problem):
    report = inspected(write(tmp_path / "a.zip", files))
    assert not report.accepted and any(problem in text for text in report.problems)


def test_a_damaged_entry_of_an_archive(sound):
    data = bytearray(sound.read_bytes())
    with zipfile.ZipFile(sound) as archive:
        data[archive.getinfo("3.png").header_offset + 30 + 5 + 60] ^= 255
    sound.write_bytes(data)
    report = inspected(sound)
    assert report.damaged == ["3.png: its checksum does not fit"] and not report.accepted


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (3.0, True)])
def test_latents_are_held_against_what_their_encoder_assumes(tmp_path, scale, told):
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])  # the published VAE's
    files = {}
    for i in range(10):
        means = mean[:, None, None] + 0.8 * std[:, None, None] * RNG.standard_normal((4, 16, 16))
        raw = np.concatenate([means * scale, np.broadcast_to(0.6 * std[:, None, None] * scale, (4, 16, 16))])
        files[f"{i}.npy"] = npy(raw.astype(np.float32))
    report = inspected(write(tmp_path / "z.zip", files))
    assert report.accepted and report.kind == "latents"
    assert np.allclose(report.latents["mean"], mean * scale, atol=0.5 * scale)
    assert np.allclose(report.latents["std"], std * scale, rtol=0.1)  # 0.8^2 + 0.6^2 = 1
    assert np.allclose(report.latents["assumed mean"], mean, atol=1e-4)
    assert np.allclose(report.latents["assumed std"], std, atol=1e-4)
    assert any("far from what their encoder assumes" in note for note in report.notes) == told


def test_one_channel_is_one(tmp_path):
    gray = png(np.zeros((8, 8), np.uint8))
    assert "1 of 8x8, 1 channel\n" in describe(inspected(write(tmp_path / "a.zip", {"a.png": gray})))


def test_many_classes_are_summed_up(tmp_path):
    one = image()
    files = {f"{i}.png": one for i in range(60)}
    labels = {"labels": [[f"{i}.png", i // 2] for i in range(60)]}
    assert "30 classes, by number of images" in describe(
        inspected(write(tmp_path / "a.zip", {**files, "dataset.json": labels}))
    )


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_names_that_lead_out_of_the_archive(sound, name):
    with zipfile.ZipFile(sound, "a") as archive:
        archive.writestr(name, image())
    report = inspected(sound)
    assert not report.accepted and any("leads out of its folder" in text for text in report.problems)


def test_what_only_opening_shows(tmp_path):
    for i in range(2):
        files = {f"{i}.png": image(), "dataset.json": {"labels": [[f"{i}.png", 0]], "shard": [i, 3]}}
        write(tmp_path / f"a-{i:05d}.zip", files)
    report = inspected(tmp_path / "a.zip")
    assert not report.accepted and "2 of 3 shards" in report.problems[0]


def test_the_exit_code_as_a_shell_sees_it(sound, tmp_path):
    bad = write(tmp_path / "bad.zip", {"a.png": b"?"})
    for path, code in [(sound, 0), (bad, 1), (tmp_path / "no.zip", 2)]:
        with pytest.raises(SystemExit) as end:
            main(dataset_tool.cmdline, ["inspect", str(path)])
            raise SystemExit(0)
        assert end.value.code == code


def test_the_command_says_by_its_exit_code(sound, tmp_path):
    def run(*args):
        return CliRunner().invoke(dataset_tool.cmdline, ["inspect", *map(str, args)])

    result = run(sound, "--json", tmp_path / "r.json", "--grid", tmp_path / "new" / "g.png")
    assert result.exit_code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["accepted"], record["kind"]) == (True, "pictures")
    with PIL.Image.open(tmp_path / "new" / "g.png") as sheet:
        assert sheet.size == (8 * 10 + 2, 12)
    assert run(write(tmp_path / "bad.zip", {"a.png": b"?"})).exit_code == 1


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ["cat/0.png", "dog/1.png"],
            "there is no dataset.json, so training would see no labels; {} makes a data set with",
        ),
        (["cat/0.png", "dog/1.png", "2.png"], "dataset_tool.py convert would refuse the labels: {}"),
        (["0.png", "1.png"], "the images have no labels: training needs --cond=False"),
    ],
)
def test_notes_on_raw_images_tell_what_convert_would_find(tmp_path, names, note):
    for name in names:
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(image())
    report = inspected(tmp_path / "raw")
    start, _, end = note.partition("{}")
    assert any(text.startswith(start) and end in text for text in report.notes)
    by_folders = [text for text in report.notes if "2 classes: cat (1), dog (1)" in text]
    assert len(by_folders) == (names == ["cat/0.png", "dog/1.png"])
    assert not any(text.startswith("--") or "; --" in text for text in report.notes)  # options without their command
