"""Subjects of the fuzzer: a small valid file of every kind, its reader, and the allowed outcomes.

A reader returns an observation or raises ConfigError. `judge` compares the observation with that of the intact file and
returns 'same', 'less' (what is read is intact, something is missing) or 'other'; it asserts that nothing else than what
the format cannot tell from damage is other.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import ConfigError
from tests.helpers import fuzz_input
from tests.helpers.shards import write_tar
from tests.helpers.tiny import flat_state
from torch_utils import persistence
from torch_utils.checkpoints import checkpoint
from training.config import TrainingConfig
from training.dataset import ImageDataset, ImageFolderDataset
from training.dataset import zip_index as dataset_index
from training.dataset.label_file import MAX_CLASSES
from training.dataset.latents import encoder_entry, encoder_of, read_encoder_file
from training.dataset.sample_array import SampleArray
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.metrics.reference import load_stats, save_stats
from training.networks_edm2 import Precond
from training.run.run_folder import RunFolder
from training.snapshot import Snapshot, load_snapshot, read_header, save_snapshot
from training.streaming.streamed import StreamedDataset
from training.sweep import ema_sweep as sweep
from training.toy.model import ToyModel
from training.toy.toy_files import load_toy_model, save_toy_model

Files = dict[str, bytes]
Judge = Callable[[Any, Any, bool], str]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A file among `files`, one of which is damaged, and its reader, which gets the folder with all of them."""

    files: Files
    targets: tuple[str, ...]
    read: Callable[[Path], Any]
    judge: Judge
    closed: bool = True  # the reader imports and runs nothing


def subjects(scratch: Path) -> dict[str, Subject]:
    """All of them, by name; `scratch` is an empty folder. The files are the same bytes each time."""
    tensors = {"a": torch.arange(60.0).reshape(3, 20), "b": torch.ones(7, dtype=torch.float16)}
    state = {
        "state": {"cur_nimg": 1024, "total_elapsed_time": 1.5},
        "net": tensors,
        "optimizer": {"state": {0: tensors}},
    }
    latents = {f"00000/img-mean-std-{i:08d}.npy": _latents(i) for i in range(5)}
    pictures = {f"00000/img{i:08d}.png": _picture(i) for i in range(6)}
    labels = [[name, i % 3] for i, name in enumerate(pictures)]
    vectors = [[name, [i / 2, -1.0]] for i, name in enumerate(latents)]
    about = json.dumps({"labels": labels, "classes": ["a", "b", "c"]}).encode()
    encoder = encoder_entry(StabilityVAEEncoder(vae_name="some/vae", raw_mean=[1.0] * 4, raw_std=[2.0] * 4))
    encoded = json.dumps({"labels": vectors, "encoder": encoder}).encode()
    halves = [_zip(dict(list(pictures.items())[i::2]), {"labels": labels[i::2], "shard": [i, 2]}) for i in range(2)]
    pictures_zip = _zip(pictures, about)
    tar = write_tar(scratch / "set.tar", {"./dataset.json": about, **{f"./{name}": d for name, d in pictures.items()}})
    return {
        **_network_subjects(scratch),
        **_statistics_subjects(scratch),
        "checkpoint": _single("x.pt", _saved(partial(checkpoint.save_checkpoint, data=state), scratch / "x.pt"),
            checkpoint.load_checkpoint, _judge_checkpoint),
        "checkpoint, plain": _single("x.pt", _saved(lambda path: torch.save(state, path), scratch / "y.pt"),
            checkpoint.load_checkpoint, _judge_plain_checkpoint),
        "pictures": _data_set({"set.zip": pictures_zip}, "set.zip"),
        "packed pictures": _data_set({"set.zip": _zip(pictures, about, zipfile.ZIP_DEFLATED)}, "set.zip"),
        "latents": _data_set({"set.zip": _zip(latents, encoded)}, "set.zip"),
        "folder": _data_set({**pictures, "dataset.json": about}, "."),
        "folder of latents": _data_set({**latents, "dataset.json": encoded}, "."),
        "shards": _data_set({f"set-{i:05d}.zip": half for i, half in enumerate(halves)}, "set.zip"),
        "kept index": Subject(
            files={"set.zip": pictures_zip, "set.zip.index": _kept_index(pictures_zip, scratch)},
            targets=("set.zip.index",), read=_read_with_index, judge=_judge_items),
        "streamed ZIP": _streamed({f"set-{i:05d}.zip": half for i, half in enumerate(halves)}, "set-*.zip"),
        "streamed tar": _streamed({"set.tar": tar.read_bytes()}, "set.tar"),
        "index of a stream": Subject(
            files={"set.tar": tar.read_bytes(), "index": _stream_index(tar)},
            targets=("index",), read=_read_with_stream_index, judge=_judge_items),
        **_run_folder_subjects(),
        **_input_subjects(scratch),
    }  # fmt: skip


def _input_subjects(scratch: Path) -> dict[str, Subject]:
    options, run = fuzz_input.option_files(), fuzz_input.run_files(scratch)
    records = tuple(name for name in run if name.endswith((".json", ".jsonl"))) + tuple(run)[-1:]

    def compared(found: Any, original: Any, sealed: bool) -> str:
        return "same" if found == original else "other"

    return {
        "options": Subject(files=options, targets=tuple(options), read=partial(fuzz_input.read_options, options),
            judge=compared, closed=False),
        "answers of a server": Subject(files=fuzz_input.ANSWERS, targets=tuple(fuzz_input.ANSWERS),
            read=fuzz_input.read_answers, judge=compared, closed=False),
        "report of a run": Subject(files=run, targets=records, read=fuzz_input.read_report, judge=compared),
        "results of metrics": _single("r.json", fuzz_input.RESULT, fuzz_input.read_results, compared),
        "version of a download": _single("x.version", fuzz_input.VERSION, fuzz_input.read_version, compared),
    }  # fmt: skip


def _single(name: str, content: bytes, read: Callable[[Path], Any], judge: Judge) -> Subject:
    return Subject(files={name: content}, targets=(name,), read=lambda folder: read(folder / name), judge=judge)


def _saved(save: Callable[[Path], Any], path: Path) -> bytes:
    save(path)
    return path.read_bytes()


def _zip(items: Files, about: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {**items, "dataset.json": text}.items():
            file.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _picture(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, [8, 8, 3], dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def _latents(seed: int) -> bytes:
    data = io.BytesIO()
    np.save(data, np.random.default_rng(seed).standard_normal([8, 4, 4], dtype=np.float32))
    return data.getvalue()


# Networks and statistics: formats without checksums, where another number cannot be told from the right one.


def _network_subjects(scratch: Path) -> dict[str, Subject]:
    kept = dict(persistence._sources)
    # The source text is longer than all the rest, and damage to it is neither seen nor of any effect.
    persistence._sources.update(dict.fromkeys(persistence._sources, "pass"))
    try:
        torch.manual_seed(0)
        net = Precond(
            4, 1, 2, model_channels=2, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=2
        )
        snapshot = Snapshot(
            net=net, encoder=StandardRGBEncoder(), nimg=1024, ema_std=0.05, dataset_kwargs={"path": "x.zip"},
            info={"note": [1, "x"]},
        )  # fmt: skip
        toy = ToyModel(num_layers=2, hidden_dim=4)
        return {
            f"{what}{suffix}": _single(
                f"x{suffix}", _saved(partial(save, value), scratch / f"{what}{suffix}"), read, judge
            )
            for what, save, value, read, judge in (
                ("network", save_snapshot, snapshot, _read_snapshot, _judge_snapshot),
                ("toy", save_toy_model, toy, load_toy_model, _judge_toy),
            )
            for suffix in (".pkl", ".safetensors")
        }
    finally:
        persistence._sources.update(kept)


def _read_snapshot(path: Path) -> Snapshot:
    """Both readers, which must agree on whether the file is in order."""
    snapshot = load_snapshot(path)
    header = read_header(path)
    assert (header.nimg, header.ema_std) == (snapshot.nimg, snapshot.ema_std) or math.isnan(snapshot.ema_std or 0)
    return snapshot


def _judge_snapshot(found: Snapshot, original: Snapshot, sealed: bool) -> str:
    assert found.nimg is None or type(found.nimg) is int
    assert found.ema_std is None or type(found.ema_std) is float
    json.dumps([found.info, found.dataset_kwargs])  # plain values
    return _judge_network(found.net, original.net)


def _judge_toy(found: ToyModel, original: ToyModel, sealed: bool) -> str:
    return _judge_network(found, original)


def _judge_network(found: Any, original: Any) -> str:
    """Check that a network has the right class and all tensors of its arguments, no larger than the file."""
    assert type(found) is type(original)
    ours, theirs = found.state_dict(), original.state_dict()
    with torch.device("meta"):
        wanted = type(found)(*found._init_args, **found._init_kwargs).state_dict()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in wanted.items()}
    assert sum(value.nbytes for value in ours.values()) < 4 * sum(value.nbytes for value in theirs.values())
    same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return "same" if same else "other"


def _statistics_subjects(scratch: Path) -> dict[str, Subject]:
    rows = np.random.default_rng(0).standard_normal([40, 6])
    moments = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    stats = {"num_images": 40, "fid": moments, "fd_dinov2": moments}
    kept = {**stats, "features": {"inception": rows.astype(np.float32)}}
    npz = io.BytesIO()
    np.savez(npz, **moments)
    samples = io.BytesIO()
    np.savez(samples, np.arange(4 * 5 * 5 * 3, dtype=np.uint8).reshape(4, 5, 5, 3))
    content = {
        ".pkl": _saved(lambda path: save_stats(stats, path), scratch / "stats.pkl"),
        ".safetensors": _saved(lambda path: save_stats(kept, path), scratch / "stats.safetensors"),
        ".npz": npz.getvalue(),
    }
    return {
        "samples": _single("x.npz", samples.getvalue(), lambda path: SampleArray(path).pixels.copy(), _judge_samples),
    } | {
        f"statistics{suffix}": _single(f"x{suffix}", data, load_stats, partial(_judge_stats, suffix == ".npz"))
        for suffix, data in content.items()
    }


def _judge_samples(found: Any, original: Any, sealed: bool) -> str:
    same = np.array_equal(found, original)
    assert same or sealed
    return "same" if same else "other"


def _judge_stats(checksums: bool, found: Any, original: Any, sealed: bool) -> str:
    for name in found.keys() - {"num_images", "features"}:
        mu, sigma = found[name]["mu"], found[name]["sigma"]
        assert mu.dtype == sigma.dtype == np.float64 and sigma.shape == (len(mu), len(mu))
        assert np.isfinite(mu).all() and np.isfinite(sigma).all() and (sigma.diagonal() >= 0).all()
    assert type(found.get("num_images", 1)) is int and found.get("num_images", 1) > 0
    ours, theirs = flat_state(found), flat_state(original)
    right = [key for key, value in ours.items() if key in theirs and np.array_equal(value, theirs[key])]
    if len(right) == len(ours):
        return "same" if len(ours) == len(theirs) else "less"
    assert sealed or not checksums
    return "other"


# Checkpoints.


def _judge_checkpoint(found: Any, original: Any, sealed: bool) -> str:
    assert isinstance(found, dict)
    ours, theirs = flat_state(found), flat_state(original)
    same = ours.keys() == theirs.keys() and all(_equal(value, theirs[key]) for key, value in ours.items())
    # Without DamagedCheckpoint, files have no digest yet.
    assert same or sealed or not hasattr(checkpoint, "DamagedCheckpoint"), "read with other content"
    return "same" if same else "other"


def _judge_plain_checkpoint(found: Any, original: Any, sealed: bool) -> str:
    """Check a checkpoint of the published layout, without a digest: any dictionary, which `TrainingState` checks."""
    assert isinstance(found, dict)
    ours, theirs = flat_state(found), flat_state(original)
    same = ours.keys() == theirs.keys() and all(_equal(value, theirs[key]) for key, value in ours.items())
    return "same" if same else "other"


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


# Data sets: an item that is read is the item that was written, or the checksums were made to fit.


@dataclass(frozen=True, kw_only=True)
class Items:
    """Content of a data set: its items by name with their labels, and the number of unreadable ones."""

    items: Mapping[str, tuple[bytes, tuple[int, ...], str, bytes]]  # name -> array, shape, dtype, label
    refused: int
    checksums: bool


def _data_set(files: Files, path: str) -> Subject:
    return Subject(
        files=files,
        targets=tuple(files),
        read=lambda folder: _read_items(ImageFolderDataset(folder / path), checksums=path != "."),
        judge=_judge_items,
    )


def _streamed(files: Files, pattern: str) -> Subject:
    checksums = not pattern.endswith(".tar")

    def read(folder: Path) -> Items:
        return _read_items(_open_stream(folder, pattern), checksums=checksums)

    return Subject(files=files, targets=tuple(files), read=read, judge=_judge_items)


def _open_stream(folder: Path, pattern: str) -> StreamedDataset:
    cache = folder / "cache"
    return StreamedDataset(f"{folder.as_uri()}/{pattern}", buffer=4, cache_dir=str(cache), cache_bytes=1 << 30)


def _read_items(dataset: ImageDataset, *, checksums: bool) -> Items:
    if dataset.holds_latents:
        encoder_of(dataset)
    if isinstance(dataset, ImageFolderDataset):
        assert len(dataset.class_names or []) < 100
    items, refused = {}, 0
    for idx in range(len(dataset)):
        try:
            images, _ = dataset.read_batch([idx])
        except ConfigError as error:
            require_one_line(error)
            refused += 1
            continue
        label = dataset.get_details(idx).raw_label
        assert images.shape == (1, *dataset.image_shape) and images.dtype == dataset.image_dtype
        assert np.isfinite(label).all() and (label.ndim or 0 <= label < MAX_CLASSES)
        name = dataset._describe(idx).rpartition(": ")[2]
        items[name] = images.tobytes(), dataset.image_shape, str(images.dtype), label.tobytes()
    return Items(items=items, refused=refused, checksums=checksums)


def _judge_items(found: Items, original: Items, sealed: bool) -> str:
    intact = [name for name, item in found.items.items() if item == original.items.get(name)]
    others = found.items.keys() - set(intact)
    if others and not sealed and found.checksums:
        # A name in a directory has no checksum: an item may be found under another, which then has no label.
        known = {(item[0], item[3]) for item in original.items.values()}
        assert all((found.items[name][0], found.items[name][3]) in known for name in others), sorted(others)
    if others:
        return "other"
    return "same" if len(intact) == len(original.items) else "less"


def require_one_line(error: ConfigError) -> str:
    """Return the message of `error`, and check that it is one printable line of reasonable length."""
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 1200, message
    return message


def _kept_index(content: bytes, scratch: Path) -> bytes:
    path = scratch / "set.zip"
    path.write_bytes(content)
    _open_with_index(path)
    return path.with_name("set.zip.index").read_bytes()


def _read_with_index(folder: Path) -> Items:
    return _read_items(_open_with_index(folder / "set.zip"), checksums=True)


def _open_with_index(path: Path) -> ImageFolderDataset:
    """Make the index that archives of many files have, with a valid stamp."""
    os.utime(path, ns=(10**18, 10**18))
    before = dataset_index._KEEP_ENTRIES
    dataset_index._KEEP_ENTRIES = 1
    try:
        return ImageFolderDataset(path)
    finally:
        dataset_index._KEEP_ENTRIES = before


def _stream_index(tar: Path) -> bytes:
    _open_stream(tar.parent, tar.name)
    (kept,) = (tar.parent / "cache" / "index").glob("*.npz")
    return kept.read_bytes()


def _read_with_stream_index(folder: Path) -> Items:
    """The index that is kept in the cache folder of a stream that was read before."""
    damaged = (folder / "index").read_bytes()
    _open_stream(folder, "set.tar")
    (kept,) = (folder / "cache" / "index").glob("*.npz")
    kept.write_bytes(damaged)
    return _read_items(_open_stream(folder, "set.tar"), checksums=True)


# What a run folder and a sweep keep as text.


def _run_folder_subjects() -> dict[str, Subject]:
    config = TrainingConfig(data="x.zip")
    encoder = encoder_entry(StabilityVAEEncoder(vae_name="some/vae", raw_mean=[1.0] * 4, raw_std=[2.0] * 4))
    records = [{"Progress/kimg": i / 2, "Loss/loss": 1 / (i + 1), "note": "x"} for i in range(12)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    settings = {"metrics": ["fid"], "num_images": 10}
    points = [
        {"ema_std": std, "guidance": 1.0, "fit": 0.01, "values": {"fid": [std, 2.0]}, "mean": {}} for std in (0.05, 0.1)
    ]
    record = {"format": sweep.FORMAT, "format_version": sweep.VERSION, "settings": settings, "points": points}
    return {
        "options of a run": _single("training_options.json", config.to_json().encode(),
            lambda path: _read_options(config, path), _judge_options),
        "statistics of a run": _single("stats.jsonl", lines,
            lambda path: (RunFolder(path.parent).recorded_stats(4000), path.read_bytes()), _judge_records),
        "encoder of a run": _single("encoder.json", json.dumps(encoder).encode(), read_encoder_file, _judge_encoder),
        "points of a sweep": _single("sweep.json", json.dumps(record).encode(),
            lambda path: sweep.read_points(path, settings), _judge_points),
    }  # fmt: skip


def _read_options(config: TrainingConfig, path: Path) -> list[str]:
    RunFolder(path.parent).check(config, allow_changes=True)
    try:
        RunFolder(path.parent).check(config, allow_changes=False)
    except ConfigError as error:
        if "holds a run with other options" not in str(error):
            raise
        require_one_line(error)
        return ["other options"]
    return []


def _judge_options(found: list[str], original: list[str], sealed: bool) -> str:
    return "same" if found == original else "other"


def _judge_records(found: Any, original: Any, sealed: bool) -> str:
    """Check that all whole lines are present, in order, and damaged ones left out."""
    records, text = found
    assert all(isinstance(record, dict) and record["Progress/kimg"] <= 4 for record in records)
    untouched = [line for line in original[1].splitlines() if line in text.split(b"\n")]
    wanted = [record for line in untouched if (record := json.loads(line))["Progress/kimg"] <= 4]
    assert all(record in records for record in wanted)
    if records == original[0]:
        return "same"
    return "less" if all(record in original[0] for record in records) else "other"


def _judge_encoder(found: StabilityVAEEncoder, original: StabilityVAEEncoder, sealed: bool) -> str:
    assert len(found.scale) == len(found.bias) > 0
    return "same" if encoder_entry(found) == encoder_entry(original) else "other"


def _judge_points(found: list[sweep.Point], original: list[sweep.Point], sealed: bool) -> str:
    for point in found:
        assert all(type(value) is float for value in (point.std, point.guidance, point.fit, *point.values["fid"]))
        assert isinstance(point.key, tuple) and type(point.mean("fid")) is float
    sweep.best_point(found, "fid")
    if found == original:
        return "same"
    return "less" if all(point in original for point in found) else "other"
