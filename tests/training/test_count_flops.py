"""The papers' table of sizes, and the arithmetic of sampling runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import count_flops as script
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from training import flops
from training.flops import count_decoder, count_flops, decoder_of, network_of, run_cost
from training.networks_edm2 import MPConv, Precond
from training.presets import GENERATION, MODEL_ROOT
from training.sampling.options import SamplerOptions
from training.sampling.schedule import HeunOptions

# arXiv 2312.02696, Table 2: parameters (the first six exactly) and operations of one evaluation, for latents.
PAPER = {
    "xxs": (31_309_029, 11.525),
    "xs": (124_713_253, 45.498),
    "s": (280_212_837, 101.918),
    "m": (497_807_781, 180.786),
    "l": (777_498_085, 282.101),
    "xl": (1_119_283_749, 405.863),
    "xxl": (1_523_000_000, 552.0),
}


def run(*args: object) -> str:
    result = CliRunner().invoke(script.cmdline, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_table(size: str):
    params, gflops = PAPER[size]
    count = count_flops(network_of(f"edm2-img512-{size}"))
    if size == "xxl":
        assert count.total_params == pytest.approx(params, rel=0.0005)
    else:
        assert count.total_params == params
    assert count.total_flops / 1e9 == pytest.approx(gflops, rel=0.005)
    assert sum(count.by_operation.values()) == count.total_flops
    assert set(count.by_operation) == {"convolution", "fully connected", "attention", "elementwise"}


def products_by_hand(net: Precond, height: int) -> dict[str, int]:
    """Multiply-accumulates from the shapes of weights and of what they meet, by hooks on a real evaluation."""
    found = {"convolution": 0, "fully connected": 0, "attention": 0}
    hooks = []

    def on_layer(layer: MPConv, args: tuple, out: torch.Tensor) -> None:
        pixels = out.shape[2] * out.shape[3] if out.ndim == 4 else 1
        found["convolution" if out.ndim == 4 else "fully connected"] += layer.weight.numel() * pixels

    for name, layer in net.named_modules():
        if isinstance(layer, MPConv) and not name.startswith("logvar"):
            hooks.append(layer.register_forward_hook(on_layer))
        if getattr(layer, "num_heads", 0):

            def on_attention(block: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
                found["attention"] += 2 * out.shape[1] * (out.shape[2] * out.shape[3]) ** 2

            hooks.append(layer.register_forward_hook(on_attention))
    net(torch.zeros([1, net.img_channels, height, height]), torch.ones([1]), torch.zeros([1, net.label_dim]))
    for hook in hooks:
        hook.remove()
    return found


def test_products_are_those_of_the_layers_shapes():
    net = Precond(
        16, 3, 10, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], channels_per_head=8
    ).eval()
    count = count_flops(net)
    by_hand = products_by_hand(net, 16)
    assert {kind: count.by_operation[kind] for kind in by_hand} == by_hand
    # Weights are normalized in every evaluation: a norm, a division and a scaling for each of their elements.
    assert count.by_operation["elementwise"] > 3 * sum(p.numel() for p in net.unet.parameters() if p.ndim > 1)
    assert all(not parameter.is_meta for parameter in net.parameters())


def test_only_products_count_against_a_matrix_rate():
    with torch.device("meta"):
        count = count_flops(Precond(8, 3, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8],
                                    channels_per_head=8))  # fmt: skip
    by_kind = count.by_operation
    products = by_kind["convolution"] + by_kind["attention"] + by_kind["fully connected"]
    assert count.matrix_flops == products < count.total_flops


def test_a_whole_run_adds_up():
    net, guide = network_of(str(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl")), network_of("fashion")
    one, other = (count_flops(network).total_flops for network in (net, guide))
    plain = run_cost(net, [], SamplerOptions())
    assert (plain.main_calls, plain.guide_calls, plain.total_flops) == (63, [], 63 * one)
    guided = run_cost(net, [guide], SamplerOptions.from_keywords(num_guides=1, guidance=2))
    assert (guided.main_calls, guided.guide_calls) == (63, [63])
    assert guided.total_flops == 63 * (one + other)
    limited = SamplerOptions.from_keywords(num_guides=1, guidance=2, interval=(0.28, 2.90))
    starts = [sigma for sigma in HeunOptions().sigmas() if 0.28 < sigma <= 2.90]
    assert run_cost(net, [guide], limited).guide_calls == [2 * len(starts)]
    assert run_cost(net, [], SamplerOptions(solver="dpmpp2m")).main_calls == 32


def test_published_files_need_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    sources = {place for row in GENERATION.values() for place in (row.net, row.gnet) if place and "https" in place}
    one_each = {source.rpartition("/")[2].rsplit("-", 2)[0]: source for source in sources}
    assert len(one_each) == 13
    for name, source in one_each.items():
        net = network_of(source)
        assert (net.label_dim == 0) == ("uncond" in name)
        assert net.img_channels == (4 if "img512" in name else 3)
    assert list(tmp_path.iterdir()) == []
    uncond = count_flops(network_of(MODEL_ROOT + "edm2-img512-xs-uncond-2147483-0.045.pkl"))
    # An unconditional network lacks one layer, from 1000 classes to 512 features.
    assert uncond.total_params == PAPER["xs"][0] - 1000 * 512


def test_the_command_counts_files_presets_and_guided_runs(tmp_path: Path):
    pytest.importorskip("diffusers")
    output = run("edm2-img512-s-guid-interval-fid", "--json", tmp_path / "f.json")
    counts = json.loads((tmp_path / "f.json").read_text())
    assert "63 evaluations + 14 of a guide" in output and "multiply-accumulate counts as one" in output
    assert [network["total_params"] for network in counts["networks"]] == [PAPER["s"][0], PAPER["xs"][0] - 512_000]
    image = counts["image"]
    assert image["total_flops"] == image["main_flops"] + image["guide_flops"] + image["decoder_flops"]
    assert image["decoder_flops"] == count_decoder(4, 64).total_flops > 1e12
    file = run(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl", "--steps=5", "--solver=euler")
    assert "5 steps of euler, 5 evaluations" in file and "decoder" not in file
    assert "decoder" in run(GOLDEN_DIR / "snapshots" / "latent-cond.pkl")
    alone = run(GOLDEN_DIR / "snapshots" / "rgb-cond.pkl", "--gnet=self", "--guidance=2", "--json", tmp_path / "s.json")
    image = json.loads((tmp_path / "s.json").read_text())["image"]
    assert "63 evaluations + 63 of a guide" in alone and image["guide_flops"] == image["main_flops"] > 0
    assert "fully connected" in run("fashion")


def test_only_published_files_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
    named = tmp_path / "edm2-img512-s-0000100-0.050.pkl"
    named.write_bytes(source.read_bytes())
    net = network_of(str(named))
    assert count_flops(net) == count_flops(network_of(str(source)))
    assert decoder_of(net, str(named)) is None

    def read_header(asked: str) -> None:
        raise ConfigError(f"{asked} was asked for")

    monkeypatch.setattr(flops, "read_header", read_header)
    with pytest.raises(ConfigError, match="was asked for"):
        network_of(f"https://elsewhere.example/{named.name}")


def test_the_decoder_has_the_stability_vaes_size():
    pytest.importorskip("diffusers")
    assert count_decoder(4, 64).total_params == pytest.approx(49.49e6, rel=0.001)


def test_mistakes_are_named():
    for args, message in [
        ([], "no network to sample from"),
        (["missing.pkl"], "missing.pkl"),
        (["edm2-img512-s", "--guidance=2"], "needs a guiding network"),
        (["edm2-img512-s", "--net=a.pkl"], "both name a network"),
        (["edm2-img64-s", "--decoder"], "has no decoder"),
        (["edm2-img512-s-uncond-autog-fid", "--gnet=self"], "the network is unconditional"),
        (["edm2-img512-s", "--steps=0"], "0 sampling steps"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(*args)


def test_math_is_not_fooled_by_training_mode():
    net = Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, dropout=0.5, channels_per_head=8).train()
    before = [parameter.clone() for parameter in net.parameters()]
    count = count_flops(net)
    assert net.training and count == count_flops(net.eval())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert math.isfinite(count.total_flops)
