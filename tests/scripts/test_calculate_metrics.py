"""The command line of calculate_metrics.py and the published functions: what they compute, and how they refuse."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

import calculate_metrics as script
import dnnlib.cli
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.ranks import run_ranks
from tests.helpers.stand_in_detector import NUM_FEATURES, StandInDetector, images
from tests.helpers.tiny import write_dataset
from torch_utils.distributed import World
from training.dataset.image_set import ImageSet, ImageSetBatch, choose_images
from training.metrics import available as plan
from training.metrics import evaluate
from training.metrics.detectors import DETECTORS, EfficientNetLite0Detector
from training.metrics.detectors.common import DetectorOutput
from training.metrics.distances import frechet_distance
from training.metrics.evaluate import StatsPass, evaluate_images
from training.metrics.reference import load_stats
from training.presets import REPOSITORY_DIR
from training.sampling import request as sampling
from training.sampling.generation import generate_images
from training.sampling.networks import DecoderOptions
from training.sampling.request import resolve_sampling

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"  # 16x16 pixels
GUIDE = GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl"
HELD_OUT = REPOSITORY_DIR / "data" / "fashion-mnist-32-heldout.zip"
TRAINING = REPOSITORY_DIR / "data" / "fashion-mnist-32.zip"


QUICK_REF = ["--features=12", "--workers=0", "--device=cpu"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors of every name without weights."""
    for module in (plan, evaluate):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    for cls in DETECTORS.values():
        monkeypatch.setattr(cls, "has_weights", lambda: True)


def run(*args: Any) -> str:
    """Standard output of the command, which must end well."""
    result = click.testing.CliRunner().invoke(script.cmdline, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line on standard error of the command, which must refuse."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dnnlib.cli.main(script.cmdline, [str(arg) for arg in args])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert stopped.value.code == 2 and len(error) == 1
    return error[0]


def features_of(pictures: ImageSet, choice: np.ndarray | None = None) -> np.ndarray:
    choice = np.arange(len(pictures)) if choice is None else choice
    return StandInDetector()(torch.stack([pictures[int(i)] for i in choice])).double().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data.zip", num=60, size=16)


@pytest.fixture
def reference(stand_in: None, tmp_path: Path, data: Path) -> Path:
    """Statistics of the data set, with features."""
    dest = tmp_path / "refs" / "ref.safetensors"
    run("ref", f"--data={data}", f"--dest={dest}", "--metrics=fid,sfid,kid_inception", "--features=40", "--workers=0")
    return dest


def test_ref_has_the_statistics_of_all_images(reference: Path, data: Path):
    stats, features = load_stats(reference), features_of(ImageSet(data))
    assert stats["num_images"] == 60 and set(stats) == {"num_images", "fid", "sfid", "features", "made_with"}
    np.testing.assert_allclose(stats["fid"]["mu"], features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["fid"]["sigma"], np.cov(features, rowvar=False), rtol=1e-9)
    kept = stats["features"]["inception"]
    assert kept.shape == (40, NUM_FEATURES)
    every = {row.tobytes() for row in features.astype(np.float32)}
    assert len({row.tobytes() for row in kept} & every) == 40


def test_calc_measures_disjoint_random_subsets_and_tells_what_repeats_it(reference: Path, data: Path, tmp_path: Path):
    out = tmp_path / "new" / "result.json"
    options = ["--num=20", "--repeat=3", "--seed=5", "--metrics=all", "--workers=0", "--batch=7", "--device=cpu"]
    printed = run("calc", f"--images={data}", f"--ref={reference}", f"--json={out}", *options)
    record, pictures = json.loads(out.read_text()), ImageSet(data)
    parts = [features_of(pictures, choice) for choice in choose_images(pictures, 20, seed=5, repeat=3)]
    expected = [distance(part, features_of(pictures)) for part in parts]
    fid = record["results"]["fid"]
    assert fid["values"] == pytest.approx(expected, rel=1e-8)
    assert fid["minimum"] == pytest.approx(min(expected)) and fid["mean"] == pytest.approx(np.mean(expected))
    assert fid["std"] == pytest.approx(np.std(expected, ddof=1))
    assert set(record["results"]) >= {"fid", "sfid", "kid_inception", "precision3_inception", "coverage5_inception"}
    assert "fd_dinov2" in record["skipped"] and "Skipped fd_dinov2" in printed
    line = next(line for line in printed.splitlines() if line.startswith("fid "))
    assert [f"{value:.4f}" for value in expected] == line.split()[2:5] and f"{min(expected):.4f}" in line.split()[5]
    assert record["images"] == {"path": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    assert record["reference"]["sha256"] == hashlib.sha256(reference.read_bytes()).hexdigest()
    assert (record["num_images"], record["seed"], record["processes"], record["device"]) == (20, 5, 1, "cpu")
    assert record["fewer_images_than_wanted"] is False
    assert record["versions"]["torch"] == torch.__version__ and record["detectors"]["inception"]["sha256"]


def test_fewer_images_are_an_error_or_marked(
    reference: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["calc", f"--images={data}", f"--ref={reference}", "--metrics=fid", "--workers=0"]
    assert "holds 60 images and 50000 are asked for" in fails(capsys, *options)
    printed = run(*options, "--allow-fewer", f"--json={tmp_path / 'r.json'}")
    assert " 60* " in printed and "* fewer than the 50000" in printed
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["num_images"], record["num_images_wanted"], record["fewer_images_than_wanted"]) == (60, 50000, True)


def test_skip_existing_knows_results_of_the_same_request(
    reference: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "r.json"
    options = ["calc", f"--images={data}", f"--ref={reference}", "--metrics=fid", "--workers=0", "--skip-existing"]
    options += ["--num=20", "--repeat=2"]
    assert "--json=result.json" in fails(capsys, *options)
    options += [f"--json={out}"]
    assert "exists already" not in run(*options)
    fid, content = json.loads(out.read_text())["results"]["fid"]["mean"], out.read_bytes()
    monkeypatch.setattr(script, "StatsPass", None)
    printed = run(*options)
    assert f"{out} exists already" in printed and f"fid: {fid:.4f}" in printed
    for change, message in (
        ("--seed=1", "other seed"),
        ("--num=10", "other num_images"),
        ("--metrics=sfid", "not sfid"),
    ):
        assert message in fails(capsys, *options, change)
    assert out.read_bytes() == content
    out.write_text("[]")
    assert "is not a record of results" in fails(capsys, *options)


def test_skip_existing_knows_statistics_of_as_many_images(
    reference: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["ref", f"--data={data}", f"--dest={reference}", "--metrics=fid,sfid,kid_inception", "--workers=0"]
    options += ["--skip-existing", "--features=40"]
    stamp = reference.stat().st_mtime_ns
    assert f"{reference} exists already" in run(*options)
    assert "holds other statistics (60 images, fid, sfid, features of 40)" in fails(capsys, *options, "--features=30")
    write_dataset(data, num=30, size=16)
    assert "than those of 30 images" in fails(capsys, *options)
    assert reference.stat().st_mtime_ns == stamp


def test_gen_measures_the_images_of_successive_seeds(reference: Path, tmp_path: Path):
    options = ["--num=6", "--seed=3", "--repeat=2", "--steps=2", "--metrics=fid,is", "--batch=4", "--device=cpu"]
    guided = [f"--net={NET}", f"--gnet={GUIDE}", "--guidance=1.5"]
    out = tmp_path / "r.json"
    run("gen", *guided, f"--ref={reference}", *options, f"--json={out}")
    record = json.loads(out.read_text())
    stats = load_stats(reference)
    for index in range(2):
        batches = generate_images(
            str(NET), str(GUIDE), seeds=range(3 + 6 * index, 9 + 6 * index), guidance=1.5, num_steps=2, device="cpu"
        )
        detectors = {"inception": StandInDetector()}
        alone = evaluate_images(batches, metrics=["fid", "is"], detectors=detectors, reference=stats, world=World())
        # An image may differ by one grey level on a few pixels between batch sizes.
        assert record["results"]["fid"]["values"][index] == pytest.approx(alone["fid"].value, rel=1e-2)
        assert record["results"]["is"]["values"][index] == pytest.approx(alone["is"].value, rel=1e-2)
    assert record["net"]["sha256"] == hashlib.sha256(NET.read_bytes()).hexdigest()
    assert record["gnets"][0]["sha256"] == hashlib.sha256(GUIDE.read_bytes()).hexdigest()
    assert record["sampler"]["num_steps"] == 2 and record["sampler"]["guidance"] == 1.5
    assert record["seeds"] == ["3-8", "9-14"] and record["num_images"] == 6


def test_gen_decodes_as_asked_and_notes_it(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["decoder"])
        return generate_images(*args, **kwargs)

    monkeypatch.setattr(sampling, "generate_images", spy)
    out = tmp_path / "r.json"
    options = [f"--net={NET}", f"--ref={reference}", "--metrics=fid", "--num=2", "--steps=1", "--device=cpu"]
    run("gen", *options, "--decoder-precision=bf16", "--decoder-tile=64", f"--json={out}")
    assert asked == [DecoderOptions(precision="bf16", tile=64)]
    record = json.loads(out.read_text())
    assert (record["decoder_precision"], record["decoder_tile"]) == ("bf16", 64)
    run("gen", *options, f"--json={tmp_path / 'plain.json'}")
    assert not any("decoder" in key for key in json.loads((tmp_path / "plain.json").read_text()))


def test_gen_takes_presets_and_the_options_of_generate_images():
    import generate_images as generate

    def names(command: click.Command) -> set[str]:
        return {name for param in command.params for name in param.opts}

    own = {"--outdir", "--subdirs", "--grid", "--seeds", "--class", "--list-presets", "--trust-code"}
    own |= {"--png-compression", "--decoder-batch"}
    assert names(generate.cmdline) - names(script.gen) <= own
    published = {"calc": "images ref metrics num seed batch workers", "gen": "net ref metrics num seed batch"}
    published["ref"] = "data dest metrics batch workers"
    for command, options in published.items():
        assert {f"--{name}" for name in options.split()} <= names(script.cmdline.commands[command])
        if command != "ref":  # torchrun may take --num for an option of its own
            assert "--num-images" in names(script.cmdline.commands[command])
    defaults = {param.name: param.default for param in script.calc.params}
    assert (defaults["num"], defaults["seed"], defaults["batch"], defaults["workers"]) == (50000, 0, 64, 2)
    assert defaults["metrics"] == "fid,fd_dinov2"
    assert next(param.default for param in script.gen.params if param.name == "batch") == 32


def test_gen_refuses_latents(reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    latents = torch.zeros([2, 8, 4, 4], dtype=torch.uint8)
    monkeypatch.setattr(sampling, "generate_images", lambda *_, **__: _Generated([latents]))
    monkeypatch.setattr(plan, "make_detector", _real_check)
    error = fails(capsys, "gen", f"--net={NET}", f"--ref={reference}", "--metrics=fid", "--num=2", "--device=cpu")
    assert "these have 8: latents must be decoded" in error


class _Generated(list[Any]):
    net = guides = encoder = conditioning = None


def _real_check(name: str, device: Any, weights: Any = None) -> StandInDetector:
    from training.metrics.detectors.common import to_rgb

    class Checking(StandInDetector):
        def outputs(self, images: torch.Tensor) -> DetectorOutput:
            return super().outputs(to_rgb(images, name))

    return Checking(name)


def write_pngs(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def values_in(path: Path) -> dict[str, float]:
    return {name: entry["values"][0] for name, entry in json.loads(path.read_text())["results"].items()}


@pytest.mark.parametrize("metrics", ["fid", "fid,sfid,kid_inception,recall3_inception"])
def test_a_reference_may_be_images_in_a_folder_a_zip_file_or_an_array(stand_in: None, tmp_path: Path, metrics: str):
    generated, real = (np.random.default_rng(i).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8) for i in range(2))
    ours, theirs = write_pngs(tmp_path / "ours", generated), write_pngs(tmp_path / "theirs", real)
    np.savez(tmp_path / "theirs.npz", real)
    np.savez(tmp_path / "ours.npz", generated)
    run("ref", f"--data={theirs}", f"--dest={tmp_path / 'ref.safetensors'}", f"--metrics={metrics}", *QUICK_REF)
    results = []
    for source, ref in [(ours, "ref.safetensors"), (ours, "theirs"), (tmp_path / "ours.npz", "theirs.npz")]:
        result = tmp_path / f"{ref}.json"
        options = [f"--images={source}", f"--ref={tmp_path / ref}", f"--metrics={metrics}", f"--json={result}"]
        text = run("calc", *options, "--num=12", "--workers=0", "--device=cpu")
        assert ("Measuring the 12 images of" in text) == (ref != "ref.safetensors")
        results.append(values_in(result))
    assert results[0] == pytest.approx(results[1], rel=1e-6) and results[0] == pytest.approx(results[2], rel=1e-6)


def test_an_adm_reference_batch_gives_its_moments_and_features_of_its_images(stand_in: None, tmp_path: Path):
    real = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    moments = {"mu": np.ones(NUM_FEATURES), "sigma": np.eye(NUM_FEATURES)}
    np.savez(tmp_path / "batch.npz", real, **moments)
    result = tmp_path / "result.json"
    options = ["--metrics=fid,kid_inception", "--num=12", "--workers=0", "--device=cpu", f"--json={result}"]
    run("calc", f"--images={tmp_path / 'batch.npz'}", f"--ref={tmp_path / 'batch.npz'}", *options)
    features = StandInDetector()(torch.from_numpy(real).permute(0, 3, 1, 2)).double().numpy()
    expected = frechet_distance(features.mean(0), np.cov(features, rowvar=False), moments["mu"], moments["sigma"])
    assert values_in(result)["fid"] == pytest.approx(expected) and values_in(result)["kid_inception"] < 0.1


def test_images_of_several_sizes_and_kinds_are_measured(stand_in: None, tmp_path: Path):
    folder = write_pngs(tmp_path / "images", np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    for i, size in enumerate([(5, 9, 3), (6, 6), (7, 4, 4), (9, 3, 2)]):
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)).save(folder / f"z{i}.png")
    for workers in (0, 1):
        run("ref", f"--data={folder}", f"--dest={tmp_path / f'{workers}.pkl'}", "--metrics=fid", f"--workers={workers}")
    features = torch.cat([StandInDetector()(image[None]) for image in (ImageSet(folder)[i] for i in range(8))])
    for workers in (0, 1):
        found = load_stats(tmp_path / f"{workers}.pkl")
        assert found["num_images"] == 8 and np.allclose(found["fid"]["mu"], features.mean(0).numpy(), rtol=1e-6)


def test_metrics_are_listed():
    lines = run("--list-metrics").splitlines()
    assert lines[0] == "fid                        Fréchet distance of Inception-v3 features"
    assert len(lines) < 12 and any(line.startswith("recall{3,5}_{detector} ") for line in lines)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--metrics=fidd"], "unknown metric 'fidd'"),
        (["--metrics=fd_dinov2"], "none of the metrics can be computed: fd_dinov2: the reference lacks it"),
        (["--ref=missing.pkl"], "'missing.pkl' does not exist"),
        (["--ref=damaged.pkl"], "damaged.pkl"),
        (["--images=nowhere"], "nowhere does not exist"),
        (["--images=latents.zip"], "holds latents"),
        (["--num=61"], "holds 60 images and 61 are asked for"),
        (["--num=40", "--repeat=2"], "holds 60 images and 2 times 40 are asked for"),
        (["--num=1"], "two each are the least"),
        (["--num=many"], "'many' is not an image count"),
        (["--repeat=0"], "--repeat"),
        (["--batch=0"], "--batch"),
        (["--json=damaged.pkl/x.json"], "cannot be made"),
        (["--json=refs"], "refs cannot be written: it is a folder"),
        (["--device=abacus"], "--device=abacus"),
        (["--inception-weights=none.pth", "--metrics=fid"], "none.pth"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    reference: Path,
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "latents.zip", num=2, channels=8)
    (tmp_path / "damaged.pkl").write_bytes(b"PK\3\4nonsense")
    if args[0].startswith("--inception-weights"):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = ["--images=data.zip", f"--ref={reference}", "--num=20", "--workers=0", "--json=out/r.json"]
    assert message in fails(capsys, "calc", *options, *args)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dest=a.npz"], "none of the suffixes"),
        (
            ["--dest=a.pkl", "--features=5"],
            "a.pkl cannot hold features; --features needs a --dest",
        ),
        (["--metrics=is"], "none of the metrics can be computed: is: it needs no reference"),
        (["--metrics=kid_inception"], "kid_inception: it needs --features=N"),
        (["--data=nowhere"], "nowhere does not exist"),
        (["--dest=data.zip/x.pkl"], "cannot be made"),
    ],
)
def test_bad_references_are_refused(
    stand_in: None,
    data: Path,
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "ref", "--data=data.zip", "--dest=out/a.pkl", "--workers=0", *args)
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]


def test_the_published_functions(stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = StandInDetector()(images(30)).double().numpy()
    steps = list(script.calculate_stats_for_iterable(list(images(30).split(8)), dest_path=tmp_path / "a.pkl"))
    assert len(steps) == 4 and set(steps[-1].stats) == {"num_images", "fid", "fd_dinov2"}
    np.testing.assert_allclose(script.load_stats(tmp_path / "a.pkl")["fid"]["mu"], expected.mean(0), rtol=1e-12)
    found = script.calculate_metrics_from_stats(steps[-1].stats, tmp_path / "a.pkl")
    assert found == {"fid": pytest.approx(0, abs=1e-5), "fd_dinov2": pytest.approx(0, abs=1e-5)}
    assert capsys.readouterr().out.count("\n") == 2
    partial = {"fid": steps[-1].stats["fid"]}
    assert set(script.calculate_metrics_from_stats(steps[-1].stats, partial, verbose=False)) == {"fid"}
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="none of the metrics can be computed"):
        script.calculate_metrics_from_stats(steps[-1].stats, partial, ["fd_dinov2"])
    parameters = list(inspect.signature(script.calculate_metrics_from_stats).parameters)
    assert parameters == ["stats", "ref", "metrics", "verbose"]


def test_statistics_of_files(stand_in: None, data: Path):
    work = script.calculate_stats_for_files(data, num_images=25, seed=2, metrics=["fid"], num_workers=0, device="cpu")
    stats = [step.stats for step in work][-1]
    pictures = ImageSet(data)
    features = features_of(pictures, choose_images(pictures, 25, seed=2)[0])
    assert stats["num_images"] == 25
    np.testing.assert_allclose(stats["fid"]["sigma"], np.cov(features, rowvar=False), rtol=1e-9)
    with pytest.raises(ConfigError, match="holds 60 images and 61"):
        script.calculate_stats_for_files(data, num_images=61)


@pytest.mark.slow
def test_real_features_agree_over_processes_and_batch_sizes(tmp_path: Path):
    folder = tmp_path / "some"
    folder.mkdir()
    pictures = ImageSet(HELD_OUT)
    for i in range(0, 400, 45):
        PIL.Image.fromarray(pictures[i][0].numpy()).save(folder / f"{i}.png")
    common = [
        "calculate_metrics.py",
        "ref",
        f"--data={folder}",
        "--metrics=fd_efflite0",
        "--features=9",
        "--device=cpu",
    ]
    run_ranks(*common, f"--dest={tmp_path / 'one.safetensors'}", "--batch=9", "--workers=0", num=1)
    run_ranks(*common, f"--dest={tmp_path / 'two.safetensors'}", "--batch=2", "--workers=1")
    one, two = load_stats(tmp_path / "one.safetensors"), load_stats(tmp_path / "two.safetensors")
    assert np.array_equal(one["features"]["efflite0"], two["features"]["efflite0"])
    for key in ("mu", "sigma"):
        largest = np.abs(one["fd_efflite0"][key]).max()
        np.testing.assert_allclose(two["fd_efflite0"][key], one["fd_efflite0"][key], rtol=0, atol=1e-10 * largest)


@pytest.mark.slow
def test_held_out_images_score_far_better_than_samples_and_samples_than_noise(tmp_path: Path):
    num = 40
    real, detectors = ImageSet(TRAINING), {"efflite0": EfficientNetLite0Detector().to("cpu")}
    names = ["fd_efflite0", "kid_efflite0"]
    choice = choose_images(real, 150, seed=0)[0]

    def batches(pictures: ImageSet, choice: np.ndarray) -> list[torch.Tensor]:
        return [torch.stack([pictures[int(i)] for i in choice])]

    everything = np.arange(len(choice))
    work = StatsPass(
        [ImageSetBatch(images=batches(real, choice)[0], indices=everything)],
        metrics=names[:1],
        detectors=detectors,
        world=World(),
        keep_features=everything,
    )
    reference = [step.stats for step in work][-1]

    def score(sets: Any) -> dict[str, float]:
        found = evaluate_images(sets, metrics=names, detectors=detectors, reference=reference, world=World())
        return {name: score.value for name, score in found.items()}

    held_out = ImageSet(HELD_OUT)
    request = resolve_sampling(preset="demo", num_steps=10, solver="dpmpp2m")
    networks: dict[str, Any] = {"net": request.net, "gnets": request.gnets}
    samples = request.generate(**networks, seeds=range(num), max_batch_size=50, device="cpu")
    scores = {
        "held out": score(batches(held_out, choose_images(held_out, num, seed=0)[0])),
        "samples": score(samples),
        "noise": score([images(num, channels=1, size=32)]),
    }
    assert scores["held out"]["fd_efflite0"] < 0.95 * scores["samples"]["fd_efflite0"]
    assert scores["samples"]["fd_efflite0"] < 0.5 * scores["noise"]["fd_efflite0"]
    # Without bias, and so below zero by chance.
    assert scores["held out"]["kid_efflite0"] < 0.2 * scores["samples"]["kid_efflite0"]
    assert scores["samples"]["kid_efflite0"] < 0.1 * scores["noise"]["kid_efflite0"]
