"""The diffusers pipeline: the same seed gives the same image as generate_images.py, whatever the way it was loaded."""

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dnnlib.errors import ConfigError
from edm2.diffusers import EDM2HeunScheduler, EDM2Pipeline, EDM2UNet
from tests.helpers.fake_hub import FakeHub, serve_hub
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.small_network import small_network
from training.encoders import StabilityVAEEncoder
from training.fast.inference_network import InferencePrecond
from training.fast.prepare import PrepareNetwork
from training.sampling.generation import generate_images
from training.sampling.schedule import HeunOptions
from training.sharing.write_folder import save_folder
from training.snapshot import Snapshot, load_snapshot

SNAPSHOTS = GOLDEN_DIR / "snapshots"
NET, GUIDE = SNAPSHOTS / "rgb-cond.pkl", SNAPSHOTS / "rgb-cond-guide.pkl"
SEEDS = [3, 1 << 20, 5]
STEPS = 4


def generators(seeds: list[int] = SEEDS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def reference(net: Any = NET, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What generate_images.py makes."""
    options = {"seeds": SEEDS, "num_steps": STEPS, "device": "cpu", "prepare": PrepareNetwork(), **options}
    (batch,) = generate_images(net, **options)
    assert batch.images is not None
    return batch.images, batch.labels


def sample(pipeline: EDM2Pipeline, **options: Any) -> torch.Tensor:
    """Images, uint8."""
    call = {"generator": generators(), "num_inference_steps": STEPS, "output_type": "pt", **options}
    images = pipeline(**call).images * 255
    assert torch.allclose(images, images.round(), atol=1e-3)
    return images.round().to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "net"
    save_folder(load_snapshot(NET), path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> EDM2Pipeline:
    loaded = EDM2Pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of latents with a VAE of its own that halves the sides."""
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    snapshot = load_snapshot(SNAPSHOTS / "latent-cond.pkl")
    encoder = StabilityVAEEncoder(str(folder / "vae"), pixel_min=-1)
    save_folder(replace(snapshot, encoder=encoder), folder / "model")
    return folder / "model"


def test_the_same_seeds_make_the_same_images(pipeline: EDM2Pipeline) -> None:
    images, labels = reference()
    assert torch.equal(sample(pipeline), images)
    result = pipeline(generator=generators(), num_inference_steps=1, output_type="latent")
    assert torch.equal(result.class_labels, labels.argmax(1))


def test_with_chosen_classes(pipeline: EDM2Pipeline) -> None:
    assert torch.equal(sample(pipeline, class_labels=2), reference(class_idx=2)[0])
    images, labels = reference(class_idx=[2, 0, 1])
    for given in ([2, 0, 1], torch.tensor([2, 0, 1]), labels):
        assert torch.equal(sample(pipeline, class_labels=given), images)


def test_a_printed_interval_means_the_levels_of_the_schedule(pipeline: EDM2Pipeline) -> None:
    high, low = (float(f"{level:.1f}") for level in HeunOptions(num_steps=STEPS).sigmas()[1:3])
    options = {"guide": str(GUIDE), "guidance_scale": 1.7}
    guided = sample(pipeline, guidance_interval=(low, high), **options)
    assert torch.equal(guided, reference(gnet=GUIDE, guidance=1.7, interval=(low, high))[0])
    assert torch.equal(guided, sample(pipeline, guidance_interval=(2 * low, 2 * high), **options))


@pytest.mark.parametrize("kind", ["path", "pipeline", "model", "network", "list"])
def test_with_a_guide_of_any_kind(pipeline: EDM2Pipeline, kind: str) -> None:
    interval = (0.1, 10.0)
    images, _ = reference(gnet=GUIDE, guidance=1.7, interval=interval)
    loaded = EDM2Pipeline.from_network(GUIDE)
    guide = {
        "path": str(GUIDE),
        "pipeline": loaded,
        "model": loaded.unet,
        "network": load_snapshot(GUIDE).net,
        "list": [loaded, GUIDE],
    }[kind]
    options = {"guide_shares": [1, 0]} if kind == "list" else {}
    guided = sample(pipeline, guide=guide, guidance_scale=1.7, guidance_interval=interval, **options)
    assert torch.equal(guided, images)


def test_a_guide_that_is_not_used_is_not_loaded(pipeline: EDM2Pipeline) -> None:
    assert torch.equal(sample(pipeline, guide="nowhere.pkl"), reference()[0])


def test_one_generator_for_one_image_is_one_for_each(pipeline: EDM2Pipeline) -> None:
    alone = sample(pipeline, generator=generators()[0])
    assert torch.equal(alone, reference(seeds=SEEDS[:1])[0])
    first, second = (sample(pipeline, generator=torch.Generator().manual_seed(7), batch_size=2) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.manual_seed(7)  # none given: PyTorch's own, of the same seed
    assert torch.equal(sample(pipeline, generator=None, batch_size=2), first)


def test_kinds_of_output_are_the_same_images(pipeline: EDM2Pipeline) -> None:
    images, _ = reference()
    rows = images.permute(0, 2, 3, 1).numpy()
    call = {"num_inference_steps": STEPS}
    assert all(
        np.array_equal(np.asarray(picture), row)
        for picture, row in zip(pipeline(generator=generators(), **call).images, rows, strict=True)
    )
    array = pipeline(generator=generators(), output_type="np", **call).images
    assert array.dtype == np.float32 and np.array_equal(np.round(array * 255).astype(np.uint8), rows)
    latents, classes = pipeline(generator=generators(), output_type="latent", return_dict=False, **call)
    assert latents.dtype == torch.float32 and latents.shape == images.shape and len(classes) == 3


def test_given_noise_and_a_callback(pipeline: EDM2Pipeline) -> None:
    (batch,) = generate_images(NET, seeds=SEEDS, class_idx=1, num_steps=STEPS, device="cpu", prepare=PrepareNetwork())
    seen = []

    def callback(pipe: EDM2Pipeline, index: int, sigma: torch.Tensor, state: dict[str, torch.Tensor]) -> dict:
        seen.append((index, float(sigma)))
        return {"latents": torch.zeros_like(state["latents"])} if index == 2 * STEPS - 2 else {}

    options = {"latents": batch.noise, "class_labels": 1}
    assert torch.equal(sample(pipeline, generator=None, **options), batch.images)
    assert bool((sample(pipeline, callback_on_step_end=callback, **options) == 128).all())
    assert [index for index, _ in seen] == list(range(2 * STEPS - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "gif"}, "'gif' is unknown"),
        ({"class_labels": 99}, "out of range"),
        ({"class_labels": [0, 1]}, "2 from class_labels, 3 from generator|3 from generator, 2 from class_labels"),
        ({"class_labels": torch.zeros(3, 2)}, r"\[3, 2\]"),
        ({"class_labels": "cat"}, "'cat' is not a class"),
        ({"class_labels": ["cat", 1, 2]}, "'cat' is not a class"),
        ({"class_labels": "all"}, "class_labels='all' names no classes"),
        ({"class_labels": [0, None, 1]}, "names no classes; give numbers below"),
        ({"output_type": "pill"}, "did you mean pil"),
        ({"guidance_scale": 2.0}, "guidance_scale=2 needs a guiding network; add guide="),
        ({"guidance_scale": float("nan"), "guide": NET}, "guidance_scale=nan must be"),
        ({"guidance_scale": 2.0, "guide": NET, "guidance_interval": (3, 1)}, "guidance_interval 3,1 must be"),
        ({"guidance_scale": 2.0, "guide": NET, "guide_shares": [0.5, 0.5]}, "2 guide_shares do not fit 1 guides"),
        ({"guidance_scale": 2.0, "guide": 5}, "guide=5 is not a network"),
        ({"guidance_scale": 2.0, "guide": "missing.pkl"}, "missing.pkl"),
        ({"guidance_scale": 2.0, "guide": SNAPSHOTS / "latent-cond.pkl"}, "the guide is for images of"),
        ({"num_inference_steps": 0}, "0 sampling steps"),
        ({"generator": None, "batch_size": 0}, "0 images"),
        ({"latents": torch.zeros(3, 1, 2, 2)}, "do not fit"),
    ],
)
def test_what_cannot_work_is_refused(pipeline: EDM2Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(**{"generator": generators(), "num_inference_steps": 2, **options})


def test_saved_and_loaded_it_is_the_same(pipeline: EDM2Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    again = EDM2Pipeline.from_pretrained(tmp_path / "again")
    assert again.unet.dtype == torch.float16  # as stored: float32 would round the gains differently
    first, second = pipeline.unet.state_dict(), again.unet.state_dict()
    assert list(first) == list(second) and all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(sample(again), reference()[0])
    # Our own reader takes what diffusers wrote, with all that the first file held.
    original, snapshot = load_snapshot(NET), load_snapshot(tmp_path / "again")
    assert_same_snapshot(original, snapshot)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["unet"] == ["edm2.diffusers", "EDM2UNet"] and index["vae"] == [None, None]


def assert_same_snapshot(first: Snapshot, second: Snapshot) -> None:
    a, b = first.net.state_dict(), second.net.state_dict()
    assert list(a) == list(b) and all(torch.equal(value, b[name]) for name, value in a.items())
    assert (first.nimg, first.ema_std, first.dataset_kwargs) == (second.nimg, second.ema_std, second.dataset_kwargs)
    assert type(first.encoder) is type(second.encoder)
    assert (first.loss_fn is None) == (second.loss_fn is None)


def test_another_type_can_be_had_and_is_noted(folder: Path, tmp_path: Path) -> None:
    unet = EDM2UNet.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    assert unet.dtype == torch.float32
    unet.save_pretrained(tmp_path / "unet32")
    assert EDM2UNet.from_pretrained(tmp_path / "unet32").dtype == torch.float32
    assert load_snapshot(tmp_path / "unet32").net.unet.out_gain.dtype == torch.float32  # the network alone, too


def test_names_of_parameters_are_those_of_network_files(pipeline: EDM2Pipeline) -> None:
    assert list(pipeline.unet.state_dict()) == list(load_snapshot(NET).net.state_dict())
    net = EDM2UNet.from_snapshot(load_snapshot(NET))
    assert next(net.parameters()) is next(net.denoiser.parameters())
    x, labels = torch.randn(2, 3, *net.img_resolution), torch.tensor([0, 1])
    (direct,) = net(x, 0.5, labels, return_dict=False)
    # Noise levels one by one go through a matrix product of another shape, whose sums are rounded otherwise.
    assert torch.allclose(direct, net(x, torch.tensor([0.5, 0.5]), labels).sample, atol=1e-5)
    assert torch.equal(direct, net.denoiser(x, 0.5, torch.eye(net.label_dim)[:2]))


def test_weights_in_pickles_are_not_read(folder: Path, tmp_path: Path) -> None:
    unet = EDM2UNet.from_pretrained(folder, subfolder="unet")
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    with pytest.raises(OSError, match=r"safetensors"):
        EDM2UNet.from_pretrained(tmp_path / "unet")


def test_latents_are_decoded_by_the_folders_own_vae(latent_folder: Path) -> None:
    images, _ = reference(latent_folder)
    assert images.shape[1] == 3
    pipeline = EDM2Pipeline.from_pretrained(latent_folder)
    assert images.shape[2] == 2 * pipeline.unet.img_resolution[0]
    assert torch.equal(sample(pipeline), images)
    halved = EDM2Pipeline.from_pretrained(latent_folder)
    halved.vae.to(torch.bfloat16)
    assert (sample(halved).int() - images.int()).abs().float().mean() < 3


def test_a_vae_that_is_only_named_is_loaded_when_it_is_needed(latent_folder: Path, tmp_path: Path) -> None:
    named = EDM2Pipeline.from_network(latent_folder)
    assert named.vae is None
    assert named(num_inference_steps=1, output_type="latent").images.shape[1] == named.unet.img_channels
    assert named.vae is None
    assert torch.equal(sample(named), reference(latent_folder)[0])
    named.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_the_schedulers_steps_are_those_of_the_sampler() -> None:
    scheduler = EDM2HeunScheduler(sigma_min=0.01, sigma_max=40, rho=5)
    scheduler.set_timesteps(3)
    first, second, third, _ = HeunOptions(num_steps=3, sigma_min=0.01, sigma_max=40, rho=5).sigmas()
    assert scheduler.evaluated == [first, second, second, third, third]
    assert len(scheduler) == 5 and scheduler.init_noise_sigma == 40
    x = torch.zeros(1, 1, 1, 1) + 40
    starts = []
    for timestep in scheduler.timesteps:
        starts.append(scheduler.step_sigma)
        x = scheduler.step(torch.zeros_like(x), timestep, scheduler.scale_model_input(x, timestep)).prev_sample
    assert starts == [first, first, second, second, third]
    assert x.abs().max() < 1e-5  # images that are all zero are reached exactly


def test_the_scheduler_adds_noise_and_begins_in_between(tmp_path: Path) -> None:
    scheduler = EDM2HeunScheduler(rho=3)
    scheduler.set_timesteps(4)
    clean, noise = torch.ones(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    level = scheduler.timesteps[4]
    noisy = scheduler.add_noise(clean, noise, torch.stack([level, level]))
    assert torch.equal(noisy, clean + noise * level)
    x = noisy
    for timestep in scheduler.timesteps[4:]:
        x = scheduler.step(clean, timestep, x, return_dict=False)[0]
    assert torch.allclose(x, clean, atol=1e-5)
    with pytest.raises(ValueError, match="no step begins"):
        EDM2HeunScheduler().step(clean, 0.123, noisy)
    with pytest.raises(ConfigError, match="sigma_max"):
        EDM2HeunScheduler(sigma_max=0)
    scheduler.save_pretrained(tmp_path)
    assert EDM2HeunScheduler.from_pretrained(tmp_path).config.rho == 3


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tmp_path / "cache", monkeypatch) as running:
        yield running


def test_a_pipeline_comes_from_the_hub(server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.add_folder("jo/model", folder)
    server.add("jo/model", {"README.md": b"another network"}, revision="main")
    server.add_folder("jo/model", folder, revision="v1")
    images, _ = reference(f"jo/model@{commit}")
    for name, options in (("jo/model", {"revision": commit}), ("jo/model@v1", {}), ("hf://jo/model@v1", {})):
        assert torch.equal(sample(EDM2Pipeline.from_pretrained(name, **options)), images)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(sample(EDM2Pipeline.from_pretrained("jo/model@v1")), images)
    for name in ("hf://jo/model@v1/unet/config.json", "jo/nothing"):
        with pytest.raises(ConfigError, match=r"is a file|HF_HUB_OFFLINE is set"):
            EDM2Pipeline.from_pretrained(name)


def test_with_accelerate_parts_are_placed_and_offloaded(latent_folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    images, _ = reference(latent_folder)
    plain, _ = reference(latent_folder, prepare=None)  # hooks move the network's own parameters

    def expected(unet: EDM2UNet) -> torch.Tensor:
        return plain if any(hasattr(part, "_hf_hook") for part in unet.modules()) else images

    assert torch.equal(sample(EDM2Pipeline.from_pretrained(latent_folder, low_cpu_mem_usage=True)), images)
    mapped = EDM2Pipeline.from_pretrained(latent_folder, device_map="cpu")
    assert torch.equal(sample(mapped), expected(mapped.unet))
    model = EDM2UNet.from_pretrained(latent_folder, subfolder="unet", device_map={"": "cpu"})
    assert torch.equal(sample(EDM2Pipeline(model, EDM2HeunScheduler(), mapped.vae)), expected(model))
    pipeline = EDM2Pipeline.from_network(latent_folder)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.unet, "_hf_hook") and hasattr(pipeline.vae, "_hf_hook")
    for _ in range(2):  # hooks are put back after the first call
        assert torch.equal(sample(pipeline), plain)
    # What enable_sequential_cpu_offload does to each part; that itself wants a device other than the CPU.
    apart = EDM2Pipeline.from_pretrained(latent_folder)
    for part in (apart.unet, apart.vae):
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=True)
        assert all(parameter.is_meta for parameter in part.parameters())
    assert torch.equal(sample(apart), plain)


def test_a_call_prepares_each_network_and_frees_it(pipeline: EDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def prepare(self: PrepareNetwork, net: Any, device: torch.device) -> InferencePrecond:
        made.append(weakref.ref(prepared := InferencePrecond(net)))
        return prepared

    monkeypatch.setattr(PrepareNetwork, "__call__", prepare)
    gc.collect()
    gc.disable()
    try:
        guided = sample(pipeline, guide=GUIDE, guidance_scale=1.7)
        assert [prepared() for prepared in made] == [None, None]
    finally:
        gc.enable()
    assert torch.equal(guided, reference(gnet=GUIDE, guidance=1.7)[0])


def test_a_network_with_hooks_is_called_itself() -> None:
    pipeline = EDM2Pipeline.from_network(NET)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.unet.register_forward_hook(lambda *args: calls.append(args))
    assert torch.equal(sample(pipeline), reference(prepare=None)[0])
    assert len(calls) == 2 * STEPS - 1


def test_without_diffusers_it_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith("edm2.diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "edm2\[vae\]"'):
        import edm2.diffusers  # noqa: F401


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA")])
def test_images_with_alpha_keep_it(tmp_path: Path, channels: int, mode: str):
    save_folder(replace(load_snapshot(NET), net=small_network(img_channels=channels).eval()), tmp_path / "net")
    pipeline = EDM2Pipeline.from_pretrained(tmp_path / "net")
    options: dict[str, Any] = {"generator": generators(), "num_inference_steps": 2}
    images = pipeline(**options).images
    assert {image.mode for image in images} == {mode}
    options["generator"] = generators()
    assert np.array_equal(np.stack(images), (pipeline(**options, output_type="np").images * 255).round())
