"""Encoders: the published scaling exactly, and what a VAE is given and asked for."""

import copy
import pickle
import sys
import types
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from torch_utils.persistence import is_persistent
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder

GOLDEN = safetensors.torch.load_file(GOLDEN_DIR / "encoders.safetensors")


class HalvingVAE(torch.nn.Module):
    """Stands in for AutoencoderKL: latents are four copies of the red channel at half size, of deviation 0.5."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(12345.678))
        self.sizes = []

    def encode(self, x):
        self.sizes.append(len(x))
        mean = x[:, :1, ::2, ::2].repeat(1, 4, 1, 1)
        return {"latent_dist": SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5))}

    def decode(self, x):
        self.sizes.append(len(x))
        return {"sample": x[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)}


@pytest.fixture
def loaded(monkeypatch):
    """The names of the VAEs that were asked for, from a diffusers library that has only HalvingVAE."""
    names = []

    class AutoencoderKL:
        @staticmethod
        def from_pretrained(name, *, use_safetensors, low_cpu_mem_usage):
            assert use_safetensors  # the other formats are pickles
            assert not low_cpu_mem_usage  # needs accelerate, and prints lines where that is missing
            if name == "nowhere":
                raise OSError("nowhere is not a folder\nand not on the hub")
            names.append(name)
            return HalvingVAE()

    module = types.ModuleType("diffusers")
    module.AutoencoderKL = AutoencoderKL
    monkeypatch.setitem(sys.modules, "diffusers", module)
    monkeypatch.setattr("training.encoders.require_on_hub", lambda name: None)
    return names


def test_rgb_latents_and_pixels_are_the_published_ones():
    encoder = StandardRGBEncoder()
    assert torch.equal(encoder.encode(GOLDEN["rgb_pixels"]), GOLDEN["rgb_latents"])
    assert torch.equal(encoder.decode(GOLDEN["rgb_wild"]), GOLDEN["rgb_wild_decoded"])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_gray_level_survives_a_round_trip_with_any_number_of_channels(channels):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, channels, 16, 16)
    encoder = StandardRGBEncoder()
    latents = encoder.encode(pixels, eps=torch.randn(1))
    assert latents.dtype == torch.float32 and latents.min() == -1 and latents.max() == 1
    assert torch.equal(encoder.decode(latents), pixels)


def test_vae_latents_are_the_published_ones():
    assert torch.equal(StabilityVAEEncoder().encode_latents(GOLDEN["vae_raw"], GOLDEN["vae_eps"]), GOLDEN["vae_final"])


def test_without_eps_the_draw_is_torchs_own():
    encoder = StabilityVAEEncoder()
    torch.manual_seed(7)
    drawn = encoder.encode_latents(GOLDEN["vae_raw"])
    torch.manual_seed(7)
    assert torch.equal(drawn, encoder.encode_latents(GOLDEN["vae_raw"], torch.randn(2, 4, 4, 4)))


def test_the_vae_sees_pixels_from_0_to_1_in_batches(loaded):
    encoder = StabilityVAEEncoder(batch_size=2)
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    raw = encoder.encode_pixels(pixels)
    assert raw.shape == (5, 8, 4, 4)
    assert torch.equal(raw[:, 0], pixels[:, 0, ::2, ::2] / 255) and bool((raw[:, 4:] == 0.5).all())
    assert encoder._vae.sizes == [2, 2, 1] and loaded == ["stabilityai/sd-vae-ft-mse"]


def test_decoding_undoes_the_scaling_and_clamps(loaded):
    encoder = StabilityVAEEncoder()
    mean = torch.tensor([0.25, 2.0, -1.0, 0.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    final = encoder.encode_latents(torch.cat([mean, torch.zeros_like(mean)], dim=1))
    pixels = encoder.decode(final)
    assert pixels.shape == (1, 3, 4, 4) and pixels.dtype == torch.uint8
    assert pixels[0, :, 0, 0].tolist() == [63, 255, 0]


def test_a_vae_that_was_trained_on_minus_one_to_one_gets_that(loaded):
    pixels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    encoder = StabilityVAEEncoder(raw_mean=[0.0] * 4, raw_std=[0.5] * 4, pixel_min=-1)
    raw = encoder.encode_pixels(pixels)
    assert torch.allclose(raw[:, 0], pixels[:, 0, ::2, ::2] / 127.5 - 1, atol=1e-6)
    latents = encoder.encode_latents(raw, torch.zeros(3, 4, 4, 4))
    decoded = encoder.decode(latents)[:, 0, ::2, ::2].int()  # HalvingVAE decodes to the red channel
    assert bool(((decoded - pixels[:, 0, ::2, ::2].int()).abs() <= 1).all())
    with pytest.raises(ValueError, match="pixel_min=1"):
        StabilityVAEEncoder(pixel_min=1)


def test_samples_of_the_assumed_statistics_come_out_with_mean_0_and_deviation_one_half():
    encoder = StabilityVAEEncoder(raw_mean=[1, -2], raw_std=[3, 0.5], final_std=[0.5, 2])
    mean = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 300, 300)
    std = torch.tensor([3.0, 0.5]).reshape(1, 2, 1, 1).expand(1, 2, 300, 300)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    final = encoder.encode_latents(torch.cat([mean, std], dim=1), eps)
    assert torch.allclose(final, eps * torch.tensor([0.5, 2]).reshape(1, 2, 1, 1), atol=1e-5)


def test_copies_carry_the_name_but_not_the_weights(loaded):
    encoder = StabilityVAEEncoder(vae_name="local/vae")
    encoder.init("cpu")
    data = pickle.dumps(encoder)
    assert b"HalvingVAE" not in data and b"local/vae" in data
    for clone in (pickle.loads(data), copy.deepcopy(encoder)):
        assert clone._vae is None and clone.vae_name == "local/vae"
        assert torch.equal(clone.encode_latents(GOLDEN["vae_raw"], GOLDEN["vae_eps"]), GOLDEN["vae_final"])
    assert is_persistent(encoder) and is_persistent(StandardRGBEncoder())


def test_mistakes_are_reported_in_one_line(loaded, monkeypatch):
    def message(call, *args):
        with pytest.raises(ConfigError) as caught:
            call(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere" in message(StabilityVAEEncoder(vae_name="nowhere").init, "cpu")
    assert "3 channels" in message(StabilityVAEEncoder().encode_latents, torch.zeros(1, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert 'pip install "edm2[vae]"' in message(StabilityVAEEncoder().init, "cpu")
    with pytest.raises(ValueError, match="eps"):
        StabilityVAEEncoder().encode_latents(GOLDEN["vae_raw"], torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="raw_mean"):
        StabilityVAEEncoder(raw_mean=[1.0])
