"""DINOv2: a second implementation, both ways to resize, and its weights from a folder, torch.hub's file or nowhere."""

import json

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_close
from training.metrics.detectors import DINOv2Detector, dinov2
from training.metrics.detectors.common import resize_antialiased
from training.metrics.detectors.dinov2 import to_transformers

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, LAYERS, PATCH, GRID = 128, 2, 3, 14, 37
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": GRID * PATCH,
    "patch_size": PATCH,
}


def hub_weights():
    """A tiny ViT/14 of random weights, under the names of torch.hub's file."""
    shapes = {
        "cls_token": [1, 1, WIDTH],
        "mask_token": [1, WIDTH],
        "pos_embed": [1, 1 + GRID**2, WIDTH],
        "patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [WIDTH],
        "norm.weight": [WIDTH],
        "norm.bias": [WIDTH],
    }
    for i in range(LAYERS):
        b = f"blocks.{i}."
        shapes |= {f"{b}{name}": [WIDTH] for name in ("ls1.gamma", "ls2.gamma")}
        shapes |= {f"{b}norm{n}.{kind}": [WIDTH] for n in (1, 2) for kind in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            shapes |= {f"{b}{name}.weight": [rows, columns], f"{b}{name}.bias": [rows]}
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: r * (r[0].numel() ** -0.5 if name.endswith("weight") else 1.0) for name, r in draws.items()}


def plain(w, x):
    """The network from torch.hub's tensors: prepared images [N, 3, 224, 224] to class tokens [N, WIDTH]."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    tokens = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches.flatten(2).mT], 1)
    matrix = cubic_matrix(GRID, 16, scale=16.1 / GRID)
    places = torch.einsum("ik,jl,klc->ijc", matrix, matrix, w["pos_embed"][0, 1:].reshape(GRID, GRID, WIDTH).double())
    x = tokens + torch.cat([w["pos_embed"][0, :1], places.reshape(-1, WIDTH).float()])
    for i in range(LAYERS):
        q, k, v = (
            part.reshape(*part.shape[:2], HEADS, -1).transpose(1, 2)
            for part in linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, -1)
        )
        attended = (q @ k.mT / (WIDTH / HEADS) ** 0.5).softmax(-1) @ v
        y = linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        x = x + y * w[f"blocks.{i}.ls1.gamma"]
        y = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        y = linear(f"blocks.{i}.mlp.fc2", y * (1 + torch.erf(y / 2**0.5)) / 2)
        x = x + y * w[f"blocks.{i}.ls2.gamma"]
    return norm("norm", x)[:, 0]


def cubic_matrix(size_in, size_out, scale):
    """Matrix of a bicubic interpolation without antialiasing (a = -0.75), the outputs 1 / scale inputs apart."""
    a = -0.75
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        source = (i + 0.5) / scale - 0.5
        for j in range(int(source // 1) - 1, int(source // 1) + 3):
            t = abs(source - j)
            weight = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(j, 0), size_in - 1)] += weight
    return matrix


def prepared(x):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.float() / 255).permute(0, 2, 3, 1) - mean).div(std).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def hub_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vitl14_pretrain.pth"
    torch.save(hub_weights(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same weights as Hugging Face has them."""
    path = tmp_path_factory.mktemp("dinov2-tiny")
    config = transformers.Dinov2Config(**CONFIG)
    _, tensors = to_transformers(hub_weights(), path)
    transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=tensors).save_pretrained(path)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    return path


@pytest.fixture(scope="module")
def detector(folder):
    return DINOv2Detector(weights=folder)


@pytest.fixture
def images():
    coarse = torch.rand([2, 3, 9, 7], generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, size=(300, 180), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_it_agrees_with_a_plain_implementation_of_torch_hubs_network(detector):
    images = torch.randint(0, 256, [2, 3, 224, 224], dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    features = detector(images)
    assert features.shape == (2, detector.num_features) and features.dtype == torch.float32
    assert_close(features, plain(hub_weights(), prepared(images)), 1e-5)


def test_torch_hubs_file_and_a_single_file_of_the_folder_work_as_well(hub_file, folder, detector, images):
    for weights in (hub_file, str(hub_file), folder / "model.safetensors"):
        assert torch.equal(DINOv2Detector(weights=weights)(images), detector(images))
    assert not detector.published and detector.weights_path == folder / "model.safetensors"


def test_the_published_configuration_is_the_large_one_of_patch_14():
    tensors = {name: value.to("meta") for name, value in hub_weights().items()}
    tensors |= {
        "patch_embed.proj.weight": torch.empty(1024, 3, 14, 14, device="meta"),
        "pos_embed": torch.empty(1, 1370, 1024, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(4096, 1024, device="meta"),
    }
    settings, _ = to_transformers(tensors, "x")
    assert settings == {
        "hidden_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 518,
    }


def test_both_ways_to_resize_agree_but_for_rounding_to_grey_levels(folder, detector, images):
    exact = DINOv2Detector(resize_mode="pil", weights=folder)
    slow, fast = dinov2._resize_pil(images), resize_antialiased(images, 224, "bicubic")
    assert (slow - fast.clamp(0, 255)).abs().max() < 1.25  # PIL rounds after each of its two passes
    assert (slow - fast).abs().mean() < 0.5
    assert_close(exact(images), detector(images), 0.05)
    assert not torch.equal(exact(images), detector(images))


def test_the_slow_resize_is_pils(folder, images):
    picture = PIL.Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    assert np.array_equal(dinov2._resize_pil(images)[1].permute(1, 2, 0).numpy(), np.asarray(picture))


def test_an_image_of_the_networks_size_is_left_as_it_is():
    image = torch.randint(0, 256, [1, 3, 224, 224], dtype=torch.uint8)
    assert torch.equal(resize_antialiased(image, 224, "bicubic"), image.float())
    assert torch.equal(dinov2._resize_pil(image), image.float())


def test_an_unknown_way_to_resize_is_refused(folder):
    with pytest.raises(ConfigError, match="unknown resize_mode='cubic'; choose from torch, pil"):
        DINOv2Detector("cubic", folder)


def test_loading_says_nothing_and_draws_no_random_numbers(folder, capfd):
    state = torch.get_rng_state()
    DINOv2Detector(weights=folder)
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_nothing_of_config_json_but_the_shape_is_obeyed(folder, detector, images, tmp_path, monkeypatch):
    """Neither code from the folder, nor attention kernels from the hub, nor another number format."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil"}, "_attn_implementation": "kernels-community/evil"}
    config |= {"attn_implementation": "kernels-community/evil", "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert torch.equal(DINOv2Detector(weights=tmp_path)(images), detector(images))


def test_offline_the_error_says_which_files_from_where_and_where_to_put_them(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        DINOv2Detector()
    for part in ("DINOv2", "config.json", "model.safetensors", "https://huggingface.co/facebook/dinov2-large"):
        assert part in str(error.value)
    assert dinov2.REVISION in str(error.value) and "--dinov2-weights=FOLDER" in str(error.value)
    assert "\n" not in str(error.value)
    assert not DINOv2Detector.has_weights()


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch, folder):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, name, *, revision):
        asked.append((repo, name, revision))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert DINOv2Detector().published
    assert asked == [("facebook/dinov2-large", name, dinov2.REVISION) for name in ("config.json", "model.safetensors")]
    assert len(dinov2.REVISION) == 40 and int(dinov2.REVISION, 16)  # a commit, which no one can move


def test_a_folder_or_path_without_weights_is_named_with_the_option(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match=r"--dinov2-weights=.* has no model\.safetensors; fetch config\.json and"):
        DINOv2Detector(weights=tmp_path)
    with pytest.raises(ConfigError, match=r"--dinov2-weights=.*nothing does not exist; fetch config\.json and"):
        DINOv2Detector(weights=tmp_path / "nothing")


def test_without_the_library_the_error_names_the_extra(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the transformers library; try: pip install -e '\.\[metrics\]'"):
        DINOv2Detector(weights=folder)


def test_weights_of_something_else_are_refused(tmp_path, folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())

    def refusal(content):
        safetensors.torch.save_file(content, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError) as error:
            DINOv2Detector(weights=tmp_path)
        return str(error.value)

    lacking = {name: value for name, value in tensors.items() if name != "layernorm.bias"}
    assert "does not hold weights of DINOv2: missing layernorm.bias" in refusal(lacking)
    assert "unexpected" in refusal(tensors | {"classifier.weight": torch.zeros(3)})
    assert "mismatched" in refusal(tensors | {"layernorm.bias": torch.zeros(3)})
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "describes a network of type 'vit'; 'dinov2' is needed" in refusal(tensors)
    (tmp_path / "config.json").write_text("no JSON")
    assert "config.json cannot be read" in refusal(tensors)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"does not hold weights of torch\.hub's DINOv2: cls_token is missing"):
        DINOv2Detector(weights=tmp_path / "other.pth")
