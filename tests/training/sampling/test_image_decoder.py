"""The decoder of latents: half precision, batches and tiles of a real, tiny VAE."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.sampling import tiny_network
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.sampling import networks
from training.sampling.generation import generate_images
from training.sampling.networks import DECODER_DTYPES, DecoderOptions

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an AutoencoderKL of 4 latent channels at half of the size, whose outputs have some contrast."""
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        torch.nn.init.constant_(model.decoder.conv_out.bias, 0.5)
    model.save_pretrained(folder)
    return str(folder)


def encoder_of(vae: str) -> StabilityVAEEncoder:
    return StabilityVAEEncoder(vae, raw_mean=[0.0] * 4, raw_std=[0.5] * 4)


def applied(encoder: StabilityVAEEncoder, **options: Any) -> tuple[StabilityVAEEncoder, dict[str, Any]]:
    """The encoder that decodes as `options` say, on `device` and `batch_size` at once, and what is noted."""
    device, batch_size = options.pop("device", CPU), options.pop("batch_size", 4)
    compile = options.pop("compile", False)
    result, noted = DecoderOptions(**options).apply(encoder, device, batch_size, compile=compile)
    assert isinstance(result, StabilityVAEEncoder)
    return result, noted


def latents(size: int = 16, num: int = 3) -> torch.Tensor:
    return torch.randn(num, 4, size, size, generator=torch.Generator().manual_seed(1)) * 0.5


def sizes_seen(encoder: StabilityVAEEncoder) -> list[tuple[int, ...]]:
    """Fills with the shapes that the decoder network is given from now on."""
    seen: list[tuple[int, ...]] = []
    vae = encoder._vae if encoder._decoder_vae is None else encoder._decoder_vae
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


@torch.no_grad()
@pytest.mark.parametrize(("precision", "most"), [("fp16", 1), ("bf16", 16)])
def test_half_precision_is_close_and_leaves_encoding_alone(vae: str, precision: str, most: int):
    plain = encoder_of(vae)
    half, noted = applied(plain, precision=precision, batch_size=2)
    assert noted == {"decoder": precision, "decoder_tile": None}
    expected, actual = plain.decode(latents()), half.decode(latents())
    assert expected.float().std() > 5
    difference = (expected.int() - actual.int()).abs()
    assert int(difference.max()) <= most and int(difference.sum()) > 0
    assert next(half._decoder_vae.decoder.parameters()).dtype == DECODER_DTYPES[precision]
    assert torch.equal(half.encode_pixels(expected), plain.encode_pixels(expected))
    assert torch.equal(plain.decode(latents()), expected)


@torch.no_grad()
def test_a_decoder_that_overflows_in_half_precision_computes_in_float32(vae: str):
    plain = encoder_of(vae)
    plain.init("cpu")
    with torch.no_grad():  # activations beyond 65504 in the middle, and what they give scaled back at the end
        plain._vae.decoder.conv_in.weight.mul_(1e6)
        plain._vae.decoder.conv_in.bias.mul_(1e6)
    half, _ = applied(plain, precision="fp16")
    assert half is not plain
    assert torch.equal(half.decode(latents()), plain.decode(latents()))
    assert half._decoder_dtype == torch.float32


@torch.no_grad()
def test_the_decoder_has_its_own_batch_size(vae: str):
    plain = encoder_of(vae)
    other, _ = applied(plain, batch_size=2)
    other.init("cpu")
    seen = sizes_seen(other)
    pixels = other.decode(latents(num=5))
    assert [shape[0] for shape in seen] == [2, 2, 1]
    assert (pixels.int() - plain.decode(latents(num=5)).int()).abs().max() <= 1
    assert other.with_decoder(batch_size=2) is other  # nothing to change


@torch.no_grad()
def test_large_images_are_decoded_in_tiles_and_small_ones_as_they_were(vae: str):
    plain = encoder_of(vae)
    tiled, noted = applied(plain, tile=32)
    assert noted == {"decoder": None, "decoder_tile": 32}
    assert torch.equal(tiled.decode(latents(16)), plain.decode(latents(16)))
    seen = sizes_seen(tiled)
    large = latents(40, num=1)
    actual, expected = tiled.decode(large), plain.decode(large)
    assert actual.shape == expected.shape == (1, 3, 80, 80)
    assert len(seen) > 4 and all(max(shape[2:]) <= 16 for shape in seen)
    # A tile has other borders and other group norms, so this is close and no more.
    difference = (actual.float() - expected.float()).abs()
    assert difference.mean() < 0.5 * (expected.float() - expected.float().mean()).abs().mean()


def test_tiles_that_do_not_fit_the_vae_are_refused(vae: str):
    encoder, _ = applied(encoder_of(vae), tile=12)
    with pytest.raises(ConfigError, match="decoder tiles of 12 pixels must be a multiple of 8 for this VAE"):
        encoder.init("cpu")
    with pytest.raises(ConfigError, match="--decoder-tile=0"):
        DecoderOptions(tile=0)
    with pytest.raises(ConfigError, match="--decoder-precision=int8"):
        DecoderOptions(precision="int8")


def test_the_default_is_half_precision_on_cuda_only_and_pixels_have_no_decoder(vae: str):
    encoder = encoder_of(vae)
    on_gpu, noted = applied(encoder, device=torch.device("cuda"))
    assert noted["decoder"] == "fp16" and on_gpu._decoder_dtype == torch.float16
    assert applied(encoder)[1]["decoder"] is None
    rgb = StandardRGBEncoder()
    assert DecoderOptions(precision="fp16", tile=8).apply(rgb, CPU, 4) == (rgb, {})


class Switch:
    """Stands for the VAE; notes whether cuDNN may use TF32 while it works."""

    def __init__(self) -> None:
        self.allowed: list[bool] = []

    def to(self, device: Any) -> "Switch":
        return self

    def encode(self, x: torch.Tensor) -> Any:
        self.allowed.append(torch.backends.cudnn.allow_tf32)
        return {"latent_dist": SimpleNamespace(mean=x[:, :1], std=x[:, :1])}

    def decode(self, x: torch.Tensor) -> Any:
        self.allowed.append(torch.backends.cudnn.allow_tf32)
        return {"sample": x[:, :3]}


def test_encoding_uses_tf32_as_published_and_decoding_where_asked(vae: str, monkeypatch: pytest.MonkeyPatch):
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for set_before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", set_before)
        for make, expected in (
            (lambda e: e, [True, set_before]),
            (lambda e: e.with_encoder(tf32=False), [False, set_before]),
            (lambda e: e.with_encoder(tf32=False).with_statistics([0.0] * 4, [1.0] * 4), [False, set_before]),
            (lambda e: applied(e, precision="tf32", device=torch.device("cuda"))[0], [True, True]),
        ):
            encoder, switch = make(encoder_of(vae)), Switch()
            encoder._vae = switch
            encoder._decoder_vae = switch if encoder._decoder_tf32 else None
            encoder.encode_pixels(pixels)
            encoder.decode(latents(num=1))
            assert switch.allowed == expected and torch.backends.cudnn.allow_tf32 is set_before


@torch.no_grad()
def test_on_a_cpu_tf32_and_compilation_change_no_bit(vae: str):
    plain = encoder_of(vae)
    pixels = plain.decode(latents())
    tf32, noted = applied(encoder_of(vae), precision="tf32")
    assert noted["decoder"] == "tf32" and torch.equal(tf32.decode(latents()), pixels)
    expected = plain.encode_pixels(pixels)
    for options in ({}, {"tf32": False}, {"compile": True}):
        assert torch.equal(encoder_of(vae).with_encoder(**options).encode_pixels(pixels), expected)
    assert applied(encoder_of(vae), compile=True)[0]._decoder_compile is False


@torch.no_grad()
def test_a_compiled_decoder_sees_one_batch_size(vae: str, monkeypatch: pytest.MonkeyPatch):
    compiled: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compiled.append((type(module).__name__, options))
    )
    plain = encoder_of(vae)
    other = plain.with_decoder(batch_size=4, compile=True)
    other.init("cpu")
    assert compiled == [("Decoder", {"dynamic": False})]
    seen = sizes_seen(other)
    pixels = other.decode(latents(num=6))
    assert [shape[0] for shape in seen] == [4, 4] and len(pixels) == 6
    assert (pixels.int() - plain.decode(latents(num=6)).int()).abs().max() <= 1
    assert not plain._vae.decoder._forward_pre_hooks  # a copy was compiled


def test_the_decoder_is_compiled_with_the_networks_on_cuda_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(networks, "missing_compiler", lambda device: None)
    on_gpu = {"device": torch.device("cuda"), "compile": True}
    encoder = StabilityVAEEncoder()
    assert applied(encoder, **on_gpu)[0]._decoder_compile
    assert not applied(encoder, **on_gpu, tile=512)[0]._decoder_compile  # tiles are of many sizes
    assert not applied(encoder, **{**on_gpu, "device": CPU})[0]._decoder_compile
    monkeypatch.setattr(networks, "missing_compiler", lambda device: "no compiler was found")
    assert not applied(encoder, **on_gpu)[0]._decoder_compile


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_every_way_to_encode_and_decode_is_close(vae: str):
    plain = encoder_of(vae)
    pixels = plain.decode(latents())
    expected = plain.encode_pixels(pixels)
    for options in ({}, {"tf32": False}, {"compile": True}):
        actual = encoder_of(vae).with_encoder(**options).encode_pixels(pixels.cuda()).cpu()
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    for precision in ("fp32", "tf32", "fp16"):
        for compile in (False, True):
            device = torch.device("cuda")
            other, _ = applied(encoder_of(vae), precision=precision, device=device, compile=compile)
            assert (other.decode(latents().cuda()).cpu().int() - pixels.int()).abs().max() <= 2


def test_how_to_decode_is_no_part_of_a_snapshot(vae: str):
    encoder = encoder_of(vae).with_decoder(torch.float16, tile=32, batch_size=2)
    encoder = encoder.with_encoder(tf32=False)
    encoder.init("cpu")
    clone = pickle.loads(pickle.dumps(encoder))
    assert clone.__dict__.keys() == encoder_of(vae).__dict__.keys()
    assert clone._decoder_dtype == torch.float32 and clone._decoder_vae is None and clone._encoder_tf32


def test_generation_decodes_as_it_is_told(vae: str, tmp_path: Path):
    options = {"net": tiny_network(channels=4), "seeds": range(3), "num_steps": 2, "device": "cpu"}
    (plain,) = generate_images(encoder=encoder_of(vae), **options)
    images = generate_images(
        encoder=encoder_of(vae), decoder=DecoderOptions(precision="bf16"), encoder_batch_size=2, **options
    )
    seen = sizes_seen(images.encoder)
    (half,) = images
    assert [shape[0] for shape in seen] == [2, 1]
    assert plain.images.shape == half.images.shape == (3, 3, 8, 8)
    assert 0 < (plain.images.int() - half.images.int()).abs().max() <= 16
