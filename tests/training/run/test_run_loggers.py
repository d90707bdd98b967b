"""A run in TensorBoard and in Weights & Biases: what is read back is what stats.jsonl and the pictures say."""

import importlib
import importlib.util
import io
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

import dnnlib.cli
import train_edm2 as script
from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_same_state, global_random_states, tiny_config, write_dataset
from training.run import loggers
from training.run.loggers import RunLoggers, check_loggers
from training.snapshot import load_snapshot

ARGS = [
    "--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0",
    "--batch=64", "--status=64", "--snapshot=128", "--checkpoint=128", "--format=safetensors", "--samples=2",
    "--samples-steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


@pytest.fixture
def tensorboard() -> Any:
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    module = pytest.importorskip("wandb")
    module.teardown()  # an earlier test's settings
    return module


def train(data: Path, out: Path, *args: str) -> None:
    script.train_edm2.main([*ARGS, f"--data={data}", f"--outdir={out}", *args], standalone_mode=False)


def stats_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def read_tensorboard(tensorboard: Any, out: Path) -> Any:
    events = tensorboard.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def wandb_chunks(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format (doc/log_format.md there).

    Blocks of 32 KiB hold pieces of records, each after a checksum (4 bytes), a length (2) and a type (1): whole, first,
    middle or last.
    """
    assert data[:4] == b":W&B"
    place, record = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(path: Path) -> dict[str, list[Any]]:
    """The records of an offline file by kind, in W&B's own messages."""
    importlib.import_module("wandb").teardown()  # its own process writes on for a moment after the end of a run
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, list[Any]] = {}
    for raw in wandb_chunks(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind is not None:
            found.setdefault(kind, []).append(getattr(record, kind))
    return found


def wandb_history(records: dict[str, list[Any]]) -> dict[int, dict[str, Any]]:
    rows = {}
    for history in records["history"]:
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        rows[int(row["_step"])] = row
    return rows


def test_tensorboard_reads_back_every_number_picture_and_option(data, tmp_path, tensorboard):
    out = tmp_path / "run"
    train(data, out, "--duration=256", "--log=tensorboard")
    events = read_tensorboard(tensorboard, out)
    lines = stats_of(out)
    assert [line["Progress/kimg"] for line in lines] == [0.064, 0.128, 0.192, 0.256]
    assert set(events.Tags()["scalars"]) == set(lines[0])
    for key in lines[0]:
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == {round(line["Progress/kimg"] * 1e3): pytest.approx(line[key], rel=1e-6) for line in lines}
    pictures = events.Images("samples")
    assert [event.step for event in pictures] == [128, 256]
    shown = PIL.Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    with PIL.Image.open(out / "samples-0000000.256.png") as drawn:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))
    (text,) = events.Tensors("options/text_summary")
    options = text.tensor_proto.string_val[0].decode()
    assert json.loads(options) == json.loads((out / "training_options.json").read_text())


def test_a_resumed_run_takes_back_what_tensorboard_has_from_beyond_the_checkpoint(data, tmp_path, tensorboard):
    out = tmp_path / "run"
    train(data, out, "--duration=192", "--checkpoint=64", "--log=tensorboard")
    (out / "training-state-0000000.192.pt").rename(tmp_path / "kept.pt")
    config = tiny_config(data)
    with RunLoggers(["tensorboard"], out, config) as loggers:
        loggers.begin(nimg=128)
        loggers.scalars({"Loss/loss": 7.5}, {}, 192)
        loggers.scalars({"Loss/loss": 8.5}, {"Metrics/best_fid": "a.pkl"}, 256)
    found = [(event.step, event.value) for event in read_tensorboard(tensorboard, out).Scalars("Loss/loss")]
    before = stats_of(out)
    assert [step for step, _ in found] == [64, 128, 192, 256]
    assert [value for _, value in found] == pytest.approx(
        [before[0]["Loss/loss"], before[1]["Loss/loss"], 7.5, 8.5], rel=1e-6
    )


def test_an_offline_file_of_wandb_reads_back_the_same(data, tmp_path, wandb):
    out = tmp_path / "run"
    train(data, out, "--duration=256", "--log=wandb")
    (path,) = out.glob("wandb/offline-run-*/run-*.wandb")
    records = read_wandb(path)
    lines, rows = stats_of(out), wandb_history(records)
    assert sorted(rows) == [64, 128, 192, 256]
    for line in lines:
        row = rows[round(line["Progress/kimg"] * 1e3)]
        assert {key: row[key] for key in line} == pytest.approx(line)
    assert ["samples/path" in rows[step] for step in (64, 128, 192, 256)] == [False, True, False, True]
    picture = path.parent / "files" / rows[256]["samples/path"]
    assert picture.read_bytes() == (out / "samples-0000000.256.png").read_bytes()
    (run,) = records["run"][:1]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() >= json.loads((out / "training_options.json").read_text()).items()
    assert (run.project, run.display_name) == ("edm2", "run")
    assert run.run_id == json.loads((out / "wandb.json").read_text())["id"]
    assert records["exit"][0].exit_code == 0


def test_all_sessions_of_a_run_are_one_run_of_wandb(data, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "other")
    config, found = tiny_config(data), []
    for name, nimg in (("first", 0), ("second", 64)):  # two folders: W&B names files by the second
        folder = tmp_path / name
        folder.mkdir()
        if found:
            shutil.copy(tmp_path / "first" / "wandb.json", folder)
        with RunLoggers(["wandb"], folder, config) as loggers:
            loggers.begin(nimg=nimg)
            loggers.scalars({"Loss/loss": 1.0}, {"Metrics/best_fid": "a.pkl"}, nimg + 64)
        assert loggers.notes == []
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        records = read_wandb(path)
        found.append((records["run"][0].run_id, records["run"][0].project, list(wandb_history(records))))
    name = json.loads((tmp_path / "first" / "wandb.json").read_text())["id"]
    assert found == [(name, "other", [64]), (name, "other", [128])]


def test_the_result_is_bitwise_that_of_a_run_without(data, tmp_path, tensorboard, wandb):
    ends = []
    for name, more in (("with", ["--log=tensorboard", "--log=wandb"]), ("without", [])):
        train(data, tmp_path / name, "--duration=128", "--dropout=0.2", *more)
        net = load_snapshot(tmp_path / name / "network-snapshot-0000000.128-0.100.safetensors").net
        ends.append({"net": dict(net.state_dict()), **global_random_states()})
    assert_same_state(ends[0]["net"], ends[1]["net"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_starts(name, data, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    with pytest.raises(SystemExit, match="2"):
        dnnlib.cli.main(
            script.train_edm2,
            [*ARGS, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--duration=64", f"--log={name}"],
        )
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f'Error: --log={name} needs the {name} package, which is missing; pip install "edm2[{name}]"'
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ConfigError, match="wandb"):
        check_loggers(["wandb"])


def test_a_thread_of_tensorboard_that_fails_prints_no_traceback(data, tmp_path, tensorboard, capsys):
    config = tiny_config(data)
    with RunLoggers(["tensorboard"], tmp_path, config) as loggers:
        loggers.begin(nimg=0)
        shutil.rmtree(tmp_path / "tensorboard")
        for nimg in range(3):
            loggers.scalars({"Loss/loss": 1.0}, {}, nimg)
    assert any(note.startswith("--log=tensorboard failed and is dropped: ") for note in loggers.notes)
    assert capsys.readouterr().err == ""


def test_a_logger_that_fails_is_left_out_and_training_goes_on(data, tmp_path, monkeypatch, capsys):
    calls = []

    class Failing:
        def __init__(self, folder: Path, config: Any, *, nimg: int) -> None:
            calls.append("begin")

        def scalars(self, *args: Any) -> None:
            calls.append("scalars")
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(loggers._LOGGERS, "tensorboard", Failing)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="somewhere"))
    train(data, tmp_path / "run", "--duration=256", "--log=tensorboard")
    assert calls == ["begin", "scalars"]
    text = capsys.readouterr().out
    assert text.count("--log=tensorboard failed and is dropped: [Errno 28] No space left") == 1
    assert len(stats_of(tmp_path / "run")) == 4 and "Done: 0.256 kimg" in text
