"""Data sets of the user's own through train_edm2.py."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from dnnlib.errors import ConfigError
from dnnlib.own_part import OwnPart
from tests.helpers.own_parts import in_folder_of_examples, saved_tensors
from tests.helpers.tiny import assert_same_state, write_dataset
from tests.helpers.train_command import SHORT, run
from training.own.own_dataset import OwnItems
from training.snapshot import read_header

FILES = ["--snapshot=16", "--checkpoint=16", "--format=safetensors"]

OWN = """
import numpy as np
from training.dataset.image_folder import ImageFolderDataset


class Again:
    def __init__(self, path, labels=True):
        self.source = ImageFolderDataset(path)
        if labels:
            self.labels = self.source.item_labels()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        return image, int(label.argmax())


class Darker(ImageFolderDataset):
    def __init__(self, path, use_labels=True, xflip=False, factor=0.5):
        super().__init__(path, use_labels=use_labels, xflip=xflip)
        self.factor = factor

    def _load(self, raw_idx):
        return (super()._load(raw_idx) * self.factor).astype(np.uint8)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "own_data_of_test.py").write_text(OWN)
    write_dataset(tmp_path / "data.zip")
    with in_folder_of_examples(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("labels", [True, False])
def test_the_same_images_through_a_class_train_the_same_network(labels):
    options = ["--data=data.zip", *SHORT, *FILES, "--xflip=True", "--balance"]
    own = ["--dataset=own_data_of_test:Again", f"--dataset-args=labels={labels}"]
    assert run("--outdir=ours", *options) == 0
    assert run("--outdir=own", *options, *own) == 0
    assert_same_state(saved_tensors("ours"), saved_tensors("own"))
    kwargs = read_header("own/network-snapshot-0000000.032-0.050.safetensors").dataset_kwargs
    assert kwargs["class_name"] == "own_data_of_test:Again" and kwargs["args"] == {"labels": labels}


@pytest.mark.parametrize("args", [["--dataset=discs:Discs", "--dataset-args=num=20,side=8"],
                                  ["--dataset=own_data_of_test:Darker", "--data=data.zip"]])  # fmt: skip
def test_a_run_on_own_data_continues_to_the_bit(args):
    for outdir, *more in (("whole",), ("parts", "--slice=16"), ("parts",)):
        assert run(f"--outdir={outdir}", *SHORT, *FILES, *args, *more) == 0
    assert_same_state(saved_tensors("whole"), saved_tensors("parts"))


@pytest.mark.slow
def test_workers_read_own_data():
    args = [*SHORT, *FILES, "--dataset=discs:Discs", "--dataset-args=num=20,side=8"]
    assert run("--outdir=none", *args) == 0
    assert run("--outdir=one", *args, "--workers=1") == 0
    assert_same_state(saved_tensors("none"), saved_tensors("one"))


def test_a_run_does_not_continue_on_other_items(capsys):
    args = ["--outdir=run", *SHORT, *FILES, "--dataset=discs:Discs"]
    assert run(*args, "--dataset-args=num=20,side=8", "--slice=16") == 0
    assert run(*args, "--dataset-args=num=30,side=8", "--allow-changes") == 0
    Path("discs.py").write_text(Path("discs.py").read_text().replace("0.15", "0.25"))
    capsys.readouterr()


def items_of(values: list, **attributes: object) -> OwnItems:
    class Items(list):
        pass

    items = Items(values)
    items.__dict__.update(attributes)
    return OwnItems(OwnPart(option="dataset", name="own:Items"), items, use_labels=True, xflip=False)


def image(value: int = 0) -> np.ndarray:
    return np.full([3, 8, 8], value, dtype=np.uint8)


def test_labels_are_indices_or_vectors_from_an_attribute_or_the_items():
    assert items_of([image(), image()]).label_dim == 0
    assert items_of([(image(), 1), (image(), 3)]).item_labels().tolist() == [1, 3]
    assert items_of([image(), image()], labels=[0, 1]).has_onehot_labels
    vectors = items_of([(image(), [0.5, 1]), (image(), [2, 3])])
    assert vectors.label_dim == 2 and vectors[1][1].tolist() == [2, 3]
    assert items_of([(image(), np.float32([1])), (image(), np.float32([2]))]).item_labels().shape == (2, 1)
    latents = items_of([np.zeros([8, 4, 4], dtype=np.float32)])
    assert latents.holds_latents and latents[0][0].dtype == np.float32


def test_fingerprints_tell_items_apart_and_survive_pickling():
    one, two = items_of([image(1), image(2)]), items_of([image(1), image(3)])
    assert one.fingerprint() == items_of([image(1), image(2)]).fingerprint() != two.fingerprint()
    dataset = OwnItems(OwnPart(option="dataset", name="own:x"), [image(1)], use_labels=True, xflip=True)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[1][0], dataset[1][0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "has no items"),
        ([np.zeros([8, 8], dtype=np.uint8)], "its item 0 is uint8 [8, 8]"),
        ([np.zeros([3, 8, 8])], "its item 0 is float64 [3, 8, 8]"),
        (["a.png"], "its item 0 is a str"),
        ([(image(), 0.5)], "its labels are float64 [1]"),
        ([(image(), -1)], "its labels are int64 [1]"),
        ([np.zeros([3, 8, 4], dtype=np.uint8)], "images must be square"),
    ],
)
def test_items_that_do_not_fit_are_named(values, expected):
    with pytest.raises(ConfigError) as error:
        items_of(values)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no class or function 'Data'"),
        ("class Data:\n    def __init__(self, root): pass", "missing 1 required positional argument: 'root'"),
        ("class Data: pass", "len(dataset) raises TypeError"),
        ("class Data:\n    def __len__(self): return 3", "dataset[0] raises TypeError"),
        ("class Data(list):\n    def __init__(self): super().__init__([1])", "its item 0 is a int"),
    ],
)
def test_a_data_set_that_does_not_fit_ends_in_one_line(text, expected, folder, capsys):
    (folder / "wrong_data.py").write_text(text)
    assert run("--outdir=run", *SHORT, *FILES, "--dataset=wrong_data:Data") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and "--dataset=wrong_data:Data" in lines[0], lines
    assert not Path("run").exists()


def test_an_item_unlike_the_first_is_named_before_the_run(folder, capsys):
    (folder / "uneven_data.py").write_text(
        "import numpy as np\n\ndef Data():\n"
        "    return [np.zeros([3, 8 + i // 9, 8 + i // 9], np.uint8) for i in range(10)]\n"
    )
    assert run("--outdir=run", *SHORT, *FILES, "--dataset=uneven_data:Data", "--cond=False") == 2
    assert "item 9 of --dataset=uneven_data:Data is uint8 [3, 9, 9], but item 0" in capsys.readouterr().err
