"""Class-balanced runs: how often classes and images are seen, in which order, and what cannot be balanced."""

import collections
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.report_run import page_of
from tests.helpers.shards import stream
from tests.helpers.tiny import tiny_config, train, write_labels
from tests.helpers.train_command import SHORT, printed_options, run
from tests.helpers.two_brightnesses import write_flat_pictures
from torch_utils.distributed import World
from training.dataset import ImageFolderDataset
from training.dataset.order import BalancedOrder, BatchPositions
from training.run.run_folder import RunFolder
from training.snapshot import load_snapshot
from training.training_loop import TrainingRun, open_dataset

# Classes of very different sizes, in no order; nobody is in class 3.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [1, 3, 90, 17]))


def taken(num: int, labels: np.ndarray = LABELS, seed: int = 0) -> np.ndarray:
    order = BalancedOrder(labels, seed)
    return np.array([order[position] for position in range(num)])


def most_apart(counts: np.ndarray) -> int:
    """The largest difference within any row of counts [positions, things]."""
    return int((counts.max(axis=1) - counts.min(axis=1)).max())


def test_classes_are_seen_equally_often_to_within_one_at_any_time_and_to_within_two_in_any_stretch():
    seen = LABELS[taken(20_000)]
    counts = np.cumsum(seen[:, None] == np.array([0, 1, 2, 4]), axis=0)
    assert most_apart(counts) == 1
    for length in (5, 37, 1000, 4097):
        assert most_apart(counts[length:] - counts[:-length]) <= 2


def test_the_images_of_a_class_come_by_epochs_each_in_another_order():
    items = taken(20_000)
    for label in (0, 1, 2, 4):
        own = [int(item) for item in items if LABELS[item] == label]
        members = np.flatnonzero(label == LABELS).tolist()
        epochs = [tuple(own[i : i + len(members)]) for i in range(0, len(own) - len(members), len(members))]
        assert all(sorted(epoch) == members for epoch in epochs)
        counts = collections.Counter(epochs)
        if len(members) > 3:
            assert max(counts.values()) == 1
        elif len(members) == 3:  # all orders, about equally often
            assert len(counts) == 6 and max(counts.values()) < 1.3 * min(counts.values())


def test_a_round_has_the_classes_in_every_order():
    seen = LABELS[taken(4 * 24 * 200)].reshape(-1, 4)
    counts = collections.Counter(map(tuple, seen.tolist()))
    assert len(counts) == 24
    assert min(counts.values()) > 140 and max(counts.values()) < 270  # 200 each, give or take five deviations


def test_the_order_depends_on_position_and_seed_alone():
    expected = taken(9000)
    order = BalancedOrder(LABELS, 0)
    places = np.random.default_rng(1).permutation(9000)[:500]
    assert [order[int(place)] for place in places] == expected[places].tolist()
    assert not np.array_equal(taken(9000, seed=1), expected)
    far = 10**10  # a run may be long
    assert [order[far + i] for i in range(9)] == [BalancedOrder(LABELS, 0)[far + i] for i in range(9)]


def test_two_processes_then_one_then_two_see_the_same_as_one():
    start, seen = 0, []
    for size in (2, 1, 2):
        dealt = [
            iter(BatchPositions(BalancedOrder(LABELS, 0), start=start, batch_size=8, rank=r, num_ranks=size))
            for r in range(size)
        ]
        seen += [image for _ in range(5) for rank in dealt for image in next(rank)]
        start += 5 * 8
    assert seen == taken(120).tolist()


@pytest.mark.parametrize("num_classes", [1, 1000, 5000])
def test_a_million_images_take_little_memory(num_classes: int):
    labels = np.random.default_rng(0).zipf(1.5, 1_000_000) % num_classes
    classes = np.unique(labels)
    tracemalloc.start()
    order = BalancedOrder(labels, 0)
    items = [order[position] for position in range(3 * len(classes))]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 9e6 + 1000 * len(classes) and peak < 40e6 + 1000 * len(classes)
    assert collections.Counter(labels[items].tolist()) == dict.fromkeys(classes.tolist(), 3)


def test_mirrored_copies_count_as_images(tmp_path: Path):
    data = write_flat_pictures(tmp_path / "data.zip", num_dark=6, num_bright=2)
    dataset = ImageFolderDataset(data, xflip=True)
    assert dataset.item_labels().tolist() == [int(dataset.get_label(i).argmax()) for i in range(16)]
    with dataset.order(0, balance=True) as order:
        seen = [order[position] for position in range(24)]
    counts = collections.Counter(seen)
    assert [counts[item] for item in (6, 7, 14, 15)] == [3] * 4  # bright, and their mirror images
    assert {counts[item] for item in range(16) if item not in (6, 7, 14, 15)} == {1}
    assert stream(data.as_uri(), xflip=True).item_labels().tolist() == dataset.item_labels().tolist()


def test_an_unconditional_run_can_be_balanced_by_the_labels_of_its_data(tmp_path: Path):
    data = write_flat_pictures(tmp_path / "data.zip", num_dark=18, num_bright=2)
    config = tiny_config(data, cond=False, balance=True, duration=16, snapshot=16, snapshot_format="safetensors")
    trained = train(TrainingRun(config, RunFolder(tmp_path / "run"), world=World()))
    with trained.dataset.order(0, balance=True) as order:
        labels = trained.dataset.item_labels()[[order[position] for position in range(100)]]
    assert labels.sum() == 50
    snapshot = load_snapshot(next((tmp_path / "run").glob("*.safetensors")))
    assert snapshot.net.label_dim == 0
    assert snapshot.info["balance"] is True and snapshot.dataset_kwargs == {
        "class_name": "training.dataset.ImageFolderDataset",
        "path": str(data),
        "use_labels": False,
        "xflip": False,
    }


def test_the_run_reads_the_balanced_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_flat_pictures(tmp_path / "data.zip", num_dark=18, num_bright=2)
    read: list[int] = []
    plain = ImageFolderDataset.read_batch

    def read_batch(self: Any, indices: Any, out: Any = None) -> Any:
        read.extend(indices)
        return plain(self, indices, out)

    monkeypatch.setattr(ImageFolderDataset, "read_batch", read_batch)
    train(TrainingRun(tiny_config(data, balance=True, seed=5), RunFolder(tmp_path / "run"), world=World()))
    order = BalancedOrder(open_dataset(tiny_config(data, balance=True)).item_labels(), 5)
    assert read == [order[position] for position in range(len(read))] and len(read) >= 48


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (None, [], "has no labels, which --balance needs"),
        (None, ["--cond=False"], "has no labels, which --balance needs"),
        ([[0.5, 0.5], [1.0, 0.0]], [], "--balance needs class indices as labels, and those of"),
    ],
)
def test_what_has_no_classes_is_refused_in_one_line_with_nothing_written(labels, options, message, tmp_path, capsys):
    data = write_labels(tmp_path / "data.zip", labels)
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--balance", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_shards_behind_a_url_are_refused_before_anything_is_fetched(tmp_path, capsys):
    url = "https://localhost:1/set-*.zip"
    assert run(*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={url}", "--balance") == 2
    error = capsys.readouterr().err
    assert (
        f"--balance needs all images on a local disk, but --data={url} is streamed" in error and error.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_the_options_are_shown_recorded_and_not_to_be_changed_in_a_run(tmp_path, capsys):
    data = write_labels(tmp_path / "data.zip", [0, 0, 0, 2])
    args = [*SHORT, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--status=16"]
    assert run(*args, "--balance", "--label-dropout=0.1", "-n") == 0
    text = capsys.readouterr().out
    assert (
        "Classes:               3, seen equally often (5 to 15 images each, 1 without any);"
        " labels are left out with probability 0.1\n" in text
    )
    assert (printed_options(text)["balance"], printed_options(text)["label_dropout"]) == (True, 0.1)
    assert run(*args, "--balance", "--label-dropout=0.1") == 0
    assert json.loads((tmp_path / "run" / "training_options.json").read_text())["balance"] is True
    _, page = page_of(tmp_path / "run")
    assert "balance true" in page.text and "label_dropout 0.1" in page.text
    capsys.readouterr()
    assert run(*args, "--duration=40") == 2
    error = capsys.readouterr().err
    assert "balance: True in the run, False asked for; label_dropout: 0.1 in the run, 0.0 asked for" in error
    assert run(*args, "--balance", "--label-dropout=0.1", "--duration=40") == 0


def test_bounds_of_the_order_hold_for_small_sets_by_brute_force():
    for sizes in itertools.product((0, 1, 2, 5), repeat=3):
        labels = np.repeat(np.arange(3), sizes)
        if len(labels):
            items = taken(300, labels)
            present = np.flatnonzero(sizes)
            assert most_apart(np.cumsum(labels[items][:, None] == present, axis=0)) <= 1
            for label in present:
                members = np.flatnonzero(labels == label)
                assert most_apart(np.cumsum(items[np.isin(items, members)][:, None] == members, axis=0)) <= 1
