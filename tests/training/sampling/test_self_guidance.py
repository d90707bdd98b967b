"""One network with and without labels: what it makes, and how it guides itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import calculate_metrics
import dnnlib.cli
import generate_images as script
import reconstruct_phema
import sweep
from dnnlib.errors import ConfigError
from edm2.diffusers import EDM2Pipeline
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.small_network import small_network
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import tiny_config, train
from tests.helpers.two_brightnesses import MEANS, SPREAD, write_flat_pictures
from torch_utils.distributed import World
from training.fast.inference_network import InferencePrecond
from training.fast.prepare import PrepareNetwork
from training.images.png_files import read_png_head
from training.metrics import available as plan
from training.run.run_folder import RunFolder
from training.sampling.denoisers import WithoutLabels, conditioned, merged_call
from training.sampling.generation import generate_images
from training.sampling.guidance import Guidance
from training.sampling.sampler import edm_sampler
from training.sharing.write_folder import save_folder
from training.snapshot import load_snapshot
from training.training_loop import TrainingRun

PUBLISHED = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
CPU = torch.device("cpu")


class Zeroed(torch.nn.Module):
    """The plainest guide: another copy of a file's network, given a full set of zeros."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = load_snapshot(path).net
        self.img_resolution, self.img_channels = self.net.img_resolution, self.net.img_channels
        self.label_dim = self.net.label_dim

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.net(x, sigma, torch.zeros(len(x), self.label_dim))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.zip, and a run on it that is balanced and leaves out labels."""
    path = tmp_path_factory.mktemp("run")
    options: dict[str, Any] = {"batch": 32, "duration": 32 * 130, "channel_mult": (1,), "lr": 0.03, "decay": 100}
    config = tiny_config(
        write_flat_pictures(path / "data.zip"), balance=True, label_dropout=0.25, P_std=1.2, ema_stds=(0.1,),
        snapshot=32 * 65, snapshot_format="safetensors", **options,
    )  # fmt: skip
    train(TrainingRun(config, RunFolder(path / "run"), world=World()))
    return path


@pytest.fixture(scope="module")
def net(folder: Path) -> Path:
    return max((folder / "run").glob("network-snapshot-*.safetensors"))


def pixels(*networks: Any, **options: Any) -> torch.Tensor:
    """The images of all batches, uint8 [N, C, H, W]."""
    images = [batch.images for batch in generate_images(*networks, **options)]
    return torch.cat([part for part in images if part is not None])


def levels(net: Any, num: int = 96, **options: Any) -> torch.Tensor:
    """The mean grey level of each image of the seeds 0, 1, ..."""
    options = {"num_steps": 6, "prepare": PrepareNetwork(), **options}
    images = pixels(net, seeds=range(num), max_batch_size=num, device="cpu", **options)
    return images.float().mean(dim=(1, 2, 3))


def note_of(path: Path) -> dict[str, Any]:
    """What an image's file says that it was made from."""
    head = read_png_head(path)
    assert head is not None
    return dict(json.loads(head.texts["generate_images"]))


def test_the_labels_decide_zeros_give_the_mixture_and_guidance_sharpens(net: Path):
    middle = sum(MEANS) / 2
    plain = [levels(str(net), class_idx=label) for label in (0, 1)]
    for label in (0, 1):
        assert plain[label].mean().item() == pytest.approx(MEANS[label], abs=0.5 * SPREAD)
    # Of nine dark pictures to a bright one, seen equally often: without labels, both halves, and wider than either.
    mixed = levels(str(net), class_idx="none")
    assert mixed.mean().item() == pytest.approx(middle, abs=0.5 * SPREAD)
    assert mixed.std() > 1.15 * max(part.std() for part in plain)
    assert 0.3 < (mixed > middle).float().mean() < 0.7
    # Away from the mixture: further apart than the classes are, narrower, and no longer mistaken for each other.
    guided = [levels(str(net), class_idx=label, gnet="self", guidance=2) for label in (0, 1)]
    assert guided[1].mean() - guided[0].mean() > 1.2 * (plain[1].mean() - plain[0].mean())
    for label in (0, 1):
        assert guided[label].std() < plain[label].std()
        wrong = [((x[label] > middle) == (label == 0)).float().mean() for x in (plain, guided)]
        assert wrong[1] <= wrong[0] and wrong[1] < 0.08


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interval": (0.3, 5)},
        {"solver": "dpmpp2m"},
        {"max_batch_size": 1},  # both evaluations in one batch
        {"S_churn": 5, "class_idx": 1},
        {"prepare": None},
        {"prepare": PrepareNetwork(precision="bf16"), "max_batch_size": 4},
    ],
)
def test_it_is_bitwise_the_same_file_as_a_guide_that_is_given_zeros(net: Path, options: dict):
    options = {
        "seeds": range(4), "max_batch_size": 3, "num_steps": 4, "device": "cpu", "guidance": 1.7, "S_churn": 0,
        "prepare": PrepareNetwork(), **options,
    }  # fmt: skip
    zeroed: Any = Zeroed(net)
    if options["prepare"] is not None:
        prepared = options["prepare"](zeroed.net, CPU)
        zeroed.net = prepared
    expected = pixels(str(net), zeroed, **options)
    for guide in ("self", ["self"]):
        assert torch.equal(pixels(str(net), guide, **options), expected)
    assert not torch.equal(pixels(str(net), **{**options, "guidance": 1}), expected)


def test_latents_are_bitwise_the_same_too_and_with_other_guides_beside_it():
    main = InferencePrecond(small_network().eval())
    other = InferencePrecond(small_network(label_dim=0).eval())
    noise, labels = torch.randn(3, 3, 16, 16), torch.eye(5)[:3]

    def zeroed(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return main(x, sigma, torch.zeros_like(labels))

    for guides in ([WithoutLabels(main)], [WithoutLabels(main), other]):
        plain = [zeroed, *guides[1:]]
        actual = edm_sampler(main, noise, labels, guides, num_steps=3, guidance=1.8)
        assert torch.equal(actual, edm_sampler(main, noise, labels, plain, num_steps=3, guidance=1.8))


def test_a_merged_call_on_twice_the_images_is_bitwise_two_evaluations():
    net = InferencePrecond(small_network().eval())
    x, labels = torch.randn(3, 3, 16, 16), torch.eye(5)[:3]
    guide, main = merged_call(net, labels)(x, 1.5, 1.5)
    assert torch.equal(main, net(x, 1.5, labels)) and torch.equal(guide, net(x, 1.5, torch.zeros(3, 5)))


class Counting:
    """A network that notes the batches it is given, on a device of any name."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        assert len(labels) == len(x)
        return x * labels.sum(dim=1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("device", "num", "guided"), [("cpu", 3, [3, 3]), ("cpu", 1, [2]), ("meta", 3, [6])])
def test_both_are_one_batch_but_for_batches_on_a_cpu_and_unguided_steps_need_one_evaluation(device, num, guided):
    net = Counting()
    guidance = Guidance(weight=2, num_guides=1, interval=(1, 3))
    denoise = guidance.denoiser(net, [WithoutLabels(net)], torch.ones(num, 2, device=device))
    x = torch.ones(num, 1, 2, 2, device=device)
    denoise(x, 2.0, 2.0)
    assert net.batches == guided
    net.batches.clear()
    denoise(x, 4.0, 4.0)
    assert net.batches == [num]


def test_the_weights_are_prepared_once(net: Path):
    made = []

    def prepare(network: Any, device: torch.device) -> Any:
        made.append(network)
        return PrepareNetwork()(network, device)

    images = generate_images(str(net), "self", seeds=[0], device="cpu", guidance=2, prepare=prepare)
    assert len(made) == 1 and isinstance(images.gnet, WithoutLabels) and images.gnet.net is images.net
    again = generate_images(images.net, images.gnet, images.encoder, seeds=[0], device="cpu", guidance=2, num_steps=2)
    assert again.gnet.net is images.net and len(list(again)) == 1


def run(command: Any, *args: Any) -> int:
    try:
        dnnlib.cli.main(command, [str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_guides_by_the_network_itself_and_notes_it(net: Path, tmp_path: Path, capsys):
    quick = ["--device=cpu", f"--net={net}", "--steps=3", "--seeds=0-2", "--class=1"]
    assert run(script.cmdline, *quick, "--gnet=self", "--guidance=2", f"--outdir={tmp_path / 'a'}") == 0
    (batch,) = generate_images(
        str(net), "self", seeds=range(3), class_idx=1, device="cpu", num_steps=3, guidance=2, prepare=PrepareNetwork()
    )
    with PIL.Image.open(tmp_path / "a" / "000002.png") as image:
        assert np.array_equal(np.asarray(image), batch.images[2, 0].numpy())
    note = note_of(tmp_path / "a" / "000002.png")
    assert note["gnet"] == [f"{note['net']} without labels"]
    args = [*quick, f"--outdir={tmp_path / 'a'}", "--skip-existing"]
    assert run(script.cmdline, *args, "--gnet=self", "--guidance=2") == 0
    assert "3 existed already" in capsys.readouterr().out
    assert run(script.cmdline, *args, f"--gnet={net}", "--guidance=2") == 2  # the same file, but with labels
    assert "made with gnet" in capsys.readouterr().err


def test_images_of_no_class_are_made_and_noted(net: Path, tmp_path: Path):
    args = ["--device=cpu", f"--net={net}", "--steps=3", "--seeds=0-2", f"--outdir={tmp_path}"]
    assert run(script.cmdline, *args, "--class=none") == 0
    (batch,) = generate_images(str(net), seeds=range(3), class_idx="none", device="cpu", num_steps=3)
    assert batch.labels.tolist() == [[0, 0]] * 3
    assert note_of(tmp_path / "000001.png")["class"] == "none"


@pytest.mark.parametrize("options", [["--gnet=self", "--guidance=2"], ["--class=none"]])
def test_a_network_that_never_saw_images_without_labels_is_refused_in_one_line(options, tmp_path, capsys):
    args = ["--device=cpu", f"--net={PUBLISHED}", *options, f"--outdir={tmp_path / 'out'}"]
    assert run(script.cmdline, *args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"{PUBLISHED} does not say that it was trained with --label-dropout" in error
    assert options[0] in error or options[0].partition("=")[0] in error


def test_a_network_without_labels_is_refused_and_one_in_memory_is_the_callers(net: Path):
    unconditional = small_network(label_dim=0).eval()
    for options in ({"gnet": "self", "guidance": 2}, {"class_idx": "none"}):
        with pytest.raises(ConfigError, match="the network is unconditional"):
            generate_images(unconditional, seeds=[0], device="cpu", **options)
    loaded = load_snapshot(PUBLISHED).net
    assert len(list(generate_images(loaded, "self", seeds=[0], device="cpu", num_steps=1, guidance=2))) == 1


@pytest.fixture
def measure(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of metrics against the data set, by a small stand-in for the detector."""
    monkeypatch.setattr(plan, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    ref = tmp_path / "ref.pkl"
    args = ["ref", f"--data={folder / 'data.zip'}", f"--dest={ref}", "--metrics=fid", "--workers=0", "--device=cpu"]
    assert run(calculate_metrics.cmdline, *args) == 0
    return ["--steps=2", "--num=16", "--metrics=fid", f"--ref={ref}", "--device=cpu"]


def test_metrics_measure_the_network_guided_by_itself(net: Path, measure: list[str], tmp_path: Path):
    results = {}
    for name, options in {"self": ["--gnet=self", "--guidance=2"], "plain": []}.items():
        args = ["gen", f"--net={net}", *measure, "--repeat=2"]
        assert run(calculate_metrics.cmdline, *args, f"--json={tmp_path / name}.json", *options) == 0
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["self"]["gnets"] == [{"path": "self", "sha256": None}]
    assert results["self"]["results"]["fid"]["values"] != results["plain"]["results"]["fid"]["values"]


def test_a_sweep_guides_every_reconstructed_network_by_itself(folder, measure, tmp_path, capsys):
    args = ["--outstd=0.1", "--guidance=1,2", "--gnet=self", *measure]
    dest = tmp_path / "sweep.json"
    assert run(sweep.cmdline, f"--indir={folder / 'run'}", *args, f"--json={dest}") == 0
    record = json.loads(dest.read_text())
    assert record["settings"]["gnets"] == ["self"]
    assert len(record["points"]) == 2 and record["points"][0]["values"] != record["points"][1]["values"]
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in sorted((GOLDEN_DIR / "snapshots" / "run").iterdir()):
        shutil.copy(path, plain)
    capsys.readouterr()
    assert run(sweep.cmdline, f"--indir={plain}", *args, f"--json={tmp_path / 'no.json'}") == 2
    assert "--gnet=self leaves out labels, but the network is unconditional" in capsys.readouterr().err
    assert not (tmp_path / "no.json").exists()


def test_the_diffusers_pipeline_guides_by_its_own_network(net: Path, tmp_path: Path):
    save_folder(load_snapshot(net), tmp_path / "folder")
    pipeline = EDM2Pipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    (batch,) = generate_images(
        str(net), "self", seeds=range(3), device="cpu", num_steps=3, guidance=2, prepare=PrepareNetwork()
    )
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 2, "guide": "self"}
    made = pipeline(generator=[torch.Generator().manual_seed(i) for i in range(3)], **options).images
    assert torch.equal((made * 255).round().to(torch.uint8), batch.images)
    published = EDM2Pipeline.from_network(PUBLISHED)
    published.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigError, match="does not say that it was trained with --label-dropout"):
        published(class_labels=0, **options)


def test_reconstructed_networks_keep_what_they_know(folder: Path, tmp_path: Path):
    args = [f"--indir={folder / 'run'}", "--outstd=0.15", f"--outdir={tmp_path}"]
    assert run(reconstruct_phema.cmdline, *args) == 0
    (path,) = tmp_path.iterdir()
    assert load_snapshot(path).info["label_dropout"] == 0.25
    assert len(generate_images(str(path), "self", seeds=[0], device="cpu", guidance=2)) == 1


def test_a_conditioned_network_guides_itself_by_the_same_images():
    net = InferencePrecond(small_network(cond_channels=2).eval())
    x, labels, seen = torch.randn(3, 3, 16, 16), torch.eye(5)[:3], torch.randn(3, 2, 16, 16)
    zeros = torch.zeros(3, 5)
    (bound,) = conditioned([net], seen)
    guide, main = merged_call(bound, labels)(x, 1.5, 1.5)
    assert torch.equal(main, net(x, 1.5, labels, cond_images=seen))
    assert torch.equal(guide, net(x, 1.5, zeros, cond_images=seen))
    assert not torch.equal(guide, net(x, 1.5, zeros, cond_images=seen.flip(0)))
    main_net, guide_net = conditioned([net, WithoutLabels(net)], seen)
    denoise = Guidance(weight=1.5, num_guides=1).denoiser(main_net, [guide_net], labels)
    torch.testing.assert_close(denoise(x, 1.5, 1.5), guide + 1.5 * (main - guide))
