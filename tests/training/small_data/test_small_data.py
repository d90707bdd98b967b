"""--preset=small: its rules against the papers' figures at both ends, its estimate against what is really there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_edm2 as script
from dnnlib.cli import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny import assert_same_state, tiny_config, write_dataset
from torch_utils.checkpoints.checkpoint import load_checkpoint
from torch_utils.distributed import World
from training.config import PUBLISHED_VAE, TrainingConfig
from training.flops import count_flops
from training.run.state import TrainingState
from training.small_data.estimate import (
    Estimate,
    Memory,
    Speed,
    count_memory,
    describe_estimate,
    estimate,
    loss_bytes,
)
from training.small_data.plan import foreign_share, make_plan, share_of, value_of
from training.small_data.rules import IMAGENET, SHAPES, Facts, choose, count_params, remarks
from training.training_loop import open_dataset

NUMBERS = (1, 20, 300, 999, 3781, 15_000, 50_000, 70_000, 200_000, IMAGENET)
CPU = torch.device("cpu")


def facts(num_images: int, kind: tuple[bool, int] = (False, 32), num_classes: int = 10, **changes: Any) -> Facts:
    latents, resolution = kind
    values = {"num_images": num_images, "num_classes": num_classes, "latents": latents, "resolution": resolution}
    return Facts(**{**values, "num_channels": 4 if latents else 3, **changes})


def chosen(num_images: int, kind: tuple[bool, int] = (False, 32), **changes: Any) -> TrainingConfig:
    return choose(facts(num_images, kind, **changes), SHAPES[kind])[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip", num=60, size=32)


@pytest.fixture(autouse=True)
def measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.small_data.estimate._MEASURE_SEC", 0)


def run(*args: Any) -> int:
    try:
        main(script.train_edm2, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


TINY = ("--preset=small", "--device=cpu", "--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0")


# Rules.


@pytest.mark.parametrize("kind", SHAPES)
def test_more_images_never_ask_for_less(kind):
    configs = [chosen(number, kind) for number in NUMBERS]
    for name in ("batch", "decay", "duration"):
        values = [getattr(config, name) for config in configs]
        assert values == sorted(values) and values[0] < values[-1], name
    sizes = [count_params(config.network, facts(2, kind)) for config in configs]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("kind", SHAPES)
def test_more_classes_never_ask_for_a_shorter_run(kind):
    durations = [chosen(1000, kind, num_classes=number).duration for number in (0, 1, 2, 10, 100, 1000, 10_000)]
    assert durations == sorted(durations) and durations[0] < durations[-1]


def test_with_as_many_images_as_imagenet_the_schedule_is_that_of_edm2():
    for kind, decay, P_mean, P_std in (((False, 64), 35e3, -0.8, 1.6), ((True, 32), 70e3, -0.4, 1.0)):
        config = chosen(IMAGENET, kind)
        assert (config.decay, config.P_mean, config.P_std, config.lr) == (decay, P_mean, P_std, 0.012)
        assert config.rampup * 1e6 / config.batch == pytest.approx(10e6 / 2048, rel=0.05)  # two digits


def test_cifar10_gets_the_batch_of_ddpm_and_the_parameters_of_edm():
    config = chosen(50_000)
    assert config.batch == 128
    assert 0.6 < count_params(config.network, facts(50_000)) / 56e6 <= 1
    assert config.duration / 50_000 == pytest.approx(2147.5e6 / IMAGENET, rel=0.1)  # passes of EDM2


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("number", NUMBERS)
def test_every_option_has_a_reason_and_a_value_that_the_command_line_reads_back(kind, number):
    config, choices = choose(facts(number, kind), SHAPES[kind])
    assert len(choices) == 18 and all(choices.values())
    args = [f"--{option}={value_of(config, option)}" for option in choices]
    context = script.train_edm2.make_context("train_edm2.py", ["--outdir=x", "--data=x", *args])
    given = {name: context.params[name] for name in context.params if name not in _NOT_OPTIONS}
    spelled_out = script.configure("fashion", given)
    per_head = config.network.channels_per_head
    assert dataclasses.replace(
        spelled_out, network=dataclasses.replace(spelled_out.network, channels_per_head=per_head)
    ) == dataclasses.replace(config, data="x")


_NOT_OPTIONS = ("outdir", "preset", "device", "log_names", "timeout", "allow_changes", "dry_run")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_given_duration_decides_on_nothing_that_changes_the_result(kind):
    free, _ = choose(facts(3781, kind), SHAPES[kind])
    short, _ = choose(facts(3781, kind), SHAPES[kind], duration=96 << 10)
    assert short.differences(free.to_json()) == []
    assert (short.snapshot, short.status) == (4 << 10, 1 << 10)
    assert short.snapshot < free.snapshot


def test_few_images_and_many_get_a_remark_and_others_none():
    assert "memorize" in remarks(facts(200))[0]
    assert "edm2-img64-xs" in remarks(facts(500_000))[0]
    assert "edm2-img512-xs" in remarks(facts(500_000, (True, 32)))[0]
    assert remarks(facts(3781)) == []


@pytest.mark.parametrize("num_classes", [0, 1])
def test_where_there_is_nothing_to_tell_apart_the_network_is_unconditional(num_classes):
    assert not chosen(100, num_classes=num_classes).cond
    assert chosen(100, num_classes=2).cond


# Mirroring.


def noise_set(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, [num, 3, 16, 16])


def test_where_either_direction_is_as_likely_a_mirror_image_is_as_near_as_the_picture():
    assert 0.4 < share_of(noise_set(400)) < 0.6


def test_a_set_that_holds_its_own_mirror_images_may_be_mirrored():
    half = noise_set(100)
    assert share_of(np.concatenate([half, half[..., ::-1]])) == 0


def test_symmetric_pictures_are_no_evidence_either_way():
    half = noise_set(50)[..., :8]
    assert share_of(np.concatenate([half, half[..., ::-1]], axis=3)) == 0.5
    assert share_of(noise_set(1)) == 0.5


def test_mirrored_letters_are_foreign():
    letters = np.zeros([60, 1, 16, 16], dtype=np.int64)
    for index, letter in enumerate(letters):
        top, left = index % 5, index // 5 % 4
        letter[0, top : top + 10, left : left + 3] = 200  # an L
        letter[0, top + 8 : top + 10, left : left + 8] = 200 + index % 7
    assert share_of(letters) > 0.9


def test_the_share_is_what_a_loop_over_all_pairs_finds():
    pictures = noise_set(24)

    def nearest(picture: np.ndarray, but: int) -> int:
        return min(int(np.square(picture - other).sum()) for i, other in enumerate(pictures) if i != but)

    own = [nearest(picture, i) for i, picture in enumerate(pictures)]
    mirrored = [nearest(picture[..., ::-1], i) for i, picture in enumerate(pictures)]
    wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in zip(own, mirrored, strict=True)]
    assert share_of(pictures) == sum(wins) / len(wins)


def test_the_shipped_shoes_and_shirts_are_not_to_be_mirrored_and_the_preset_says_so():
    config = TrainingConfig(data=str(ROOT / "data" / "fashion-mnist-32.zip"))
    share = foreign_share(open_dataset(config))
    assert share > 0.6
    assert not choose(facts(6000, foreign=share), SHAPES[False, 32])[0].xflip
    assert choose(facts(6000, foreign=0.5), SHAPES[False, 32])[0].xflip


# From a data set.


def test_the_plan_knows_the_data(data):
    plan = make_plan(str(data), cond=None, xflip=None, vae=None, duration=None)
    assert (plan.facts.num_images, plan.facts.num_classes, plan.facts.resolution) == (60, 3, 32)
    assert plan.facts.foreign is not None and plan.config.cond


def test_latents_of_256x256_pictures_are_covered_and_not_mirrored(tmp_path):
    latents = write_dataset(tmp_path / "latents.zip", num=6, size=32, channels=8)
    plan = make_plan(str(latents), cond=None, xflip=None, vae=None, duration=None)
    assert (plan.facts.latents, plan.facts.num_channels, plan.config.P_mean) == (True, 4, -0.4)
    assert plan.facts.foreign is None and not plan.config.xflip


def test_pictures_that_are_encoded_on_the_way_are_latents_that_can_be_mirrored(tmp_path):
    pictures = write_dataset(tmp_path / "pictures.zip", num=4, size=256)
    plan = make_plan(str(pictures), cond=None, xflip=None, vae=PUBLISHED_VAE, duration=None)
    assert (plan.facts.latents, plan.facts.resolution, plan.facts.num_channels) == (True, 32, 4)
    assert plan.facts.foreign is not None
    config = tiny_config(pictures, vae=PUBLISHED_VAE)
    found = estimate(config, open_dataset(config), CPU, 1)  # without the VAE, which is not here
    assert found.images_per_sec > 0
    assert found.num_params == count_params(config.network, facts(4, (True, 32), num_classes=3))


def test_data_behind_a_url_is_counted_and_not_searched(tmp_path, data):
    cache = {"data_cache": str(tmp_path / "cache"), "data_cache_size": 10**9}
    plan = make_plan(data.as_uri(), cond=None, xflip=None, vae=None, duration=None, **cache)
    assert (plan.facts.num_images, plan.facts.num_classes, plan.facts.foreign) == (60, 3, None)
    assert not plan.config.xflip


def test_data_without_labels_is_trained_on_without_classes(tmp_path):
    plain = write_dataset(tmp_path / "plain.zip", num=6, size=32, labels=False)
    assert not make_plan(str(plain), cond=None, xflip=None, vae=None, duration=None).config.cond


@pytest.mark.parametrize(
    ("size", "channels", "advice"),
    [(16, 3, "--resolution=32x32 or 64x64"), (256, 3, "dataset_tool.py encode"), (64, 8, "--preset=edm2-img512-xs")],
)
def test_other_sizes_are_refused_with_what_would_be_right(size, channels, advice, tmp_path, capsys):
    other = write_dataset(tmp_path / "other.zip", num=2, size=size, channels=channels)
    assert run("--preset=small", f"--data={other}", f"--outdir={tmp_path / 'run'}") == 2
    text = capsys.readouterr().err
    assert advice in text and f"{size}x{size}" in text and "Traceback" not in text and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_preset_without_data_is_refused(tmp_path, capsys):
    assert run("--preset=small", f"--outdir={tmp_path / 'run'}") == 2
    assert "--data is missing" in capsys.readouterr().err


# The command line.


def test_a_dry_run_prints_every_choice_with_its_reason_and_the_estimate(data, tmp_path, capsys):
    args = [*TINY, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--lr=0.02", "--xflip=True"]
    assert run(*args, "--dry-run") == 0
    text = capsys.readouterr().out
    options = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    assert (options["lr"], options["xflip"], options["network"]["channels"]) == (0.02, True, 4)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  --"))
    assert rows["--lr=0.02"] == rows["--xflip=True"] == rows["--channels=4"] == "as given"
    assert rows["--batch=16"].startswith("half the square root")
    assert "images/s, measured" in text and "GiB a process" in text and "memorize" in text
    assert not (tmp_path / "run").exists()


def test_a_run_continues_whatever_the_speed_is_and_can_be_made_longer(data, tmp_path, capsys, monkeypatch):
    args = [*TINY, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--batch=8", "--snapshot=0"]
    assert run(*args, "--duration=32", "--checkpoint=16", "--slice=16") == 0
    assert "Estimate for this machine" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    first = (tmp_path / "run" / "training_options.json").read_text(encoding="utf-8")
    real = estimate

    def slower(*arguments: Any) -> Estimate:
        found = real(*arguments)
        return dataclasses.replace(found, speed=dataclasses.replace(found.speed, image_sec=1000))

    monkeypatch.setattr(script, "estimate", slower)
    assert run(*args, "--duration=32", "--checkpoint=16") == 0
    text = capsys.readouterr().out
    assert "Continuing from" in text and "Done: 0.032 kimg" in text
    second = (tmp_path / "run" / "training_options.json").read_text(encoding="utf-8")
    assert json.loads(first) | {"slice": None} == json.loads(second)
    assert run(*args, "--duration=48", "--checkpoint=16") == 0
    assert "Done" in capsys.readouterr().out


def test_the_preset_trains_the_weights_that_its_options_train_when_spelled_out(data, tmp_path):
    common = ["--device=cpu", f"--data={data}", "--duration=32", "--checkpoint=32", "--snapshot=0"]
    common += ["--channels=4", "--channel-mult=1,2", "--num-blocks=1", "--batch=16", "--lr=0.012", "--decay=240"]
    common += ["--rampup=0.0016", "--P_mean=-0.8", "--P_std=1.6", "--dropout=0.1", "--attn-resolutions=8"]
    for name in ("small", "fashion"):
        xflip = ["--xflip=False"]
        assert run(f"--preset={name}", f"--outdir={tmp_path / name}", *common, *xflip) == 0
    first, second = (
        load_checkpoint(tmp_path / name / "training-state-0000000.032.pt") for name in ("small", "fashion")
    )
    assert_same_state(first, second)


# The estimate.


def test_the_memory_of_weights_is_that_of_the_tensors_that_there_are(data):
    config = tiny_config(data, ema_stds=(0.05, 0.1, 0.2), status=0)
    dataset = open_dataset(config)
    state = TrainingState(config, dataset, World(), resumed=False)
    images, labels = torch.zeros([8, 3, 32, 32], dtype=torch.uint8), torch.zeros([8, 3])
    state.step(images, labels)
    state.accumulate_gradients(images, labels)
    parameters = list(state.net.parameters())
    moments = [s[key] for s in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    averages = [tensor for net, _ in state.ema.get() for tensor in net.parameters()]
    real = [*parameters, *(p.grad for p in parameters), *moments, *averages]
    memory = count_memory(state, config, dataset, per_round=8)
    assert memory.weights == sum(tensor.nbytes for tensor in real)
    assert memory.images == 60 * 3 * 32 * 32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_memory_of_activations_is_near_what_a_step_keeps(data, precision, dropout):
    config = tiny_config(data, precision=precision, dropout=dropout, attn_resolutions=(16,), channels=16, batch=6)
    dataset = open_dataset(config)
    state = TrainingState(config, dataset, World(), resumed=False)
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state.accumulate_gradients(torch.zeros([6, 3, 32, 32], dtype=torch.uint8), torch.zeros([6, 3]))
    memory = count_memory(state, config, dataset, per_round=6)
    assert memory.activations == pytest.approx(loss_bytes(state, 6), rel=0.01)  # linear in the number of images
    assert memory.activations == pytest.approx(sum(sizes.values()), rel=0.1)


def test_an_estimate_counts_three_forward_passes_and_scales_with_images_and_processes(data):
    config = tiny_config(data, batch=16)
    dataset = open_dataset(config)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = estimate(config, dataset, CPU, 1)
    assert torch.equal(torch.get_rng_state(), before)
    net = TrainingState(config, dataset, World(), resumed=False).net
    assert found.image_ops == 3 * count_flops(net).total_flops
    assert found.num_params == count_flops(net).total_params
    assert found.images_per_sec > 0 and found.speed.num_images == 16
    assert found.seconds(2000) == pytest.approx(2 * found.seconds(1000))
    two = dataclasses.replace(found, num_ranks=2)
    assert found.images_per_sec < two.images_per_sec <= 2 * found.images_per_sec


def test_a_network_that_sees_a_picture_is_estimated_with_it(data):
    plain, seeing = (tiny_config(data, batch=4, condition=condition) for condition in (None, "lowres:4"))
    found = [estimate(config, open_dataset(config), CPU, 1) for config in (plain, seeing)]
    assert found[1].image_ops > found[0].image_ops
    assert found[1].memory.weights > found[0].memory.weights


def fixed_estimate(**changes: Any) -> Estimate:
    config = TrainingConfig(data="x", batch=32, duration=1 << 20)
    speed = Speed(image_sec=0.01, batch_sec=0.08, num_images=32, num_steps=4)
    memory = Memory(weights=2**30, activations=2**29, copies=2**28, images=2**27, program=2**28)
    values = {"config": config, "device": CPU, "num_ranks": 1, "num_images": 1000, "num_params": 10**6}
    return Estimate(**{**values, "image_ops": 10**9, "speed": speed, "memory": memory, **changes})


def test_what_fits_an_hour_is_offered_where_the_run_takes_longer():
    found = fixed_estimate()
    assert found.images_per_sec == pytest.approx(32 / 0.4)
    nimg = found.images_in(3600)
    assert nimg == 281 << 10 and found.seconds(nimg) <= 3600 < found.seconds(nimg + 1024)
    text = describe_estimate(found)
    assert "3 h 38 min for 1Mi images, 1,049 passes" in text and "--duration=281Ki takes an hour" in text
    assert "2.12 GiB a process" in text
    short = dataclasses.replace(found, config=TrainingConfig(data="x", batch=32, duration=64))
    assert "an hour" not in describe_estimate(short)
    assert "for the rest of 1Mi" in describe_estimate(found, nimg=1000)
    assert "1.50 GiB a process on the device" in describe_estimate(
        dataclasses.replace(found, device=torch.device("cuda"))
    )


def test_a_slow_machine_is_offered_at_least_one_batch():
    slow = fixed_estimate(speed=Speed(image_sec=1000, batch_sec=0, num_images=1, num_steps=2))
    assert slow.images_in(60) == 32


# What a person reads who has not read the documentation.


def test_without_a_preset_the_default_is_named_with_what_suits_the_data_and_the_time_it_takes(tmp_path, capsys):
    data = write_dataset(tmp_path / "data.zip", num=4, size=32)
    args = [f"--data={data}", f"--outdir={tmp_path / 'run'}", "--device=cpu", "--batch=4", "--duration=4"]
    args += ["--channels=8", "--channel-mult=1,2", "--num-blocks=1", "--rampup=0"]
    assert run(*args, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "No --preset was given, so this is edm2-img512-s" in text and "--preset=small suits them" in text
    assert "million parameters" in text and "on this machine" in text
    assert run(*args) == 0
    assert "--preset=small suits them" in capsys.readouterr().out
    assert run(*args, "--duration=8", "--dry-run", "--preset=edm2-img512-s") == 0
    assert "No --preset" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--preset=smal", "such as small"),
        ("--format=pkll", "Did you mean pkl?"),
        ("--precision=bf-16", "Did you mean bf16?"),
    ],
)
def test_a_mistyped_choice_gets_the_nearest_one(option, meant, data, tmp_path, capsys):
    assert run(f"--data={data}", f"--outdir={tmp_path / 'run'}", option) == 2
    error = capsys.readouterr().err
    assert meant in error and error.count("\n") == 1


def test_a_run_that_cannot_fit_is_offered_smaller_rounds(monkeypatch):
    memory = Memory(weights=2**30, activations=32 * 2**28, image=2**28, copies=0, images=0)
    monkeypatch.setattr("training.small_data.estimate.free_bytes", lambda device: 4 * 2**30)
    text = describe_estimate(fixed_estimate(memory=memory))
    assert "which is more than the 4.00 GiB that are free here: --batch-gpu=8 fits" in text
    monkeypatch.setattr("training.small_data.estimate.free_bytes", lambda device: 2**30)
    assert "a smaller --channels is needed" in describe_estimate(fixed_estimate(memory=memory))
    monkeypatch.setattr("training.small_data.estimate.free_bytes", lambda device: 2**40)
    assert "more than" not in describe_estimate(fixed_estimate(memory=memory))


def test_reasons_fit_the_run_that_was_asked_for(data, tmp_path, capsys):
    args = [*TINY, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--dry-run"]
    assert run(*args, "--duration=4Ki") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  --"))
    assert rows["--snapshot=1Ki"] == "4 in the run, of a short run" and rows["--checkpoint=1Ki"] == "as --snapshot"
    assert run(*args, "--duration=64Ki", "--snapshot=6Ki", "--batch=32") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  --"))
    assert rows["--snapshot=6Ki"] == "as given" and rows["--checkpoint=6Ki"] == "as --snapshot"
    assert rows["--status=1536"] == "a quarter of --checkpoint"
    assert run(*args, "--duration=1Ki", "--rampup=0.01") == 0
    assert "would suit a run this short" in capsys.readouterr().out
    assert run(*args) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  --"))
    duration = next(why for option, why in rows.items() if option.startswith("--duration"))
    assert f"images, {duration.split(';')[0]}" in text


def test_a_dry_run_says_below_the_estimate_that_the_number_format_is_slow_here(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    args = [*TINY, f"--data={data}", f"--outdir={tmp_path / 'run'}", "--batch=4", "--dry-run"]
    assert run(*args, "--precision=bf16") == 0
    _, _, below = capsys.readouterr().out.partition("Estimate for this machine")
    assert "it is emulated, and slower than --precision=fp32" in below
    assert run(*args, "--precision=auto") == 0
    text = capsys.readouterr().out
    assert "--precision=auto: fp32" in text and "emulated" not in text
