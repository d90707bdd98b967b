"""The training loss against published numbers, and against its equations written out."""

import json

import pytest
import torch

from tests.helpers.tiny import assert_close
from training.loss import EDM2Loss
from training.networks_edm2 import Precond


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_loss_and_gradients_equal_the_published_ones(golden, name):
    tensors, metadata = golden(f"precond-{name}.safetensors")
    net = Precond(**json.loads(metadata["config"])).train()
    net.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    loss_fn = EDM2Loss(P_mean=float(metadata["P_mean"]), P_std=float(metadata["P_std"]))
    images = tensors["loss.images"]
    loss = loss_fn(
        net,
        images,
        tensors.get("in.class_labels"),
        rnd_normal=tensors["loss.rnd_normal"],
        unit_noise=tensors["loss.noise_unit"],
    )
    assert_close(loss.detach(), tensors["loss.per_element"], 1e-4)
    (loss.sum() / len(images)).backward()
    grads = {f"grad.{key}": param.grad for key, param in net.named_parameters()}
    assert grads.keys() == {key for key in tensors if key.startswith("grad.")}
    for key, grad in grads.items():
        assert_close(grad, tensors[key], 1e-4, key)


def test_draws_that_are_not_given_come_from_the_global_stream_noise_level_first():
    images = torch.linspace(-1, 1, 48).reshape(4, 3, 2, 2)

    def blank_net(x, sigma, labels, return_logvar):
        return torch.zeros_like(x), torch.zeros_like(sigma)

    torch.manual_seed(5)
    drawn = EDM2Loss()(blank_net, images)
    torch.manual_seed(5)
    level, noise = torch.randn(4, 1, 1, 1), torch.randn_like(images)
    assert torch.equal(drawn, EDM2Loss()(blank_net, images, rnd_normal=level, unit_noise=noise))


def test_the_loss_of_a_known_denoiser():
    # One pixel of 0.3, P_mean 0.2, P_std 0.7, a level drawn as -1, so sigma = exp(-0.5); noise drawn as 2.
    sigma = torch.tensor(-0.5).exp().item()
    calls = []

    def net(x, sigma, labels, return_logvar):
        calls.append((x.item(), sigma.item(), labels))
        return torch.full_like(x, 0.1), torch.full_like(sigma, 0.4)

    loss_fn = EDM2Loss(P_mean=0.2, P_std=0.7, sigma_data=0.5)
    pixel, level, noise = (torch.full([1, 1, 1, 1], value) for value in (0.3, -1.0, 2.0))
    loss = loss_fn(net, pixel, None, level, noise).item()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert loss == pytest.approx(weight / torch.tensor(0.4).exp().item() * (0.1 - 0.3) ** 2 + 0.4, rel=1e-6)
    assert calls == [(pytest.approx(0.3 + 2 * sigma), pytest.approx(sigma), None)]
