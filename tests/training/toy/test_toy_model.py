"""The toy network and its files: golden numbers, autograd as the oracle of the written-out score, refused files."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from tests.test_layers import ROOT, foreign_imports
from torch_utils.pickles.safe_pickle import read_pickle
from toy_example import NET
from training.presets import locate
from training.toy.mixture import gt
from training.toy.model import MPLinear, MPSiLU, ToyModel
from training.toy.toy_files import load_toy_model, save_toy_model

SNAPSHOTS = GOLDEN_DIR / "snapshots"


def small_model(**options: Any) -> ToyModel:
    """A network with a gain, so that its layers count."""
    torch.manual_seed(1)
    net = ToyModel(**{"num_layers": 2, "hidden_dim": 8} | options).double()
    torch.nn.init.constant_(net.gain, -0.7)
    return net


def noisy_points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sigma = torch.logspace(-2, 0.7, 40, dtype=torch.float64)
    return torch.randn(40, 2, generator=generator, dtype=torch.float64), sigma


def autograd_score(net: ToyModel, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net.logp(x, sigma).sum(), x, create_graph=True)[0]


def test_the_published_file_gives_the_published_density_and_score(golden) -> None:
    reference, _ = golden("toy.safetensors")
    net = load_toy_model(SNAPSHOTS / "toy.pkl")
    x, sigma = reference["model.x"], reference["model.sigma"]
    for name in ("logp", "score"):
        value, wanted = getattr(net, name)(x, sigma), reference[f"model.{name}"]
        assert (value - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    state = {f"model.state.{name}": value for name, value in net.state_dict().items()}
    assert state.keys() == {name for name in reference if name.startswith("model.state.")}
    assert all(torch.equal(value, reference[name]) for name, value in state.items())
    density = net.logp(x[:4], 0.5).exp()
    torch.testing.assert_close(net.pdf(x[:4], 0.5), density / density.max())


def test_densities_have_a_maximum_of_1_at_every_noise_level() -> None:
    net, mixture = load_toy_model(locate(NET)), gt()
    for sigma in (0.002, 0.005, 0.03, 1.0):
        x = mixture.sample(200, sigma, torch.Generator().manual_seed(0))
        pdf, logp = net.pdf(x, sigma), net.logp(x, sigma)
        assert pdf.max() == 1 and (pdf > 0).sum() > 1
        torch.testing.assert_close(pdf, (logp - logp.max()).exp())


def test_scores_keep_a_graph_only_if_asked() -> None:
    net = small_model()
    x, sigma = noisy_points()
    assert not net.score(x, sigma).requires_grad and net.score(x, sigma, True).requires_grad
    assert not net.score(x.requires_grad_(), sigma, graph=False).requires_grad
    assert inspect.signature(net.forward).parameters["sigma"].default == 0


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_the_score_is_the_gradient_of_the_log_density(num_layers) -> None:
    net = small_model(num_layers=num_layers).eval()  # not renormalized between the two
    x, sigma = noisy_points()
    torch.testing.assert_close(net.score(x, sigma), autograd_score(net, x, sigma), rtol=1e-10, atol=1e-10)


def test_training_on_the_score_has_the_gradients_that_autograd_finds_by_differentiating_twice() -> None:
    net = small_model().eval()  # without the renormalization, so that both passes see the same weights
    x, sigma = noisy_points()
    target = torch.sin(3 * x)
    gradients = []
    for score in (net.score(x, sigma, graph=True), autograd_score(net, x, sigma)):
        net.zero_grad()
        (score - target).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_training_mode_normalizes_the_stored_weights_and_changes_no_output() -> None:
    net = small_model().eval()
    x, sigma = noisy_points()
    before = net.score(x, sigma)
    after = net.train().score(x, sigma)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    for layer in (module for module in net.modules() if isinstance(module, MPLinear)):
        torch.testing.assert_close(layer.weight.square().mean(1), torch.ones(8).double(), rtol=1e-3, atol=0)


def test_layers_keep_the_magnitude_of_their_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    assert float(MPLinear(64, 64)(x).detach().std()) == pytest.approx(1, abs=0.05)
    assert float(MPSiLU()(x).square().mean()) == pytest.approx(1, abs=0.05)


def test_the_defaults_are_the_published_ones() -> None:
    net = ToyModel()
    assert [tuple(p.shape) for p in net.parameters()] == [(), (64, 4), *[(64, 64)] * 4]
    assert (net.gain.item(), net.sigma_data) == (0, 0.5)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_a_file_gives_the_network_back(tmp_path, suffix) -> None:
    net = small_model().float()
    save_toy_model(net, tmp_path / f"net{suffix}", info={"seed": 3})
    again = load_toy_model(tmp_path / f"net{suffix}")
    x, sigma = (tensor.float() for tensor in noisy_points())
    assert torch.equal(again.score(x, sigma), net.eval().score(x, sigma))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert [path.name for path in tmp_path.iterdir()] == [f"net{suffix}"]
    if suffix == ".safetensors":
        with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["info"]) == {"seed": 3}


def test_the_pickle_has_the_published_layout(tmp_path) -> None:
    """The same objects, attributes and tensor names as the published file."""
    save_toy_model(ToyModel(num_layers=4, hidden_dim=32), tmp_path / "net.pkl")
    ours, published = read_pickle(tmp_path / "net.pkl"), read_pickle(SNAPSHOTS / "toy.pkl")
    assert ours.class_name == published.class_name
    assert ours.state.keys() == published.state.keys()
    ours, published = ours.state["_modules"]["layers"], published.state["_modules"]["layers"]
    for first, second in zip(ours.state["_modules"].values(), published.state["_modules"].values(), strict=True):
        assert first.class_name == second.class_name
        assert first.state.keys() == second.state.keys()
        assert (first.state["_init_args"], first.state["_init_kwargs"]) == (
            second.state["_init_args"],
            second.state["_init_kwargs"],
        )


_PUBLISHED_READER = """
import pickle, sys, types
import torch
from tests.helpers import published_reader as reader
persistence = types.ModuleType("torch_utils.persistence")
persistence.persistent_class = reader.persistent_class
persistence._reconstruct_persistent_obj = reader._reconstruct_persistent_obj
package = types.ModuleType("torch_utils")
package.persistence = persistence
sys.modules |= {"torch_utils": package, "torch_utils.persistence": persistence, "training": None, "dnnlib": None}
with open(sys.argv[1], "rb") as file:
    net = pickle.load(file)
torch.save(net.score(torch.load(sys.argv[2]), 0.3), sys.argv[2])
"""


def test_the_published_reader_opens_our_pickle(tmp_path) -> None:
    net = small_model().float().eval()
    save_toy_model(net, tmp_path / "net.pkl")
    x = torch.randn(5, 2)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", _PUBLISHED_READER, str(tmp_path / "net.pkl"), str(tmp_path / "x.pt")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), net.score(x, 0.3))


def test_the_embedded_text_needs_torch_and_persistence_only() -> None:
    source = (ROOT / "training" / "toy" / "model.py").read_text(encoding="utf-8")
    assert not foreign_imports(source, {"torch", "torch_utils.persistence"}, top_only=False)


def edited(tmp_path: Path, *, tensors: dict[str, Any] | None = None, **metadata: str) -> Path:
    """A .safetensors file of a network, with some entries replaced; tensors of value None are left out."""
    path = tmp_path / "edited.safetensors"
    save_toy_model(small_model().float(), path)
    with safe_open(path, framework="pt") as file:
        entries = file.metadata() | metadata
    values = load_file(path) | (tensors or {})
    save_file({name: value for name, value in values.items() if value is not None}, path, entries)
    return path


def network(**arguments: Any) -> str:
    return json.dumps({"class": "ToyModel", "arguments": {"num_layers": 2, "hidden_dim": 8} | arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"gain": None}}, r"do not fit its configuration: Missing key\(s\) .*gain"),
        ({"tensors": {"extra": torch.zeros(1)}}, r"do not fit its configuration: Unexpected key\(s\) .*extra"),
        ({"tensors": {"layers.2.weight": torch.zeros(8, 9)}}, r"size mismatch for layers.2.weight"),
        ({"tensors": {"gain": torch.zeros([], dtype=torch.int32)}}, r"tensor gain has dtype torch.int32"),
        ({"format": "edm2-network"}, r"its format is 'edm2-network', version '1'; it must be 'edm2-toy', '1'"),
        ({"network": "{"}, r"header entry 'network' is not JSON"),
        ({"network": "[]"}, r"does not describe a ToyModel"),
        ({"network": network(num_layers=10**9)}, r"argument 'num_layers' of the network is '1000000000'"),
        ({"network": network(num_layers=60_000)}, r"a network of 60000 layers does not fit the file"),
        ({"network": network(hidden_dim=-1)}, r"argument 'hidden_dim' of the network is '-1'"),
        ({"network": network(hidden_dim=8.0)}, r"argument 'hidden_dim' of the network is '8.0'"),
        ({"network": network(in_dim=3)}, r"for points of 3 dimensions; the toy example has 2"),
        ({"network": network(colour=3)}, r"has an unknown argument 'colour'"),
    ],
)
def test_a_file_that_is_not_a_toy_network_is_refused_by_name(tmp_path, changes, message) -> None:
    path = edited(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_toy_model(path)
    assert str(path) in str(caught.value)


def test_other_pickles_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"rgb-cond.pkl: this is not a toy network"):
        load_toy_model(SNAPSHOTS / "rgb-cond.pkl")
    hostile = tmp_path / "hostile.pkl"
    hostile.write_bytes(pickle.dumps(print))
    with pytest.raises(ConfigError, match=r"hostile.pkl: not read, and nothing in it was run: .*print"):
        load_toy_model(hostile)
    cut = tmp_path / "cut.pkl"
    cut.write_bytes((SNAPSHOTS / "toy.pkl").read_bytes()[:-500])
    with pytest.raises(ConfigError, match=r"cut.pkl"):
        load_toy_model(cut)
    with pytest.raises(ConfigError, match=r"none.pkl' does not exist"):
        load_toy_model(tmp_path / "none.pkl")


def test_what_cannot_be_written_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"net.pt lacks the suffix of a network file; use .pkl or .safetensors"):
        save_toy_model(ToyModel(), tmp_path / "net.pt")
    with pytest.raises(ConfigError, match=r"cannot write .*No such file"):
        save_toy_model(ToyModel(), tmp_path / "none" / "net.pkl")
