"""Networks that see a second image: against the plain oracle, in every form, and bitwise what they were without one."""

from typing import Any

import pytest
import torch

from tests.helpers import oracle
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.small_network import SMALL, small_network, worst
from torch_utils.cuda import StaticCall, record_plainly
from training.fast.inference_network import InferencePrecond
from training.fast.prepare import PrepareNetwork
from training.fast.training_network import FastPrecond
from training.flops import count_flops, network_of
from training.loss import EDM2Loss
from training.networks_edm2 import Precond
from training.sampling.denoisers import Conditioned, bind_labels, conditioned
from training.sampling.sampler import edm_sampler
from training.sharing.write_folder import save_folder
from training.snapshot import Snapshot, load_snapshot, read_header, save_snapshot

CASES: list[dict[str, Any]] = [{"cond_channels": 3}, {"cond_channels": 4, "label_dim": 0, "sigma_data": 0.7}]


def data_for(net: Precond, num: int = 4) -> dict[str, Any]:
    """Clean images, noise, noise levels, labels and conditioning images."""
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(num, net.img_channels, 16, 16, generator=generator) for _ in range(2))
    return {
        "images": images,
        "unit_noise": noise,
        "rnd_normal": torch.randn(num, 1, 1, 1, generator=generator),
        "labels": torch.eye(net.label_dim)[torch.arange(num) % net.label_dim] if net.label_dim else None,
        "cond_images": torch.randn(num, net.cond_channels, 16, 16, generator=generator) * net.sigma_data,
    }


def loss_and_gradients(forward: Any, net: torch.nn.Module, data: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    net.zero_grad(set_to_none=True)
    loss = EDM2Loss()(forward, **data)
    loss.sum().backward()
    return loss.detach(), {name: param.grad.clone() for name, param in net.named_parameters()}


@pytest.mark.parametrize("options", CASES)
def test_loss_and_gradients_are_those_of_the_oracle(options):
    net = small_network(**options)
    plain = oracle.PlainPrecond(**(SMALL | options)).train()
    plain.load_state_dict(net.state_dict())
    data = data_for(net)

    def call(x: Any, sigma: Any, labels: Any, return_logvar: bool, cond_images: Any) -> Any:
        return plain.with_logvar(x, sigma, labels, cond_images)

    expected_loss, expected = loss_and_gradients(call, plain, data)
    for forward in (net, FastPrecond(net), FastPrecond(net, recompute=True)):
        loss, found = loss_and_gradients(forward, net, data)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
        assert worst(found, expected) < 1e-4
    stem = expected["unet.enc.16x16_conv.weight"][:, net.img_channels + 1 :]
    assert float(stem.abs().max()) > 0  # what it sees has a part in the loss


@pytest.mark.parametrize("options", CASES)
def test_the_network_for_sampling_is_the_oracle_and_binds_what_it_sees(options):
    net = small_network(**options).eval()
    plain = oracle.PlainPrecond(**(SMALL | options)).eval()
    plain.load_state_dict(net.state_dict())
    data = data_for(net)
    x, labels, seen = data["images"], data["labels"], data["cond_images"]
    for ours in (InferencePrecond(net), InferencePrecond(net, pack=False), net):
        with torch.no_grad():
            for sigma in (0.1, 3.0):
                expected = plain(x, torch.tensor(sigma), labels, seen)
                bound = bind_labels(Conditioned(ours, seen), labels)
                torch.testing.assert_close(bound(x, sigma, sigma), expected, rtol=1e-4, atol=1e-4)
            other = bind_labels(Conditioned(ours, -seen), labels)(x, 3.0, 3.0)
        assert float((other - expected).abs().max()) > 0.01


def test_the_input_of_the_first_convolution_has_unit_magnitude_whatever_is_seen():
    """The noisy image, the constant, the second image, and a mask: each of magnitude sigma_data before the scaling."""
    net = small_network(cond_channels=4, sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, 3, 16, 16, generator=generator) for _ in range(2))
    mask = (torch.rand(64, 1, 16, 16, generator=generator) < 0.2).float() * 2 - 1
    seen = torch.cat([clean, mask], dim=1) * 0.5
    inputs = {}
    stem = net.unet.enc["16x16_conv"]
    stem.register_forward_hook(lambda module, args, output: inputs.update(x=args[0], y=output))
    for sigma in (0.01, 1.0, 50.0):
        with torch.no_grad():
            net(clean * 0.5 + noise * sigma, sigma, None, cond_images=seen)
        each = inputs["x"].square().mean((0, 2, 3)).sqrt()
        assert each.shape == (8,)
        torch.testing.assert_close(each, torch.ones(8), rtol=0.03, atol=0)


def test_without_a_second_image_nothing_is_new():
    torch.manual_seed(0)
    plain: Any = Precond(**SMALL)
    torch.manual_seed(0)
    zero: Any = Precond(**SMALL, cond_channels=0)
    assert "cond_channels" not in plain._init_kwargs and "cond_channels" not in plain.__dict__
    assert plain.state_dict().keys() == zero.state_dict().keys()
    assert all(torch.equal(value, zero.state_dict()[name]) for name, value in plain.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain(x, 1.0), zero(x, 1.0, cond_images=torch.randn(2, 9, 16, 16)))  # ignored, as labels are


@pytest.mark.parametrize("given", [None, torch.zeros(2, 3, 16, 16), torch.zeros(4, 16, 16)])
def test_a_network_that_sees_an_image_asks_for_it(given):
    net = small_network(cond_channels=4)
    for network in (net, FastPrecond(net), InferencePrecond(net)):
        with pytest.raises(ValueError, match=r"needs cond_images \[N, 4, H, W\]"):
            network(torch.zeros(2, 3, 16, 16), torch.tensor(1.0), None, cond_images=given)
    with pytest.raises(ValueError, match="cond_channels=-1"):
        Precond(**SMALL, cond_channels=-1)


def test_one_graph_serves_every_image_that_is_seen():
    net = small_network(cond_channels=3).eval()
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ours = InferencePrecond(
        net, pack=False, through=lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=backend)
    )
    trained = torch.compile(FastPrecond(net), fullgraph=True, dynamic=False, backend=backend)
    for seed in range(2):
        x, seen = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = net(x, 1.0, cond_images=seen)
            torch.testing.assert_close(ours(x, 1.0, None, seen), expected, rtol=1e-4, atol=1e-4)
            actual = trained(x, torch.tensor([1.0, 1.0]), cond_images=seen)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2  # one for each of the two networks


@pytest.mark.parametrize("kind", ["pkl", "safetensors", "folder"])
def test_files_keep_the_network_and_what_it_sees(kind, tmp_path):
    net = small_network(cond_channels=4).eval()
    path = tmp_path / ("net" if kind == "folder" else f"net.{kind}")
    snapshot = Snapshot(net=net, nimg=1024, ema_std=0.1, info={"condition": "inpaint:0.1-0.5"})
    (save_folder if kind == "folder" else save_snapshot)(snapshot, path)
    found = load_snapshot(path)
    assert found.info == snapshot.info and found.net.cond_channels == 4
    assert read_header(path).config["arguments"]["cond_channels"] == 4
    data = data_for(net)
    args = data["images"], 1.0, data["labels"]
    half = net.half()(*args, cond_images=data["cond_images"])
    assert torch.equal(found.net(*args, cond_images=data["cond_images"]), half)


def test_a_file_of_a_network_without_has_no_word_of_it(tmp_path):
    save_snapshot(Snapshot(net=small_network().eval()), tmp_path / "net.pkl")
    assert "cond_channels" not in read_header(tmp_path / "net.pkl").config["arguments"]


def test_operations_count_the_wider_first_convolution(tmp_path):
    plain, wide = (count_flops(small_network(**options)) for options in ({}, {"cond_channels": 4}))
    assert wide.total_params - plain.total_params == 8 * 4 * 9
    assert wide.by_operation["convolution"] - plain.by_operation["convolution"] == 16 * 16 * 8 * 4 * 9
    save_snapshot(Snapshot(net=small_network(cond_channels=4).eval()), tmp_path / "net.safetensors")
    assert count_flops(network_of(str(tmp_path / "net.safetensors"))) == wide


def test_guides_see_the_same_image_or_none():
    net, guide = small_network(cond_channels=3).eval(), small_network(num_blocks=0).eval()
    data = data_for(net)
    options = {"labels": data["labels"], "num_steps": 3, "guidance": 1.5}
    with torch.no_grad():
        expected, actual = (
            edm_sampler(main, data["unit_noise"], gnet=other, **options)
            for main, other in (
                conditioned([net, guide], data["cond_images"]),
                conditioned([InferencePrecond(net), InferencePrecond(guide)], data["cond_images"]),
            )
        )
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        (main,) = conditioned([net], data["cond_images"])
        same = edm_sampler(main, data["unit_noise"], gnet=main, **options)
        alone = edm_sampler(main, data["unit_noise"], **(options | {"guidance": 1}))
    torch.testing.assert_close(same, alone, rtol=1e-4, atol=1e-4)


def test_networks_from_before_there_was_such_an_image_see_none():
    path = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
    net = load_snapshot(path).net
    assert net.cond_channels == 0 and net.unet.cond_channels == 0 and "cond_channels" not in net.__dict__


@pytest.mark.gpu
def test_on_a_gpu_the_recorded_network_sees_the_images_of_each_batch():
    device = torch.device("cuda")
    net = small_network(cond_channels=3).eval().to(device)
    recorded = PrepareNetwork(precision="fp32")(net, device)
    data = {name: value.to(device) for name, value in data_for(net).items() if value is not None}
    for seen in (data["cond_images"], -data["cond_images"]):  # the second replays what the first recorded
        options = {"labels": data["labels"], "num_steps": 3}
        with torch.no_grad():
            expected = edm_sampler(Conditioned(net, seen), data["unit_noise"], **options)
        actual = edm_sampler(Conditioned(recorded, seen), data["unit_noise"], **options)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_recorded_call_takes_the_images_of_each_batch():
    """The same without a GPU, where the call itself stands for the recording."""
    net = small_network(cond_channels=3).eval()
    recorded = InferencePrecond(net, through=lambda call: StaticCall(call, record_plainly))
    data = data_for(net)
    for seen in (data["cond_images"], -data["cond_images"]):
        expected = bind_labels(Conditioned(InferencePrecond(net), seen), data["labels"])(data["images"], 2.0, 2.0)
        assert torch.equal(bind_labels(Conditioned(recorded, seen), data["labels"])(data["images"], 2.0, 2.0), expected)
