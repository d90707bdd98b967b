"""Data sets behind URLs: the same items and labels as from the disk, in an order that only the position decides."""

import builtins
import dataclasses
import functools
import importlib
import io
import itertools
import os
import socket
import ssl
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click.testing
import fsspec
import numpy as np
import PIL.Image
import pytest
import torch

import train_edm2
from dnnlib.errors import ConfigError
from tests.helpers.shard_server import ShardServer, serve
from tests.helpers.shards import (
    COUNTS,
    TOTAL,
    cached,
    leftovers,
    one_line_error,
    plain_order,
    png,
    stream,
    write_shards,
    write_tar,
)
from tests.helpers.tiny import assert_same_state, tiny_config, train, write_dataset
from torch_utils.distributed import World
from training.dataset import BatchReader, ImageDataset, ImageFolderDataset
from training.dataset.order import BatchPositions
from training.run.run_folder import RunFolder
from training.streaming import remote
from training.streaming import streamed as stream_module
from training.streaming.streamed import expand_url
from training.training_loop import Saved, TrainingRun


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SEC", 0.01)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "data")


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with serve(folder) as running:
        yield running


def assert_same_items(actual: ImageDataset, expected: ImageDataset, indices: Sequence[int]) -> None:
    for a, b in zip(actual.read_batch(indices), expected.read_batch(indices), strict=True):
        assert np.array_equal(a, b)


# Items and labels.


@pytest.mark.parametrize("xflip", [False, True])
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_items_and_labels_are_those_of_the_same_files_on_the_disk(
    folder: Path, server: ShardServer, scheme: str, xflip: bool
):
    url = f"{server.url}/set-{{00000..00004}}.zip" if scheme == "http" else f"{folder.as_uri()}/set-*.zip"
    expected = ImageFolderDataset(folder, xflip=xflip)
    actual = stream(url, xflip=xflip)
    assert len(actual) == len(expected) == TOTAL * (1 + xflip)
    for name in ("image_shape", "image_dtype", "resolution", "num_channels", "label_dim", "has_labels"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert (actual.holds_latents, actual.encoder_entry, actual.has_onehot_labels) == (False, None, True)
    indices = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert_same_items(actual, expected, indices)
    for idx in (0, TOTAL - 1, len(expected) - 1):
        assert all(np.array_equal(a, b) for a, b in zip(actual[idx], expected[idx], strict=True))
        assert np.array_equal(actual.get_label(idx), expected.get_label(idx))
        assert str(actual.get_details(idx)) == str(expected.get_details(idx))
    assert stream(url, use_labels=False).label_dim == 0


def test_opening_downloads_no_shard_and_the_second_time_reads_no_index(tmp_path: Path):
    folder = write_shards(tmp_path / "data", padding=1 << 20)
    with serve(folder) as server:
        dataset = stream(f"{server.url}/set.zip")
        assert [file.name for file in dataset.shards] == [f"set-{i:05d}.zip" for i in range(5)]
        assert not dataset.shard_cache.folder.exists()
        assert sum(size for *_, size in server.requests) < 5 * (600 << 10)
        server.requests.clear()
        assert len(stream(f"{server.url}/set.zip")) == TOTAL
        # The second opening only asks for the versions.
        assert sum(size for *_, size in server.requests) <= 600 << 10


def test_a_single_zip_is_one_shard_and_may_hold_latents(tmp_path: Path):
    path = write_dataset(tmp_path / "latents.zip", channels=8, num=10)
    dataset = stream(path.as_uri(), buffer=1000)
    expected = ImageFolderDataset(path)
    assert dataset.holds_latents
    assert dataset.name == "latents"
    assert_same_items(dataset, expected, range(10))


def test_other_stores_of_fsspec_will_do(folder: Path):
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for url in ("memory://bucket/set-*.zip", "memory://bucket/set.zip"):
            assert_same_items(stream(url), ImageFolderDataset(folder), range(TOTAL))
    finally:
        store.rm("/bucket", recursive=True)


def tar_entries(num: int, seed: int, label: Callable[[int], dict[str, bytes]]) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    entries: dict[str, bytes] = {}
    for i in reversed(range(num)):  # not in the order of their names
        entries[f"./s{i:03d}.png"] = png(rng)
        entries |= {f"./s{i:03d}.{suffix}": data for suffix, data in label(i).items()}
    return entries


@pytest.mark.parametrize(
    "label",
    [lambda i: {"cls": b"%d\n" % (i % 3)}, lambda i: {"json": b'{"width": 8, "label": %d}' % (i % 3)}],
    ids=["cls", "json"],
)
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_webdataset_tars_are_read_in_the_order_of_their_names(
    tmp_path: Path, scheme: str, label: Callable[[int], dict[str, bytes]]
):
    folder = tmp_path / "data"
    folder.mkdir()
    parts = [tar_entries(num, seed, label) for seed, num in enumerate((4, 6))]
    for number, entries in enumerate(parts):
        write_tar(folder / f"set-{number:06d}.tar", entries)
    with serve(folder) as server:
        base = server.url if scheme == "http" else folder.as_uri()
        dataset = stream(f"{base}/set-{{000000..000001}}.tar")
        images, labels = dataset.read_batch(range(10))
    expected = [part[name] for part in parts for name in sorted(part) if name.endswith("png")]
    for image, data in zip(images, expected, strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(PIL.Image.open(io.BytesIO(data))))
    assert labels.argmax(1).tolist() == [i % 3 for num in (4, 6) for i in range(num)]
    assert dataset.name == "set-000000"


def test_a_tar_of_a_data_set_folder_has_the_labels_of_its_dataset_json(tmp_path: Path):
    with zipfile.ZipFile(write_dataset(tmp_path / "a.zip", channels=8, num=6)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    dataset = stream(write_tar(tmp_path / "a.tar", entries).as_uri())
    expected = ImageFolderDataset(tmp_path / "a.zip")
    assert_same_items(dataset, expected, range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_brings_the_batches_of_the_order(folder: Path, workers: int):
    dataset = stream(f"{folder.as_uri()}/set-*.zip", xflip=True)
    expected = ImageFolderDataset(folder, xflip=True)
    plain = [i for epoch in range(3) for i in itertools.chain(*plain_order(COUNTS, 3, 8, 2, epoch))]
    with dataset.order(3) as order:
        loader = torch.utils.data.DataLoader(
            BatchReader(dataset),
            batch_size=None,
            sampler=BatchPositions(order, start=16, batch_size=8),
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        for number, (images, labels) in enumerate(itertools.islice(loader, 14)):
            indices = plain[16 + 8 * number : 24 + 8 * number]
            for a, b in zip((images, labels), expected.read_batch(indices), strict=True):
                assert np.array_equal(a.numpy(), b)


# The cache.


def bytes_in(folder: Path) -> int:
    """What the files take, at a moment in which none of them came, went or got another name."""
    while True:
        before, total = sorted(folder.iterdir()), 0
        try:
            total = sum(path.stat().st_size for path in before)
        except FileNotFoundError:
            continue
        if sorted(folder.iterdir()) == before:
            return total


def test_a_set_larger_than_the_cache_streams_through_it(tmp_path: Path):
    folder = write_shards(tmp_path / "data", counts=(4,) * 12, padding=50_000)
    shard_bytes = max(path.stat().st_size for path in folder.iterdir())
    dataset = stream(f"{folder.as_uri()}/set-*.zip", buffer=4, cache_bytes=4 * shard_bytes)
    expected = ImageFolderDataset(folder)
    most = 0
    with dataset.order(0) as order:
        for position in range(2 * len(dataset)):
            item = order[position]
            assert np.array_equal(dataset[item][0], expected[item][0])
            most = max(most, bytes_in(dataset.shard_cache.folder))
    assert 2 * shard_bytes < most <= 4 * shard_bytes < sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_is_downloaded_once_for_all_who_read_it(server: ShardServer):
    dataset = stream(f"{server.url}/set.zip")
    opened = len(server.requests)
    with dataset.order(0) as order:
        other = stream(f"{server.url}/set.zip")  # such as another process has
        for position in range(2 * TOTAL):
            item = order[position]
            assert np.array_equal(dataset[item][0], other[item][0])
    size = sum(file.size for file, count in zip(dataset.shards, dataset.counts, strict=True) if count)
    wholes = [r for r in server.requests[opened:] if r[2:] in {(0, f.size) for f in dataset.shards}]
    assert sum(sent for *_, sent in wholes) <= size + dataset.shards[0].size  # which is small enough to be read whole
    assert cached(dataset.shard_cache) == [f"set-{i:05d}.zip" for i in (0, 1, 3, 4)]


def test_a_window_that_the_cache_cannot_hold_is_refused(folder: Path):
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    with pytest.raises(ConfigError, match=r"--shuffle-buffer=20 images lie in shards of up to \d+ bytes, more than"):
        stream(f"{folder.as_uri()}/set-*.zip", buffer=20, cache_bytes=max(sizes))
    stream(f"{folder.as_uri()}/set-*.zip", buffer=20, cache_bytes=sum(sizes))


def test_shards_that_were_used_long_ago_do_not_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_module, "_OPEN_SHARDS", 2)
    dataset = stream(f"{folder.as_uri()}/set-*.zip", buffer=1)
    for idx in (0, 7, 0, 12):
        _ = dataset[idx]
    assert list(dataset._opened) == [0, 3]


def test_shards_that_have_left_the_cache_do_not_stay_open(folder: Path):
    dataset = stream(f"{folder.as_uri()}/set-*.zip")
    for idx in (0, 7):  # of the first two shards
        _ = dataset[idx]
    assert list(dataset._opened) == [0, 1]
    dataset.shard_cache.discard(dataset.shards[0])
    _ = dataset[12]
    assert list(dataset._opened) == [1, 3]


def test_a_damaged_copy_is_fetched_again(folder: Path):
    dataset = stream(f"{folder.as_uri()}/set-*.zip")
    expected = ImageFolderDataset(folder)
    dataset.shard_cache.fetch(dataset.shards[0])
    path = dataset.shard_cache.path(dataset.shards[0])
    path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(dataset[0][0], expected[0][0])
    assert path.read_bytes() == (folder / "set-00000.zip").read_bytes()


def test_a_killed_download_leaves_nothing_that_counts(folder: Path):
    dataset = stream(f"{folder.as_uri()}/set-*.zip")
    dataset.shard_cache.folder.mkdir(parents=True)
    for file in dataset.shards[:2]:  # as a process leaves them that is killed; the system lets go of its locks
        path = dataset.shard_cache.path(file)
        path.with_name(f".{path.name}.part").write_bytes(bytes(file.size + 10))
    expected = ImageFolderDataset(folder)
    assert np.array_equal(dataset[0][0], expected[0][0])
    assert leftovers(dataset.shard_cache) == []
    assert cached(dataset.shard_cache) == ["set-00000.zip"]


# Trouble.


def test_connections_that_break_and_a_server_that_is_busy_cost_time_only(server: ShardServer, folder: Path):
    server.busy = 2
    server.drops = 3
    dataset = stream(f"{server.url}/set.zip")
    expected = ImageFolderDataset(folder)
    server.drops = 4
    assert_same_items(dataset, expected, range(TOTAL))
    assert (server.drops, server.busy) == (0, 0)
    assert leftovers(dataset.shard_cache) == []


def test_a_server_that_stays_busy_ends_in_one_line(server: ShardServer):
    dataset = stream(f"{server.url}/set.zip")
    server.busy = 1 << 30
    message = one_line_error(lambda: dataset[0])
    assert message.startswith(f"cannot read {server.url}/set-00000.zip: 503")
    assert message.endswith("check the address and the network connection")
    assert leftovers(dataset.shard_cache) == []


def test_a_server_without_ranges_is_named(server: ShardServer, tmp_path: Path):
    write_shards(tmp_path / "data", padding=1 << 20)
    server.ranges = False
    message = one_line_error(lambda: stream(f"{server.url}/set.zip"))
    assert message == (
        f"the server of {server.url}/set-00000.zip gives whole files only; use one that supports HTTP range requests"
    )


def test_a_server_that_sends_nothing_more_is_asked_again(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "_TIMEOUT_SEC", 0.3)
    dataset = stream(f"{server.url}/set.zip")
    server.stall = True
    message = one_line_error(lambda: dataset[0])
    assert message.startswith(f"cannot read {server.url}/set-00000.zip: ")
    server.stall = False
    assert_same_items(dataset, ImageFolderDataset(folder), range(3))


def test_a_shard_that_changes_while_it_is_downloaded_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = stream(f"{folder.as_uri()}/set-*.zip")
    read = remote._read_range

    def change_and_read(*args: Any) -> bytes:
        os.utime(folder / "set-00000.zip", (1, 1))
        return read(*args)

    monkeypatch.setattr(remote, "_read_range", change_and_read)
    assert "set-00000.zip has changed since" in one_line_error(lambda: dataset[0])
    assert cached(dataset.shard_cache) == leftovers(dataset.shard_cache) == []


def test_a_shard_that_goes_away_is_told_in_one_line_by_a_worker_too(folder: Path):
    dataset = stream(f"{folder.as_uri()}/set-*.zip")
    (folder / "set-00003.zip").unlink()
    with pytest.raises(ConfigError) as failure:
        dataset.read_batch(range(TOTAL))
    assert str(failure.value).endswith("set-00003.zip is gone since the data set was opened; put it back")
    # The run takes the line out of a worker's traceback by this very name.
    assert type(failure.value) is ConfigError


def test_missing_shards_are_named(server: ShardServer, folder: Path):
    missing = f"{server.url}/nothing"
    assert one_line_error(lambda: stream(f"{missing}.zip")) == (
        f"{missing}.zip does not exist, nor does {missing}-00000.zip; check the address"
    )
    (folder / "set-00003.zip").unlink()
    assert one_line_error(lambda: stream(f"{server.url}/set.zip")) == f"{server.url}/set-00003.zip does not exist"
    assert "there are 4 of 5 shards" in one_line_error(lambda: stream(f"{folder.as_uri()}/set-*.zip"))
    for base in (folder.as_uri(), server.url):
        assert "matches no files" in one_line_error(lambda base=base: stream(f"{base}/none-*.zip"))  # type: ignore[misc]


def test_shards_that_do_not_say_how_many_there_are_want_a_range(tmp_path: Path):
    folder = write_shards(tmp_path / "data", number=False)
    message = one_line_error(lambda: stream(f"{folder.as_uri()}/set.zip"))
    assert message.endswith(f"does not say how many shards there are; give {folder.as_uri()}/set-{{00000..00063}}.zip")
    assert len(stream(f"{folder.as_uri()}/set-{{00000..00004}}.zip")) == TOTAL


def test_a_shard_that_changes_during_the_run_is_refused(server: ShardServer, folder: Path):
    dataset = stream(f"{server.url}/set.zip")
    os.utime(folder / "set-00003.zip", (1, 1))
    server.requests.clear()
    message = one_line_error(lambda: dataset.read_batch(range(TOTAL)))
    assert message.startswith(f"{server.url}/set-00003.zip has changed since the data set was opened")
    assert ("GET", "set-00003.zip") not in [request[:2] for request in server.requests]
    assert "set-00003.zip" not in cached(dataset.shard_cache)


def test_a_damaged_shard_is_named_by_its_url(folder: Path):
    url = f"{folder.as_uri()}/set-*.zip"
    data = (folder / "set-00001.zip").read_bytes()
    at = data.index(b"IDAT", data.index(b"IDAT") + 4) + 10  # of the second image
    (folder / "set-00001.zip").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    dataset = stream(url)
    message = one_line_error(lambda: dataset.read_batch(range(TOTAL)))
    name = "00000/img00000008.png"
    assert message == f"{folder.as_uri()}/set-00001.zip: {name} cannot be read: its checksum does not fit"


def change(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a.png": png(np.random.default_rng(0), 16), "dataset.json": b'{"labels": [["a.png", 0]]}'}, "must be alike"),
        ({"a.png": png(np.random.default_rng(0))}, "has no labels"),
        ({"a.png": png(np.random.default_rng(0)), "dataset.json": b'{"labels": [["a.png", [1, 2]]]}'}, "of one kind"),
        ({"a.png": png(np.random.default_rng(0)), "dataset.json": b"{"}, "is not JSON"),
        ({"a.png": b"", "b.npy": b""}, "mixes 1 .npy files and 1 images"),
        ({"../a.png": b""}, "leads out of its folder"),
        ({"a.png": b"not an image"}, "is not a readable image"),
    ],
)
def test_shards_that_do_not_go_together_are_refused(folder: Path, entries: dict[str, bytes], words: str):
    change(folder / "set-00001.zip", entries)
    message = one_line_error(lambda: stream(f"{folder.as_uri()}/set-*.zip"))
    assert words in message
    assert f"{folder.as_uri()}/set-00001.zip" in message


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a.png": png(np.random.default_rng(0)), "a.cls": b"1", "b.png": png(np.random.default_rng(0))}, "1 of 2"),
        ({"a.png": png(np.random.default_rng(0)), "a.cls": b"c\nd"}, "a.cls holds no label"),
        ({"a.png": b"", "a.jpg": b""}, "in one sample"),
        ({"../a.png": b""}, "leads out of its folder"),
    ],
)
def test_tars_that_cannot_be_used_are_refused(tmp_path: Path, entries: dict[str, bytes], words: str):
    path = write_tar(tmp_path / "a.tar", entries)
    message = one_line_error(lambda: stream(path.as_uri()))
    assert words in message
    assert path.as_uri() in message


def test_a_zip_that_claims_absurd_sizes_is_refused_before_it_is_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(100))
        file.filelist[0].file_size = 3 << 30  # as the table of contents will have it
    message = one_line_error(lambda: stream((tmp_path / "a.zip").as_uri()))
    assert message.endswith(f"a.zip: a.png claims {3 << 30} bytes unpacked, more than any image has")


def test_images_that_are_not_square_are_refused(tmp_path: Path):
    data = io.BytesIO()
    PIL.Image.new("RGB", (8, 4)).save(data, format="PNG")
    change(tmp_path / "a.zip", {"a.png": data.getvalue()})
    message = one_line_error(lambda: stream((tmp_path / "a.zip").as_uri()))
    assert "a.zip: a.png is 8x4; images must be square" in message


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ssl.SSLCertVerificationError("self-signed"), 1),
        (ValueError("not an address"), 1),
        (type("NoCredentialsError", (Exception,), {})("none"), 1),
        (PermissionError("no"), 1),
        (socket.gaierror(-2, "Name or service not known"), 3),
        (ConnectionResetError("reset"), 6),
    ],
)
def test_what_no_attempt_mends_is_tried_once_or_a_few_times(
    error: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
):
    """As aiohttp and fsspec hand it on: wrapped twice."""

    class System:
        def info(self, path: str, **options: Any) -> None:
            calls.append(path)
            try:
                try:
                    raise error
                except Exception as inner:
                    raise OSError("cannot connect") from inner
            except OSError as outer:
                raise FileNotFoundError(path) from outer

    calls: list[str] = []
    monkeypatch.setattr(remote, "_system", lambda url: (System(), url))
    assert str(error.args[-1]) in one_line_error(lambda: remote.find_file("https://host/a.zip"))
    assert len(calls) == tries


@pytest.mark.parametrize("url", ["nosuch://host/a.zip", "https://[x/a.zip", "https://a:b/a.zip", "s3:///a.zip"])
def test_addresses_that_are_none_end_at_once(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("it is tried again"))
    one_line_error(lambda: stream(url))


def test_files_of_other_kinds_are_refused(tmp_path: Path):
    for name in ("a.zip", "a.tar"):
        (tmp_path / name).write_bytes(b"not an archive" * 100)
        url = (tmp_path / name).as_uri()
        assert "is not a readable" in one_line_error(functools.partial(stream, url))
    assert "neither a .zip nor an uncompressed .tar" in one_line_error(lambda: stream("https://host/a.tar.gz"))
    assert "is not a range" in one_line_error(lambda: expand_url("https://host/a-{5..3}.zip"))
    assert "Install s3fs" in one_line_error(lambda: stream("s3://bucket/a.zip"))
    assert expand_url("https://host/a-{08..10}.zip?b") == [f"https://host/a-{i}.zip?b" for i in ("08", "09", "10")]


def test_without_aiohttp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "aiohttp":
            raise ImportError("No module named 'aiohttp'")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    # As if no file system had been made in this process.
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for protocol in ("http", "https"):
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, protocol, raising=False)
    message = one_line_error(lambda: stream("https://host/set.zip"))
    assert message == ("https://host/set.zip needs packages that are not installed; try: pip install -e '.[streaming]'")


# Training.


def test_a_run_cut_at_a_checkpoint_ends_bitwise_as_one_that_was_not(server: ShardServer, tmp_path: Path):
    data = f"{server.url}/set.zip"
    config = tiny_config(Path(), shuffle_buffer=None, checkpoint=8, duration=64, xflip=True)
    config = dataclasses.replace(config, data=data, shuffle_buffer=8)

    def start(name: str) -> TrainingRun:
        (tmp_path / name).mkdir(exist_ok=True)
        return TrainingRun(config, RunFolder(tmp_path / name), world=World())

    whole = train(start("whole"))
    for event in start("parts"):
        if isinstance(event, Saved) and event.nimg == 40:
            break
    resumed = start("parts")
    assert resumed.state.nimg == 40
    train(resumed)
    assert_same_state(resumed.state.state_dict(), whole.state.state_dict())


def run_script(outdir: Path, *args: str) -> click.testing.Result:
    small = ["--batch=8", "--duration=16", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--status=8"]
    options = [f"--outdir={outdir}", "--attn-resolutions=4", "--snapshot=0", "--checkpoint=16", "--device=cpu", *small]
    return click.testing.CliRunner().invoke(train_edm2.train_edm2, [*options, *args])


def test_the_script_trains_from_a_url_with_the_same_option(folder: Path, tmp_path: Path):
    data = f"--data={folder.as_uri()}/set-*.zip"
    outdir, cache = tmp_path / "run", tmp_path / "other"
    result = run_script(outdir, data, f"--data-cache={cache}", "--data-cache-size=1MB", "--shuffle-buffer=8")
    assert result.exit_code == 0, result.output
    assert f"{TOTAL} of 8x8, 3 channels" in result.output
    assert len(list((cache / "shards").glob("*.zip"))) > 0
    again = run_script(outdir, data, "--shuffle-buffer=9")
    assert "shuffle_buffer: 8 in the run, 9 asked for" in str(again.exception)
    result = run_script(outdir, data, "--shuffle-buffer=8", "--duration=24", "--data-cache-size=2MB")
    assert result.exit_code == 0, result.output
    assert "Continuing from" in result.output
    for args, words in [
        ([data, "--shuffle-buffer=0"], "--shuffle-buffer=0 must be above 0"),
        ([data, "--data-cache-size=1kB"], "'1kB' is not a size"),
        ([data, "--data-cache-size=1K"], "--data-cache-size=1000"),
        ([f"--data={folder}", "--shuffle-buffer=8"], "is for data behind a URL"),
    ]:
        result = run_script(tmp_path / "refused", *args)
        assert words in str(result.exception) + result.output
        assert not (tmp_path / "refused").exists()
