"""The explorer without its page: images match their commands, memory is bounded, and work stops on request."""

import dataclasses
import os
import shlex
import shutil
import threading
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

import explore
import generate_images
import reconstruct_phema
from dnnlib.errors import ConfigError
from edm2.explorer import show
from edm2.explorer.grids import Explorer, Film, Grid, Pair, Progress, generate_film, generate_grid, image_of
from edm2.explorer.networks import BoundedCache, Loading, Networks, RunSnapshots
from edm2.explorer.setting import Setting, commands_for
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.small_network import small_network
from torch_utils import cuda
from training.images.png import encode_png
from training.images.png_files import read_png
from training.sampling.options import SamplerOptions
from training.sampling.sampler import edm_sampler
from training.sampling.schedule import HeunOptions
from training.sampling.solvers import SOLVERS
from training.snapshot import load_snapshot, save_snapshot

NET = str(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl")
GUIDE = str(GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl")
RUN = str(GOLDEN_DIR / "snapshots" / "run")
NUM_CLASSES = load_snapshot(NET).net.label_dim


@pytest.fixture(scope="module")
def networks():
    return Networks(torch.device("cpu"))


def last(records):
    *_, record = records
    return record


def small(**changes):
    return Setting(**{"net": NET, "num_images": 3, "num_steps": 2, **changes})


def run_command(line, folder, monkeypatch):
    """Run a command line unchanged, in `folder`."""
    words = shlex.split(line)
    commands = {"generate_images.py": generate_images.cmdline, "reconstruct_phema.py": reconstruct_phema.cmdline}
    assert words[0] == "python"
    monkeypatch.chdir(folder)
    result = click.testing.CliRunner().invoke(commands[words[1]], words[2:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_end_with_the_images_of_the_sampler(solver):
    net = load_snapshot(NET).net
    noise = torch.randn([2, net.img_channels, net.img_resolution, net.img_resolution])
    labels = torch.eye(NUM_CLASSES)[:2]
    evaluated = []
    with torch.no_grad():
        evaluations = SamplerOptions.from_keywords(num_steps=5, solver=solver).evaluations(net, noise, labels)
        while True:
            try:
                evaluated.append(next(evaluations))
            except StopIteration as end:
                images = end.value
                break
        assert torch.equal(images, edm_sampler(net, noise, labels, num_steps=5, solver=solver))
        for evaluation in evaluated:
            again = net(evaluation.x, torch.tensor(evaluation.sigma), labels)
            torch.testing.assert_close(evaluation.denoised, again, rtol=1e-5, atol=1e-5)
    steps = [evaluation for evaluation in evaluated if not evaluation.is_trial]
    assert [evaluation.step_idx for evaluation in steps] == list(range(5))
    assert [evaluation.sigma for evaluation in steps] == HeunOptions(num_steps=5).sigmas()[:-1]
    assert len(evaluated) == (9 if solver == "heun" else 5)
    assert torch.equal(evaluated[0].x, noise * 80)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_images": 18, "first_seed": 5},  # two batches
        {"class_idx": 1, "solver": "dpmpp2m", "num_steps": 3},
        {"class_idx": "all", "num_images": 2 * NUM_CLASSES},
        {"guide": GUIDE, "guidance": 1.35, "interval": (0.05, 40.0), "num_steps": 4},
        {"num_images": 1, "first_seed": 123456},
        {"net": RUN, "ema": 0.1},
        {"net": RUN, "ema": 0.083},
    ],
)
def test_the_commands_make_what_is_shown(changes, networks, tmp_path, monkeypatch):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    changes = dict(changes)
    for name in {"net", "guide"} & changes.keys():  # under names that a shell would split
        copy = folder / f"a $copy & {name}{Path(changes[name]).suffix}"
        (shutil.copytree if os.path.isdir(changes[name]) else shutil.copy)(changes[name], copy)
        changes[name] = str(copy)
    setting = small(**changes)
    shown = last(generate_grid(setting, networks))
    commands = commands_for(setting, networks)
    assert len(commands) == (2 if setting.ema == 0.083 else 1)
    for line in commands:
        run_command(line, tmp_path, monkeypatch)
    if setting.num_images > 1:
        assert np.array_equal(read_png(tmp_path / "out" / "grid.png"), shown.sheet())
    else:
        assert np.array_equal(read_png(tmp_path / "out" / f"{setting.first_seed:06d}.png"), shown.images[0])


@pytest.mark.parametrize("channels", [2, 4])
def test_networks_of_images_with_alpha_are_shown(channels, networks, tmp_path, monkeypatch):
    path = str(tmp_path / "net.safetensors")
    save_snapshot(dataclasses.replace(load_snapshot(NET), net=small_network(img_channels=channels).eval()), path)
    setting = small(net=path)
    shown = last(generate_grid(setting, networks))
    assert shown.images.shape[1] == channels and "data:image/png" in show.grid(shown, [], name="grid.png")
    assert "data:image/png" in show.film(last(generate_film(small(net=path, num_images=1), networks, num_frames=2)), [])
    for line in commands_for(setting, networks):
        run_command(line, tmp_path, monkeypatch)
    assert np.array_equal(read_png(tmp_path / "out" / "grid.png"), shown.sheet())


def trained_without_labels(folder):
    """Path of a network that was trained with label dropout."""
    snapshot = load_snapshot(NET)
    save_snapshot(dataclasses.replace(snapshot, info={"label_dropout": 0.1}), folder / "net.safetensors")
    return str(folder / "net.safetensors")


@pytest.mark.parametrize("changes", [{"guide": "self", "guidance": 1.5}, {"class_idx": "none"}])
def test_a_network_without_its_class(changes, networks, tmp_path, monkeypatch):
    setting = small(net=trained_without_labels(tmp_path), **changes)
    shown = last(generate_grid(setting, networks))
    assert (shown.classes is None) == ("class_idx" in changes)
    assert not np.array_equal(shown.images, last(generate_grid(small(), networks)).images)
    for line in commands_for(setting, networks):
        run_command(line, tmp_path, monkeypatch)
    assert np.array_equal(read_png(tmp_path / "out" / "grid.png"), shown.sheet())
    assert networks.facts(setting.net).label_dropout and not networks.facts(NET).label_dropout


def test_commands_carry_options_that_are_not_at_their_defaults(tmp_path):
    networks = Networks(torch.device("cpu"), precision="bf16")
    setting = small(num_images=40, class_idx="all", guide=GUIDE, guidance=1.0, interval=(0.1, 2))
    (line,) = commands_for(setting, networks, given_device="cpu", batch=8)
    words = shlex.split(line)
    assert {"--precision=bf16", "--device=cpu", "--batch=8", "--class=all", "--seeds=0-39"} <= set(words)
    assert not any("gnet" in word or "guidance" in word or "interval" in word for word in words)  # nothing is guided


def test_a_folder_with_other_networks_next_to_the_snapshots(networks, tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "run")
    for std in ("0.050", "0.150"):
        copied = tmp_path / "run" / f"phema-0033554-{std}.pkl"
        shutil.copy(tmp_path / "run" / "network-snapshot-0033554-0.100.pkl", copied)
    setting = small(net=str(tmp_path / "run"), ema=0.15)
    shown = last(generate_grid(setting, networks))
    assert "from 8 snapshots" in shown.notes[0]
    for line in commands_for(setting, networks):
        run_command(line, tmp_path, monkeypatch)
    assert np.array_equal(read_png(tmp_path / "out" / "grid.png"), shown.sheet())


def test_progress_grows_and_shows_estimates(networks):
    records = list(generate_grid(small(num_images=3), networks, batch=2))
    progress = [record for record in records if isinstance(record, Progress)]
    shares = [record.share for record in progress]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 1
    assert len(progress) == 2 * 3  # batches, and evaluations of two steps of Heun
    grid = records[-1]
    first, final = progress[0].images, progress[-1].images
    assert first.shape == grid.images.shape and (first[2] == first[2, 0, 0, 0]).all()  # not started: gray
    assert np.array_equal(final[:2], grid.images[:2])  # the finished batch
    assert not np.array_equal(first[:2], grid.images[:2])
    assert grid.classes is not None and len(grid.classes) == 3


def test_nothing_is_computed_before_it_is_asked_for_or_after_it_is_closed(monkeypatch):
    calls = []
    networks = Networks(torch.device("cpu"))
    plain = networks._prepare

    def counting(*args):
        loaded = plain(*args)
        bind = loaded.net.bind

        def bound(labels):
            denoise = bind(labels)
            return lambda *inputs: calls.append(1) or denoise(*inputs)

        loaded.net.bind = bound
        return loaded

    monkeypatch.setattr(networks, "_prepare", counting)
    records = generate_grid(small(num_steps=50), networks)
    assert calls == []
    while not isinstance(next(records), Progress):
        pass
    next(records)
    assert len(calls) == 2
    records.close()
    assert len(calls) == 2
    with pytest.raises(StopIteration):
        next(records)


def test_the_film_strip_goes_from_noise_to_the_image_of_the_grid(networks):
    setting = small(guide=GUIDE, guidance=2.0, num_steps=6)
    grid = last(generate_grid(setting, networks))
    film = last(generate_film(image_of(setting, 2, NUM_CLASSES), networks, num_frames=4))
    assert np.array_equal(film.image, grid.images[2])
    assert film.image_class == grid.classes[2]
    sigmas = HeunOptions(num_steps=6).sigmas()
    assert [frame.sigma for frame in film.frames] == [sigmas[i] for i in (0, 2, 4, 6)]
    noisy = [frame.noisy.astype(int) for frame in film.frames]
    first, final = (np.abs(noisy[i] - film.image).mean() for i in (0, -1))
    assert first > 20 and final == 0
    height, width = film.image.shape[1:]
    assert film.sheet().shape == (film.image.shape[0], 2 * (height + 2) + 2, 4 * (width + 2) + 2)


def test_an_image_of_dealt_classes_keeps_its_class(networks):
    setting = small(class_idx="all", num_images=2 * NUM_CLASSES)
    assert image_of(setting, 3, NUM_CLASSES) == small(class_idx=1, first_seed=3, num_images=1)
    explorer = Explorer(networks)
    grid = last(explorer.grid(setting))
    assert np.array_equal(last(explorer.film(setting, 3, num_frames=2)).image, grid.images[3])


def test_finished_images_are_not_computed_again(networks):
    explorer = Explorer(networks)
    a, b = small(first_seed=7), small(first_seed=7, num_steps=3)
    first = last(explorer.grid(a))
    records = list(explorer.both(a, b))
    assert records[0].a is first and records[0].b is None  # not computed again
    assert all(isinstance(record, Pair) and record.a is first for record in records)
    assert np.array_equal(records[-1].b.images, last(generate_grid(b, networks)).images)
    assert a.differences(b) == ["num_steps"]
    films = [last(explorer.film(a, 0, num_frames=2)) for _ in range(2)]
    assert films[0] is films[1] and isinstance(films[0], Film)


def test_a_file_that_changes_is_loaded_again(tmp_path):
    path = tmp_path / "net.pkl"
    shutil.copy(NET, path)
    explorer = Explorer(Networks(torch.device("cpu")))
    setting = small(net=str(path))
    before = last(explorer.grid(setting))
    shutil.copy(GUIDE, path)
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(last(explorer.grid(setting)).images, before.images)


def test_networks_are_cached_up_to_the_bound_and_the_least_recently_used_goes_first():
    networks = Networks(torch.device("cpu"))
    last(generate_grid(small(net=RUN, ema=0.07, num_images=1, num_steps=1), networks))
    one = networks.cache.num_bytes
    networks = Networks(torch.device("cpu"), max_bytes=round(2.5 * one))

    def loads(ema):
        records = list(generate_grid(small(net=RUN, ema=ema, num_images=1, num_steps=1), networks))
        return isinstance(records[0], Loading)

    assert [loads(ema) for ema in (0.07, 0.08, 0.07, 0.09, 0.07)] == [True, True, False, True, False]
    assert len(networks.cache) == 2 and networks.cache.num_bytes <= networks.cache.max_bytes
    assert loads(0.08)  # the least recently used


def test_a_network_beyond_the_bound_is_used_but_not_cached():
    networks = Networks(torch.device("cpu"), max_bytes=1000)
    grid = last(generate_grid(small(), networks))
    assert len(networks.cache) == 0 and any("--cache-size" in note for note in grid.notes)


def test_on_a_gpu_the_number_of_networks_is_bounded():
    """Their graphs take memory that --cache-size does not count, and a stream each."""
    assert Networks(torch.device("cpu")).cache.max_values is None
    bound = Networks(torch.device("cuda")).cache.max_values
    assert bound is not None
    cache = BoundedCache(100, bound)
    for number in range(20):
        cache.put(number, number, 1)
    assert (len(cache), cache.num_bytes, cache.get(19), cache.get(19 - bound)) == (bound, bound, 19, None)
    assert bound * cuda._MAX_RECORDINGS < cuda._POOL_SIZE


def test_the_cache_counts_its_bytes_right_from_many_threads():
    cache = BoundedCache(100)

    def work(seed):
        for i in range(300):
            cache.put((seed * i) % 23, i, (seed + i) % 40)
            cache.get(i % 23)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < cache.num_bytes <= 100
    assert cache.num_bytes == sum(num for _, num in cache._values.values())


def conditioned(tmp_path, monkeypatch):
    snapshot = load_snapshot(NET)
    snapshot.net.cond_channels = 3
    monkeypatch.setattr("edm2.explorer.networks.load_snapshot", lambda *args, **kwargs: snapshot)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": "missing.pkl"}, "missing.pkl"),
        ({"net": " "}, "no network to sample from"),
        ({"net": RUN}, "choose an EMA length"),
        ({"net": RUN, "ema": 0.5}, "EMA length 0.5 must be from 0.001 to 0.288"),
        ({"net": str(GOLDEN_DIR / "snapshots")}, "no snapshots {prefix}"),
        ({"guidance": 2.0}, "guidance=2 needs a guiding network"),
        ({"guide": GUIDE, "guidance": float("nan")}, "guidance=nan"),
        ({"guide": str(GOLDEN_DIR / "snapshots" / "latent-cond.pkl"), "guidance": 2.0}, "the guide is for images of"),
        ({"guide": GUIDE, "guidance": 2.0, "interval": (5.0, 0.2)}, "above 5 and up to 0.2"),
        ({"guide": "self", "guidance": 2.0}, "does not say that it was trained with --label-dropout"),
        ({"class_idx": "none"}, "does not say that it was trained with --label-dropout"),
        ({"class_idx": 99}, "class 99 is out of range"),
        ({"net": RUN, "ema": 0.05, "class_idx": 1}, "takes no class"),
        ({"class_idx": "all", "num_images": NUM_CLASSES + 1}, f"choose {NUM_CLASSES} or {2 * NUM_CLASSES}"),
        ({"num_images": 0}, "0 images"),
        ({"num_images": 1000}, "1000 images is out of range; choose a whole number from 1 to 256"),
        ({"num_steps": 0}, "0 steps"),
        ({"first_seed": -1}, "-1 as first seed"),
        ({"solver": "magic"}, "'magic'"),
    ],
)
def test_errors_are_one_line(changes, message, networks):
    with pytest.raises(ConfigError) as error:
        list(generate_grid(small(**changes), networks))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_network_conditioned_on_images_is_refused(tmp_path, monkeypatch):
    conditioned(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="is conditioned on images"):
        list(generate_grid(small(), Networks(torch.device("cpu"))))


def test_film_strips_that_are_not_possible(networks):
    with pytest.raises(ConfigError, match="image 4 does not exist"):
        image_of(small(), 3, NUM_CLASSES)
    for setting, frames, message in ((small(), 4, "shows one image"), (small(num_images=1), 1, "1 frames is not")):
        with pytest.raises(ConfigError, match=message):
            list(generate_film(setting, networks, num_frames=frames))


def test_facts_without_loading(networks):
    facts = networks.facts(RUN)
    assert facts.lengths == (0.05, 0.1) and facts.label_dim == 0 and facts.size == (3, 8, 8)
    assert "33.6 million images" in str(facts)
    run = RunSnapshots.read(RUN)
    assert run.stored(0.05) is not None and run.stored(0.051) is None and run.nimg // 1000 == 33554


def test_sheets_are_png_files_of_the_same_pixels(networks, tmp_path):
    grid = last(generate_grid(small(), networks))
    (tmp_path / "a.png").write_bytes(encode_png(grid.sheet()))
    pixels = np.asarray(PIL.Image.open(tmp_path / "a.png"))
    assert np.array_equal(pixels, grid.sheet().transpose(1, 2, 0))
    assert isinstance(grid, Grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net=missing.pkl"], "missing.pkl"),
        (["--run=missing"], "cannot read the input folder missing"),
        (["--gnet=missing.pkl"], "missing.pkl"),
        (["--device=tpu"], "--device=tpu"),
        (["--host=nowhere.invalid"], "--host=nowhere.invalid is not an address"),
    ],
)
def test_errors_of_the_command_line(options, message):
    pytest.importorskip("gradio")
    result = click.testing.CliRunner().invoke(explore.cmdline, options)
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_without_gradio_it_says_what_is_missing(monkeypatch, capsys):
    import dnnlib.cli

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        dnnlib.cli.main(explore.cmdline, [])
    assert end.value.code == 2
    assert "pip install -e '.[explore]'" in capsys.readouterr().err
