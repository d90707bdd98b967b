"""torch.compile of the networks: what it computes, and what it leaves in the weights, is what eager mode does.

The default backend takes about a second for every kernel, so it gets one block, and its graph breaks are looked for in
a whole network with a backend that generates no code.
"""

import copy

import pytest
import torch

from training.loss import EDM2Loss
from training.networks_edm2 import Block, Precond


def make_network(channel_mult: tuple[int, ...]) -> Precond:
    """A small conditional network; two levels have every kind of layer."""
    torch.manual_seed(0)
    net = Precond(
        4,
        2,
        3,
        model_channels=4,
        channel_mult=channel_mult,
        num_blocks=0,
        attn_resolutions=[4],
        channels_per_head=4,
    )
    stir(net)
    return net


def make_block() -> Block:
    """A block of the decoder. Attention is compiled in test_fast_network.py, and adds kernels for two more layers."""
    torch.manual_seed(0)
    block = Block(6, 4, 5, flavor="dec")
    stir(block)
    return block


def stir(net: torch.nn.Module) -> None:
    """Move gains away from zero, and weights away from unit magnitude."""
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(0.5) if param.ndim == 0 else param.mul_(2)  # so that forced normalization has work to do


def loss_of_network(forward: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
    """The training loss of a network of `make_network`."""
    images, noise = (torch.randn(4, 2, 4, 4, generator=generator) for _ in range(2))
    rnd_normal = torch.randn(4, 1, 1, 1, generator=generator)
    labels = torch.eye(3)[torch.randint(3, [4], generator=generator)]
    return EDM2Loss()(forward, images, labels, rnd_normal=rnd_normal, unit_noise=noise).sum() / 4


def loss_of_block(forward: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A loss that the output of a block of `make_block` brings down to zero."""
    x, target = (torch.randn(2, channels, 4, 4, generator=generator) for channels in (6, 4))
    return (forward(x, torch.randn(2, 5, generator=generator)) - target).square().sum()


def train(net: torch.nn.Module, forward: torch.nn.Module, loss_of=loss_of_network, num_steps: int = 1) -> list[dict]:
    """A few steps with `forward` standing for `net`; per step the loss, gradients and stored weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)  # Adam would turn rounding of tiny gradients into whole steps
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(num_steps):
        loss = loss_of(forward, generator)
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
def test_a_compiled_block_trains_with_the_gradients_and_stored_weights_of_an_eager_one() -> None:
    eager, compiled = make_block().train(), make_block().train()
    expected = train(eager, eager, loss_of_block, num_steps=3)
    actual = train(compiled, torch.compile(compiled, fullgraph=True), loss_of_block, num_steps=3)
    for ours, theirs in zip(actual, expected, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    for name, param in compiled.named_parameters():
        if param.ndim > 1:
            magnitude = actual[-1][f"weight.{name}"].flatten(1).square().mean(dim=1).sqrt()
            torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=2e-4, atol=0)


@pytest.mark.slow
def test_a_compiled_block_evaluates_as_an_eager_one_and_leaves_its_weights_alone() -> None:
    block = make_block().eval()
    assert_evaluates_as_eager(block, torch.compile(block, fullgraph=True), torch.randn(2, 6, 4, 4), torch.randn(2, 5))


def test_the_traced_graph_is_whole_and_evaluates_as_eager_mode_does() -> None:
    net = make_network((1, 2)).eval()
    traced = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_evaluates_as_eager(net, traced, torch.randn(2, 2, 4, 4), torch.tensor([0.3, 5.0]), torch.eye(3)[:2])


def test_the_traced_graph_is_whole_and_trains_as_eager_mode_does() -> None:
    """One graph, its gradients and stored weights."""
    eager, traced = make_network((1, 2)).train(), make_network((1, 2)).train()
    (expected,) = train(eager, eager)
    (actual,) = train(traced, torch.compile(traced, fullgraph=True, backend="aot_eager"))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def assert_evaluates_as_eager(net: torch.nn.Module, compiled: torch.nn.Module, *inputs: torch.Tensor) -> None:
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
