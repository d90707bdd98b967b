"""A run's options: how a batch is shared, which values are refused, which changes matter."""

import dataclasses
import json
import math

import pytest
import torch

from dnnlib.errors import ConfigError
from dnnlib.fields import option_name
from train_edm2 import train_edm2
from training.config import MetricsConfig, NetworkConfig, SamplesConfig, TrainingConfig

CONFIG = TrainingConfig(data="data.zip", batch=48)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_gpu", [None, 1, 4, 8, 1000])
def test_shares_and_rounds_make_up_the_batch(num_ranks, batch_gpu):
    share, rounds = dataclasses.replace(CONFIG, batch_gpu=batch_gpu).share_of(num_ranks)
    assert share * num_ranks == CONFIG.batch
    assert share % rounds == 0
    assert share // rounds <= (batch_gpu or CONFIG.batch)


@pytest.mark.parametrize(
    ("batch", "batch_gpu", "num_ranks", "fit"),
    [(48, None, 5, {"batch": 45}), (3, None, 4, {"batch": 4}), (48, 5, 1, {"batch_gpu": 4})],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, batch_gpu, num_ranks, fit):
    config = dataclasses.replace(CONFIG, batch=batch, batch_gpu=batch_gpu)
    with pytest.raises(ConfigError, match=f"; try --{next(iter(fit)).replace('_', '-')}={next(iter(fit.values()))}$"):
        config.share_of(num_ranks)
    dataclasses.replace(config, **fit).share_of(num_ranks)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", 0),
        ("batch_gpu", 0),
        ("duration", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("ls", 0),
        ("P_std", 0),
        ("P_mean", math.nan),
        ("decay", -1),
        ("decay", math.nan),
        ("rampup", -1),
        ("status", -1),
        ("snapshot", -1),
        ("checkpoint", -1),
        ("workers", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("ema_stds", ()),
        ("ema_stds", (0.1, 0.1001)),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}|--{name}"):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 0),
        ("num_blocks", 0),
        ("channel_mult", ()),
        ("channel_mult", (1, 0)),
        ("dropout", 1),
        ("dropout", -1),
    ],
)
def test_networks_that_cannot_work_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        dataclasses.replace(CONFIG, network=NetworkConfig(**{name: value}))


def test_a_configuration_equals_its_own_record():
    assert CONFIG.differences(CONFIG.to_json()) == []


def test_every_field_changes_the_result_except_these():
    record = json.loads(CONFIG.to_json())
    neutral = set()
    for key in record.keys() - {"network"}:
        if not CONFIG.differences(json.dumps({**record, key: "another"})):
            neutral.add(key)
        else:
            assert CONFIG.differences(json.dumps({**record, key: "another"})) == [
                f"{key}: another in the run, {record[key]} asked for"
            ]
    assert neutral == {
        "duration",
        "batch_gpu",
        "status",
        "snapshot",
        "checkpoint",
        "snapshot_format",
        "bench",
        "compile",
        "recompute",
        "samples",
        "shard",
        "shard_group",
        "workers",
        "metrics",
        "data_cache",
        "data_cache_size",
        "keep_checkpoints",
        "background_saves",
        "on_disk_full",
        "slice",
        "on_nonfinite",
        "nonfinite_limit",
        "monitor",
    }
    for key in record["network"]:
        changed = {**record, "network": {**record["network"], key: "another"}}
        assert len(CONFIG.differences(json.dumps(changed))) == 1, key


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"network": 3}', "null", "\x00"])
def test_a_record_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"training_options\.json"):
        CONFIG.differences(text)


def test_heads_are_never_wider_than_the_narrowest_level_with_attention():
    narrow = NetworkConfig(channels=16, channel_mult=(1, 3, 2), attn_resolutions=(16,))  # at 32 pixels: levels 1 and 2
    assert narrow.fitted_to(32).channels_per_head == 32
    assert dataclasses.replace(narrow, attn_resolutions=(32,)).fitted_to(32).channels_per_head == 16
    assert NetworkConfig(channels=192).fitted_to(64) == NetworkConfig(channels=192)


def test_sharding_is_neutral_and_its_groups_must_divide_the_processes():
    config = TrainingConfig(data="x", shard=True, shard_group=4)
    assert not config.differences(TrainingConfig(data="x").to_json())
    assert config.group_of(8) == 4 and config.shards_over(8)
    assert dataclasses.replace(config, shard_group=None).group_of(8) == 8
    assert not config.shards_over(1) and config.group_of(1) == 4  # one process has nothing to spread
    with pytest.raises(ConfigError, match="--shard-group=4 does not divide 6 processes; try 2"):
        config.group_of(6)
    with pytest.raises(ConfigError, match="--shard=True"):
        TrainingConfig(data="x", shard_group=4)
    with pytest.raises(ConfigError, match="--shard-group=0"):
        TrainingConfig(data="x", shard=True, shard_group=0)


def test_every_field_is_an_option_or_one_of_these():
    parts = (TrainingConfig, NetworkConfig, MetricsConfig, SamplesConfig)
    fields = [(part, item) for part in parts for item in dataclasses.fields(part)]
    without = {item.name for _, item in fields if item.metadata.get("help") is None}
    assert without == {"vae", "encoder_precision", "network", "metrics", "samples", "channels_per_head", "weights"}
    names = [option_name(part, item) for part, item in fields if item.name not in without]
    known = {name.removeprefix("--") for option in train_edm2.params for name in option.opts}
    assert len(set(names)) == len(names) and set(names) <= known


def test_a_run_compiles_only_where_a_compiler_is_found(monkeypatch: pytest.MonkeyPatch):
    config, gpu = CONFIG, torch.device("cuda")
    for missing in (None, "no compiler was found"):
        monkeypatch.setattr("torch_utils.compiling.missing_compiler", lambda device, missing=missing: missing)
        assert config.compiles_on(gpu) == (missing is None) and config.asks_to_compile_on(gpu)
        assert not config.compiles_on(torch.device("cpu"))


def test_resolutions_with_attention_are_not_negative():
    with pytest.raises(ConfigError, match="--attn-resolutions needs whole numbers"):
        NetworkConfig(attn_resolutions=(16, -8))
