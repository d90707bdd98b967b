"""Labels of folders, ZIP files and tars: found by one rule, shown by name, and never lost or changed in silence."""

import io
import json
import os
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from dnnlib.errors import ConfigError
from tests.helpers.sources import pack
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.image_set import ImageSet
from training.streaming.streamed import StreamedDataset


def png(value=0, size=8):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


CATS = {"cats/0.png": png(1), "cats/1.png": png(2), "dogs/0.png": png(3)}


def convert(source, *options):
    """Run `dataset_tool.py convert`; return its last lines, the labels and the names of the classes."""
    dest = source.parent / "out.zip"
    words = ["convert", f"--source={source}", f"--dest={dest}", "--workers=1", "--overwrite", *options]
    result = CliRunner().invoke(dataset_tool.cmdline, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
    labels = content["labels"] and [label for _, label in content["labels"]]
    return result.stdout, labels, content.get("classes")


def refused(source, *options):
    with pytest.raises(ConfigError) as caught:
        convert(source, *options)
    assert not (source.parent / "out.zip").exists()
    return str(caught.value)


def stream(path):
    url = f"{path.parent.as_uri()}/{path.name}"
    return StreamedDataset(url, buffer=9, cache_dir=str(path.parent / "cache"), cache_bytes=1 << 20)


KINDS = ["set", "set.zip", "set.tar"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("end", ["/", "\\"])
def test_class_folders_count_in_every_kind_of_source_with_any_kind_of_slash(tmp_path, name, end):
    if name == "set" and os.name == "nt":
        pytest.skip("a backslash is a slash there")
    files = {key.replace("/", end): data for key, data in CATS.items()} | {f"__MACOSX{end}._a.png": b"", f"x{end}": b""}
    if name == "set":
        files.pop(f"x{end}")
    text, labels, classes = convert(pack(tmp_path / name, files))
    assert (labels, classes) == ([0, 0, 1], ["cats", "dogs"])
    assert "3 images of 8x8; 2 classes: cats (2), dogs (1)\n" in text and "Note" not in text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ends", ["/\\", "\\/", "\\\\"])
def test_a_dataset_json_and_its_files_may_have_either_slash(tmp_path, name, ends):
    files = {f"00000{ends[0]}{i}.png": png(i) for i in range(3)}
    pairs = [[f".{ends[1]}00000{ends[1]}{i}.png", 2 - i] for i in range(3)]
    path = pack(tmp_path / name, {**files, "dataset.json": {"labels": pairs}})
    assert convert(path)[1] == [2, 1, 0]
    opened = stream(path) if name == "set.tar" else ImageFolderDataset(path)
    assert opened.item_labels().tolist() == [2, 1, 0]
    assert [opened[i][0].max() for i in range(3)] == [0, 1, 2]
    if name == "set.zip":
        assert stream(path).item_labels().tolist() == [2, 1, 0]
    if name != "set.tar":
        assert ImageSet(path).names == [f"00000/{i}.png" for i in range(3)]


def test_shards_with_backslashes_are_one_data_set(tmp_path):
    for i in range(2):
        entry = {f"a\\{i}.png": png(i), "dataset.json": {"labels": [[f"a\\{i}.png", i]]}}
        pack(tmp_path / f"set-{i:05d}.zip", entry)
    assert convert(tmp_path / "set.zip")[1] == [0, 1]
    assert ImageFolderDataset(tmp_path / "set.zip").item_labels().tolist() == [0, 1]
    assert stream(tmp_path / "set-*.zip").item_labels().tolist() == [0, 1]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", [{"0.png": 1, "1.png": 0}, {"labels": {"0.png": 1, "1.png": 0}}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mapping_of_files_to_classes_is_read_in_any_unicode(tmp_path, name, text, encoding):
    files = {"0.png": png(), "1.png": png(), "dataset.json": json.dumps(text).encode(encoding)}
    path = pack(tmp_path / name, files)
    assert convert(path)[1] == [1, 0]
    if name != "set.tar":
        assert ImageFolderDataset(path).item_labels().tolist() == [1, 0]
    if name != "set":
        assert stream(path).item_labels().tolist() == [1, 0]


@pytest.mark.parametrize("name", KINDS)
def test_names_as_labels_become_classes_in_sorted_order(tmp_path, name):
    files = {**{f"{i}.png": png() for i in range(3)}, "dataset.json": {"0.png": "dog", "1.png": "ant", "2.png": "dog"}}
    path = pack(tmp_path / name, files)
    assert convert(path)[1:] == ([1, 0, 1], ["ant", "dog"])
    opened = ImageFolderDataset(path) if name == "set" else stream(path)
    assert (opened.item_labels().tolist(), opened.class_names) == ([1, 0, 1], ["ant", "dog"])
    assert opened.label_dim == 2


def test_names_as_labels_mean_the_same_class_in_all_shards(tmp_path):
    for i, labels in enumerate((["dog", "cat"], ["emu", "dog"])):
        files = {f"{2 * i + j}.png": png() for j in range(2)}
        labels = [[name, label] for name, label in zip(files, labels, strict=True)]
        pack(tmp_path / f"set-{i:05d}.zip", {**files, "dataset.json": {"labels": labels}})
    expected = ([1, 0, 2, 1], ["cat", "dog", "emu"])
    assert convert(tmp_path / "set.zip")[1:] == expected
    for opened in (ImageFolderDataset(tmp_path / "set.zip"), *(stream(tmp_path / "set-*.zip") for _ in range(2))):
        assert (opened.item_labels().tolist(), opened.class_names) == expected


def test_a_list_of_classes_gives_names_their_numbers(tmp_path):
    content = {"classes": ["emu", "dog", "cat"], "labels": [["0.png", "cat"], ["1.png", "dog"]]}
    path = pack(tmp_path / "set", {"0.png": png(), "1.png": png(), "dataset.json": content})
    assert convert(path)[1:] == ([2, 1], ["emu", "dog", "cat"])


@pytest.mark.parametrize("name", KINDS)
def test_the_label_files_of_a_webdataset_count_everywhere(tmp_path, name):
    files = {"a.png": png(), "a.cls": "dog\n", "b.png": png(), "b.json": {"label": "cat"}}
    assert convert(pack(tmp_path / name, files))[1:] == ([1, 0], ["cat", "dog"])


def test_dots_in_names_do_not_make_one_sample_of_two_images(tmp_path):
    files = {f"{name}s/{name}.{i}.png": png() for name in ("cat", "dog") for i in range(2)}
    assert convert(pack(tmp_path / "set.tar", files))[1] == [0, 0, 1, 1]


@pytest.mark.parametrize("missing", [None, -1])
def test_null_and_minus_one_stand_for_no_label(tmp_path, missing):
    path = pack(
        tmp_path / "all", {"0.png": png(), "1.png": png(), "dataset.json": {"0.png": missing, "1.png": missing}}
    )
    text, labels, _ = convert(path)
    assert labels is None and text.endswith("2 images of 8x8; no labels\n")
    assert not ImageFolderDataset(path).has_labels
    (tmp_path / "out.zip").unlink()
    path = pack(tmp_path / "some", {"0.png": png(), "1.png": png(), "dataset.json": {"0.png": 0, "1.png": missing}})
    assert "no label for 1 of 2 images, first 1.png" in refused(path) and "--no-labels" in refused(path)
    assert convert(path, "--no-labels")[1] is None


INDICES = ([1, 0], None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("metadata.csv", "file_name,label\n0.png,7\nx/1.png,0\n", ([7, 0], None)),
        ("metadata.csv", 'file_name,text,label\r\n0.png,"a, b",dog\r\nx\\1.png,c,cat\r\n', ([1, 0], ["cat", "dog"])),
        ("metadata.jsonl", '\ufeff{"file_name": "0.png", "label": 1}\n\n{"file_name": "x/1.png", "label": 0}', INDICES),
        ("metadata.csv", "file_name,label\n0.png,-1\nx/1.png,\n", (None, None)),
    ],
)  # fmt: skip
def test_the_metadata_of_hugging_face_image_folders(tmp_path, name, file, text, expected):
    path = pack(tmp_path / name, {"0.png": png(), "x/1.png": png(), file: text})
    assert convert(path)[1:] == expected


def test_metadata_in_folders_and_other_columns(tmp_path):
    rows = {
        "train/metadata.csv": "file_name,kind\n0.png,b\n",
        "test/metadata.jsonl": '{"file_name": "0.png", "kind": "a"}',
    }
    path = pack(tmp_path / "set", {"train/0.png": png(), "test/0.png": png(), **rows})
    assert convert(path, "--label=kind")[1:] == ([0, 1], ["a", "b"])
    text, _, classes = convert(path)
    assert classes == ["test", "train"] and "metadata.csv has no column label or labels and is not used" in text
    (tmp_path / "out.zip").unlink()
    assert "choose one by --label=file_name|kind" in refused(path, "--label=sort")
    assert "no file with a column 'x'" in refused(pack(tmp_path / "bare", CATS), "--label=x")


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("metadata.csv", "file_name,label\n0.png,7\n", "no label for 1 of 2 images, first 1.png"),
        ("metadata.csv", "file_name,label\n0.png,7\n1.png,8\n1.png,9\n", "gives 1.png two labels, 8 and 9"),
        ("metadata.csv", "file_name,text,label\n0.png,a, b,dog\n1.png,c,cat\n", "row 2 has more fields"),
        ("metadata.csv", b"\xff\xff", "is not a CSV table in UTF-8"),
        ("metadata.csv", "file_name,label\n0,7\n1,7\n", "none of the images that its metadata names, such as 0"),
        ("metadata.csv", "file_name,label\n../0.png,7\n", "leads out of its folder"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 1}\n{', "metadata.jsonl, line 2, is not JSON"),
        ("metadata.jsonl", "[]", "line 1, must be a JSON object"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, file, text, told):
    path = pack(tmp_path / "set", {"0.png": png(), "1.png": png(), file: text})
    assert told in refused(path)
    assert convert(path, "--no-labels")[1] is None


SPLITS = {f"{split}/{name}/0.png": png() for split in ("Train", "val") for name in ("cat", "dog")}


@pytest.mark.parametrize("name", KINDS)
def test_folders_of_splits_are_noted_with_the_option_that_takes_those_below(tmp_path, name):
    path = pack(tmp_path / name, SPLITS)
    text, labels, classes = convert(path)
    assert (labels, classes) == ([0, 0, 1, 1], ["Train", "val"])
    assert "Note: Train, val are often parts of a data set" in text
    assert "--label-level=2 takes the folders below as classes: cat, dog" in text
    text, labels, classes = convert(path, "--label-level=2")
    assert (labels, classes) == ([0, 1, 0, 1], ["cat", "dog"]) and "Note" not in text


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_around_the_classes_is_noted_in_the_same_way(tmp_path, name):
    path = pack(tmp_path / name, {f"pics/{key}": data for key, data in CATS.items()})
    text, labels, _ = convert(path)
    assert labels is None and "no labels\nNote: all folders are in one, pics" in text and "--label-level=2" in text
    assert convert(path, "--label-level=2")[1:] == ([0, 0, 1], ["cats", "dogs"])
    assert convert(path, "--label-level=1")[1:] == ([0, 0, 0], ["pics"])
    (tmp_path / "out.zip").unlink()
    assert "no images 3 folders deep" in refused(path, "--label-level=3")
    json_below = pack(
        tmp_path / f"b{name}", {"p/0.png": png(), "p/1.png": png(), "p/dataset.json": {"0.png": 1, "1.png": 0}}
    )
    assert convert(json_below)[1] == [1, 0]


def test_numbered_folders_without_their_dataset_json_are_noted(tmp_path):
    path = pack(tmp_path / "set", {f"{i:05d}/img{i:08d}.png": png() for i in range(2)})
    assert "like those of a data set without its dataset.json; --no-labels" in convert(path)[0]


def test_options_that_contradict_each_other_or_do_not_fit_the_source(tmp_path):
    path = pack(tmp_path / "set", CATS)
    for options in (["--no-labels", "--label-level=1"], ["--label=x", "--label-level=1"], ["--no-labels", "--label=x"]):
        assert "contradict each other" in refused(path, *options)
    assert "--no-labels leaves out" in refused(path, "--no-labels", "--balanced", "--max-images=2")
    assert f"--source={path}/cats takes a folder of it" in refused(path, "--split=cats")
    pack(tmp_path / "mnist", {"train-images-idx3-ubyte": b"\0\0\x08\x03" + bytes([0, 0, 0, 1] * 3) + b"\0"})
    assert "is not an option for the kind of source" in refused(tmp_path / "mnist", "--label-level=1")


def test_without_labels_on_demand_nothing_of_them_is_read(tmp_path):
    text, labels, classes = convert(pack(tmp_path / "set", {**CATS, "dataset.json": "{"}), "--no-labels")
    assert (labels, classes) == (None, None) and text.endswith("; no labels\n")


def test_classes_without_names_many_classes_and_vectors(tmp_path):
    names = [f"{i}.png" for i in range(12)]
    files = dict.fromkeys(names, png())
    text = convert(pack(tmp_path / "many", {**files, "dataset.json": {name: i for i, name in enumerate(names)}}))[0]
    assert "12 classes: 0 (1), 1 (1)" in text and "9 (1) and 2 more\n" in text
    text = convert(pack(tmp_path / "vectors", {**files, "dataset.json": {name: [0.5, 1] for name in names}}))[0]
    assert text.endswith("labels are vectors of 2\n")


def test_images_that_are_left_out_do_not_count(tmp_path):
    text = convert(pack(tmp_path / "set", {**CATS, "cats/2.png": b"?"}), "--on-error=skip")[0]
    assert "left out 1 that cannot be read; 2 classes: cats (2), dogs (1)" in text


# Links.


@pytest.fixture
def linked(tmp_path):
    """A folder with one class of its own and one behind a link."""
    pack(tmp_path / "store", CATS)
    pack(tmp_path / "set", {"emus/0.png": png(4)})
    try:
        (tmp_path / "set/cats").symlink_to(tmp_path / "store/cats", target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make symbolic links")
    return tmp_path / "set"


def test_links_to_folders_are_followed_by_all_readers(linked):
    assert convert(linked)[1:] == ([0, 0, 1], ["cats", "emus"])
    assert ImageSet(linked).names == ["cats/0.png", "cats/1.png", "emus/0.png"]
    pack(linked, {"dataset.json": {"cats/0.png": 0, "cats/1.png": 0, "emus/0.png": 1}})
    assert [int(image.max()) for image, _ in ImageFolderDataset(linked)] == [1, 2, 4]
    assert "3 images" in CliRunner().invoke(dataset_tool.cmdline, ["inspect", str(linked)]).stdout


def test_loops_of_links_end(linked):
    (linked / "emus/up").symlink_to("..", target_is_directory=True)
    (linked / "emus/self").symlink_to(".", target_is_directory=True)
    assert convert(linked)[1] == [0, 0, 1]


def test_links_to_nowhere_are_named(linked):
    (linked / "dogs").symlink_to(linked.parent / "gone", target_is_directory=True)
    assert f"{linked / 'dogs'} is a link to {linked.parent / 'gone'}, which does not exist" in refused(linked)
    (linked / "dogs").unlink()
    (linked / "dogs").symlink_to("dogs")  # to itself
    assert "which does not exist" in refused(linked)


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(pack(tmp_path / "set.zip", CATS), "a") as archive:
        entry = zipfile.ZipInfo("emus")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/store/emus")
    assert "emus is a symbolic link" in refused(tmp_path / "set.zip")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path, scandir = pack(tmp_path / "set", CATS), os.scandir

    def denied(folder):
        if str(folder).endswith("dogs"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert f"{path / 'dogs'} cannot be read: Permission denied" in refused(path)


# Names that are patterns elsewhere.


@pytest.mark.parametrize("name", ["faces[v2].zip", "a*b.zip", "what?.zip", "[0-9].ZIP"])
def test_shards_are_opened_by_the_name_that_made_them(tmp_path, name):
    if os.name == "nt" and set(name) & set("*?"):
        pytest.skip("no file can have this name there")
    words = ["convert", f"--source={pack(tmp_path / 'set', CATS)}", f"--dest={tmp_path / name}", "--workers=1"]
    for more in ([], ["--overwrite"]):
        assert CliRunner().invoke(dataset_tool.cmdline, [*words, "--shards=2", *more]).exit_code == 0
    (tmp_path / "axb-00000.zip").write_bytes(b"of another data set")
    opened = ImageFolderDataset(tmp_path / name)
    assert (opened.item_labels().tolist(), opened.class_names) == ([0, 0, 1], ["cats", "dogs"])
    assert convert(tmp_path / name)[1] == [0, 0, 1]
    assert len(ImageSet(tmp_path / name)) == 3


def test_streamed_patterns_have_stars_only(tmp_path):
    for name in ("faces[v2]-0.zip", "faces[v2]-1.zip", "v*.zip", "v2.zip"):
        pack(tmp_path / name, {"0.png": png()})
    for name, count in (("faces[v2]-*.zip", 2), ("v*.zip", 1), ("faces[v2]-{0..1}.zip", 2)):
        assert len(stream(tmp_path / name)) == count
