"""torch.compile of the whole network: what it computes, and what it leaves in the weights, is what eager mode does."""

import copy

import pytest
import torch

from training.loss import EDM2Loss
from training.networks_edm2 import Precond


def make_network(channel_mult: tuple[int, ...], num_blocks: int = 0) -> Precond:
    """A small conditional network, its gains away from zero; two levels of one block have every kind of layer."""
    torch.manual_seed(0)
    net = Precond(
        4,
        2,
        3,
        model_channels=4,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        attn_resolutions=[4],
        channels_per_head=4,
    )
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(0.5) if param.ndim == 0 else param.mul_(2)  # so that forced normalization has work to do
    return net


def train(net: Precond, forward: torch.nn.Module, num_steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """A few steps with `forward` standing for `net`; per step the loss, gradients and stored weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)  # Adam would turn rounding of tiny gradients into whole steps
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(num_steps):
        images, noise = (torch.randn(4, 2, 4, 4, generator=generator) for _ in range(2))
        rnd_normal = torch.randn(4, 1, 1, 1, generator=generator)
        labels = torch.eye(3)[torch.randint(3, [4], generator=generator)]
        loss = EDM2Loss()(forward, images, labels, rnd_normal=rnd_normal, unit_noise=noise).sum() / 4
        optimizer.zero_grad()
        loss.backward()
        record = {"loss": loss.detach().clone()}
        for name, param in net.named_parameters():
            assert param.grad is not None, name
            record |= {f"grad.{name}": param.grad.clone(), f"weight.{name}": param.detach().clone()}
        optimizer.step()
        steps.append(record)
    return steps


@pytest.mark.slow
def test_compiled_training_has_the_gradients_and_stored_weights_of_eager_training() -> None:
    eager, compiled = make_network((1,)).train(), make_network((1,)).train()
    expected = train(eager, eager)
    actual = train(compiled, torch.compile(compiled, fullgraph=True))
    for ours, theirs in zip(actual, expected, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    for module in compiled.modules():
        if hasattr(module, "weight") and module.weight.ndim > 1:
            magnitude = actual[-1][f"weight.{name_of(compiled, module)}"].flatten(1).square().mean(dim=1).sqrt()
            torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=2e-4, atol=0)


@pytest.mark.slow
def test_compiled_evaluation_gives_the_eager_result_and_leaves_the_weights_alone() -> None:
    net = make_network((1,)).eval()
    before = copy.deepcopy(net.state_dict())
    x, sigma, labels = torch.randn(2, 2, 4, 4), torch.tensor([0.3, 5.0]), torch.eye(3)[:2]
    with torch.no_grad():
        expected = net(x, sigma, labels)
        actual = torch.compile(net, fullgraph=True)(x, sigma, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_traced_graph_is_whole_and_trains_as_eager_mode_does() -> None:
    """Without the default backend, whose compilation takes long: one graph, its gradients and stored weights."""
    eager, traced = make_network((1, 2), num_blocks=1).train(), make_network((1, 2), num_blocks=1).train()
    (expected,) = train(eager, eager, num_steps=1)
    (actual,) = train(traced, torch.compile(traced, fullgraph=True, backend="aot_eager"), num_steps=1)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def name_of(net: torch.nn.Module, module: torch.nn.Module) -> str:
    """The name of the module's weight in `net`."""
    return next(name for name, param in net.named_parameters() if param is module.weight)
