"""Metrics during training: the right numbers, of files that are there, and no trace in what is learned."""

import dataclasses
import gc
import json
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dnnlib.cli
import train_edm2 as script
from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.stand_in_detector import StandInDetector, images
from tests.helpers.tiny import assert_same_state, global_random_states, tiny_config, train, write_dataset
from torch_utils.distributed import World
from training import encoders
from training.config import MetricsConfig, TrainingConfig
from training.fast.inference_network import InferencePrecond
from training.fast.prepare import PrepareNetwork
from training.metrics import available as plan
from training.metrics.detectors.common import DetectorOutput
from training.metrics.evaluate import StatsPass, evaluate_images
from training.metrics.reference import load_stats, save_stats
from training.run import session
from training.run.run_folder import RunFolder
from training.run.run_metrics import Measured, TrainingMetrics
from training.sampling.generation import generate_images
from training.snapshot import load_snapshot
from training.training_loop import Saved, Status, TrainingRun

NAMES = ("fd_efflite0", "precision3_efflite0")


class DrawingDetector(StandInDetector):
    """One that draws from every global random generator, as a library may."""

    def outputs(self, images: torch.Tensor) -> DetectorOutput:
        torch.rand(3), np.random.rand(3), random.random()
        return super().outputs(images)


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(plan, "make_detector", lambda name, device, weights=None: DrawingDetector(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of random pictures, with features."""
    path = tmp_path_factory.mktemp("reference") / "ref.safetensors"
    detectors: dict[str, Any] = {"efflite0": StandInDetector()}
    work = StatsPass(
        [images(40)],
        metrics=["fd_efflite0"],
        detectors=detectors,
        world=World(),
        keep_features=np.arange(40),
    )
    (stats,) = [step.stats for step in work]
    assert stats is not None
    save_stats(stats, path)
    return path


def measured(data: Path, reference: Path, **changes: Any) -> TrainingConfig:
    metrics = MetricsConfig(names=NAMES, ref=str(reference), every=1024, num=12, batch=5, steps=3)
    defaults: dict[str, Any] = {"batch": 512, "duration": 3072, "snapshot_format": "safetensors", "dropout": 0.2}
    return tiny_config(data, **{**defaults, "metrics": metrics, **changes})


def make_run(config: TrainingConfig, folder: Path) -> TrainingRun:
    return TrainingRun(config, RunFolder(folder), world=World())


def statuses(run: TrainingRun) -> list[Status]:
    """Train to the end and record the statistics, as the script does."""
    run.folder.start(run.config, nimg=run.state.nimg)
    found = []
    for event in run:
        if isinstance(event, Status):
            found.append(event)
            with open(run.folder.stats_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(event.stats | event.texts) + "\n")
    return found


def test_the_result_and_the_random_state_are_bitwise_those_of_a_run_without(data, reference, tmp_path):
    ends = []
    for name in ("with", "without"):
        config = measured(data, reference, snapshot=1024, xflip=True)
        config = config if name == "with" else dataclasses.replace(config, metrics=None)
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        run = make_run(config, tmp_path / name)
        assert len(statuses(run)) == (3 if name == "with" else 0)
        ends.append({"state": run.state.state_dict(), **global_random_states()})
    assert_same_state(*ends)
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("with", "without")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) == 6
    for pair in zip(*files, strict=True):
        assert_same_state(*(dict(load_snapshot(path).net.state_dict()) for path in pair))


def test_a_score_is_the_one_of_the_snapshot_file(data, reference, tmp_path):
    config = measured(data, reference, status=2048)
    found = statuses(make_run(config, tmp_path / "run"))
    assert [status.nimg for status in found] == [1024, 2048, 3072]
    for status in found:
        for suffix in ("-0.050", "-0.100"):
            snapshot = load_snapshot(
                tmp_path / "run" / f"network-snapshot-{status.nimg // 1000:07d}{suffix}.safetensors"
            )
            options = {"max_batch_size": 5, "num_steps": 3, "prepare": PrepareNetwork()}
            scores = evaluate_images(
                generate_images(snapshot.net, encoder=snapshot.encoder, seeds=range(12), **options),
                metrics=NAMES,
                detectors={"efflite0": StandInDetector()},
                reference=load_stats(reference),
                world=World(),
            )
            for name in NAMES:
                assert status.stats[f"Metrics/{name}{suffix}"] == scores[name].value


def best_by_hand(found: list[Status], name: str, choose: Any) -> str:
    scores = {
        (status.nimg, key.removeprefix(f"Metrics/{name}")): value
        for status in found
        for key, value in status.stats.items()
        if key.startswith(f"Metrics/{name}-")
    }
    nimg, suffix = choose(scores, key=scores.__getitem__)
    return f"network-snapshot-{nimg // 1000:07d}{suffix}.safetensors"


def test_each_average_is_prepared_and_its_memory_is_free_before_the_next(data, reference, tmp_path, monkeypatch):
    made: list[Any] = []
    living: list[int] = []

    def prepare(self: PrepareNetwork, net: Any, device: torch.device) -> InferencePrecond:
        living.append(sum(net() is not None for net in made))
        made.append(weakref.ref(prepared := InferencePrecond(net)))
        return prepared

    monkeypatch.setattr(PrepareNetwork, "__call__", prepare)
    gc.collect()
    gc.disable()
    try:
        statuses(make_run(measured(data, reference), tmp_path / "run"))
        assert living == [0] * 6 and all(net() is None for net in made)
    finally:
        gc.enable()


def test_the_best_snapshot_is_named_in_each_direction_and_is_there(data, reference, tmp_path, monkeypatch):
    def invented(self: TrainingMetrics, emas: Any, nimg: int) -> Measured:
        value = [7.0, 3.0, 5.0][nimg // 1024 - 1]
        stats = {f"Metrics/{n}{suffix}": value + float(suffix[1:]) for n in NAMES for _, suffix in emas}
        self._remember(stats, nimg)
        return Measured(stats=stats, texts=self.best())

    monkeypatch.setattr(TrainingMetrics, "measure", invented)
    found = statuses(make_run(measured(data, reference), tmp_path / "run"))
    first = {
        NAMES[0]: "network-snapshot-0000001-0.050.safetensors",
        NAMES[1]: "network-snapshot-0000001-0.100.safetensors",
    }
    assert [status.texts for status in found] == [
        first,
        {**first, NAMES[0]: "network-snapshot-0000002-0.050.safetensors"},
        {**first, NAMES[0]: "network-snapshot-0000002-0.050.safetensors"},
    ]
    assert all((tmp_path / "run" / name).is_file() for status in found for name in status.texts.values())


def test_the_best_snapshot_outlives_an_interruption_but_not_other_settings(data, reference, tmp_path):
    config = measured(data, reference, checkpoint=2048)
    whole = statuses(make_run(config, tmp_path / "whole"))
    assert [whole[-1].texts[f"Metrics/best_{n}"] for n in NAMES] == [
        best_by_hand(whole, name, choose) for name, choose in zip(NAMES, (min, max), strict=True)
    ]
    statuses(make_run(dataclasses.replace(config, duration=2048), tmp_path / "cut"))
    resumed = make_run(config, tmp_path / "cut")
    assert statuses(resumed)[-1].texts == whole[-1].texts
    longer = dataclasses.replace(config, duration=4096)
    assert config.metrics is not None
    other = dataclasses.replace(longer, metrics=dataclasses.replace(config.metrics, num=13))
    (last,) = statuses(make_run(other, tmp_path / "cut"))
    assert all(last.texts[f"Metrics/best_{name}"].startswith("network-snapshot-0000004-") for name in NAMES)
    assert last.texts["Metrics/settings"] == f"13 images, 3 steps, reference {reference}"


def test_the_time_of_metrics_counts_as_maintenance(data, reference, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(session.time, "monotonic", lambda: clock.now)

    def slow(self: TrainingMetrics, emas: Any, nimg: int) -> Measured:
        clock.now += 1000
        return Measured(stats={}, texts={})

    monkeypatch.setattr(TrainingMetrics, "measure", slow)
    config = measured(data, reference, batch=256, duration=1024, status=512)
    assert config.metrics is not None
    config = dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, every=256))
    run = make_run(config, tmp_path / "run")
    run.folder.path.mkdir()
    for event in run:
        clock.now += 0 if isinstance(event, Saved | Status) else 1
        if isinstance(event, Status):
            expected = [(1, 0), (1, 1000), (1, 1000), (1, 1000)][event.nimg // 256 - 1]
            assert (event.stats["Timing/sec_per_tick"], event.stats["Timing/maintenance_sec"]) == expected
            assert event.stats["Timing/total_sec"] == event.nimg // 256 + 1000 * (event.nimg // 256 - 1)


def test_without_an_interval_every_snapshot_is_measured(data, reference, tmp_path):
    config = measured(data, reference, snapshot=2048)
    assert config.metrics is not None
    config = dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, every=None))
    assert [status.nimg for status in statuses(make_run(config, tmp_path / "run"))] == [2048, 3072]


def test_what_cannot_be_measured_is_refused_before_anything_is_written(data, reference, tmp_path, monkeypatch):
    def fails(config: TrainingConfig, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            make_run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    config = measured(data, reference)

    def changed(**changes: Any) -> TrainingConfig:
        assert config.metrics is not None
        return dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, **changes))

    fails(changed(names=("fid", "kid_dinov2")), "none of the metrics can be computed: fid: the reference lacks it")
    fails(changed(ref=None), "there is no reference")
    fails(changed(ref=str(tmp_path / "missing.pkl")), "missing.pkl")
    fails(changed(ref=str(data)), "data.zip")
    run = make_run(changed(names=("fid", "fd_efflite0")), tmp_path / "run")
    assert run.metrics is not None and run.metrics.notes == ["Skipped fid: the reference lacks it"]

    def no_vae(name: str) -> Any:
        raise ConfigError(f"VAE {name!r} cannot be loaded")

    monkeypatch.setattr(encoders, "_load_vae", no_vae)
    latents = write_dataset(tmp_path / "latents.zip", channels=8)
    fails(dataclasses.replace(config, data=str(latents)), "cannot be loaded")
    train(make_run(dataclasses.replace(config, data=str(latents), metrics=None), tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("fd_efflite",)}, "unknown metric 'fd_efflite'"),
        ({"names": ()}, "no metric is named"),
        ({"num": 1}, "--metrics-num=1"),
        ({"every": 0}, "--metrics-every=0"),
        ({"batch": 0}, "--metrics-batch=0"),
        ({"steps": 0}, "--metrics-steps=0"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        MetricsConfig(**{"names": ("fd_efflite0",), **changes})


def test_metrics_without_snapshots_need_an_interval_and_may_change_in_a_run(data, reference):
    config = measured(data, reference)
    with pytest.raises(ConfigError, match="--metrics-every"):
        dataclasses.replace(config, metrics=MetricsConfig(names=("is",)))
    assert dataclasses.replace(config, metrics=None).differences(config.to_json()) == []
    assert config.differences(dataclasses.replace(config, metrics=None).to_json()) == []


TINY = ["--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"]


def test_the_command_tells_the_scores_and_the_best_snapshot(data, reference, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--batch=512", "--duration=2Ki", f"--data={data}", f"--outdir={out}", "--checkpoint=0"]
    metrics = ["--metrics=fd_efflite0,fid", "--metrics-every=1Ki", "--metrics-num=10", "--metrics-steps=3"]
    with pytest.raises(SystemExit, match="2"):
        dnnlib.cli.main(script.train_edm2, [*args, *metrics[1:]])
    assert capsys.readouterr().err == "Error: --metrics-every needs --metrics, e.g. --metrics=fd_efflite0\n"
    assert not out.exists()
    given = [*args, *metrics, f"--metrics-ref={reference}", "--metrics-batch=3", "--efflite0-weights=any.pth"]
    script.train_edm2.main(given, standalone_mode=False)
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [1.024, 2.048]
    for line in lines:
        scores = {key: line[f"Metrics/fd_efflite0{key}"] for key in ("-0.050", "-0.100")}
        assert all(f"fd_efflite0{key} {value:.4g}" in text for key, value in scores.items())
        assert (out / line["Metrics/best_fd_efflite0"]).is_file()
        assert f"best fd_efflite0: {line['Metrics/best_fd_efflite0']}" in text
        assert line["Metrics/settings"] == f"10 images, 3 steps, reference {reference}, efflite0 by any.pth"
    assert text.count("Skipped fid: the reference lacks it") == 1
    options = json.loads((out / "training_options.json").read_text())["metrics"]
    assert (options["num"], options["batch"], options["weights"]) == (10, 3, {"efflite0": "any.pth"})


@pytest.mark.slow
def test_one_and_two_processes_measure_the_same(data, tmp_path):
    ref = tmp_path / "ref.safetensors"
    options = ["--metrics=fd_efflite0", "--device=cpu"]
    run_ranks("calculate_metrics.py", "ref", f"--data={data}", f"--dest={ref}", *options, num=1)
    args = [*TINY, "--batch=16", "--duration=16", f"--data={data}", "--snapshot=16", "--metrics=fd_efflite0"]
    args += [f"--metrics-ref={ref}", "--metrics-num=14", "--metrics-batch=4", "--metrics-steps=3"]
    found = []
    for ranks in (1, 2):
        run_ranks("train_edm2.py", *args, f"--outdir={tmp_path / str(ranks)}", num=ranks)
        (line,) = (tmp_path / str(ranks) / "stats.jsonl").read_text().splitlines()
        found.append({key: value for key, value in json.loads(line).items() if key.startswith("Metrics/fd")})
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-6)
