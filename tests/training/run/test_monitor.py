"""What --monitor records: against figures computed another way; and that it leaves the training alone."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import assert_same_state, tiny_config, write_dataset
from torch_utils.distributed import World
from training.config import TrainingConfig
from training.networks_edm2 import Block
from training.run.monitor import Monitor
from training.run.run_data import batches
from training.run.run_folder import RunFolder
from training.run.update import normalize_weights
from training.training_loop import Iteration, Status, TrainingRun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip")


def make_run(config: TrainingConfig, folder: Path) -> TrainingRun:
    folder.mkdir(exist_ok=True)
    return TrainingRun(config, RunFolder(folder), world=World())


def stats_of(run: TrainingRun) -> list[dict[str, float]]:
    return [event.stats for event in run if isinstance(event, Status)]


def monitored(stats: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("Monitor/"): value for key, value in stats.items() if key.startswith("Monitor/")}


@pytest.mark.parametrize("change", [{}, {"batch_gpu": 2}], ids=["whole", "rounds"])
def test_training_is_bitwise_the_same_with_it(data: Path, tmp_path: Path, change: dict):
    config = tiny_config(data, dropout=0.3, status=16, **change)
    without, with_it = (make_run(dataclasses.replace(config, monitor=m), tmp_path / str(m)) for m in (False, True))
    plain, watched = stats_of(without), stats_of(with_it)
    assert_same_state(without.state.state_dict(), with_it.state.state_dict())
    assert [s["Loss/loss"] for s in plain] == [s["Loss/loss"] for s in watched]
    assert not any(monitored(stats) for stats in plain)
    assert all(len(monitored(stats)) > 20 for stats in watched)
    assert all(module.training and not module._forward_hooks for module in with_it.state.net.modules())


def test_gradients_are_those_of_the_iteration_that_ends_the_interval(data: Path, tmp_path: Path):
    # One iteration; the norm over all parameters, without the loss scale.
    config = tiny_config(data, status=8, duration=8, monitor=True, ls=8.0)
    (stats,) = stats_of(make_run(config, tmp_path / "run"))
    twin = make_run(dataclasses.replace(config, monitor=False), tmp_path / "twin")
    images, labels = next(batches(config, twin.dataset, World(), start=0))
    normalize_weights(twin.state.net)
    twin.state.accumulate_gradients(images, labels)
    grads = [p.grad.flatten().double() for p in twin.state.net.parameters() if p.grad is not None]
    found = monitored(stats)
    assert found["gradients/norm"] == pytest.approx(torch.cat(grads).norm().item() / 8, rel=1e-6)
    assert found["gradients/nonfinite"] == 0


def test_elements_that_are_not_finite_are_counted_and_left_out_of_the_norm(data: Path, tmp_path: Path):
    config = tiny_config(data, status=8, duration=8, monitor=True)
    norms = []
    for name in ("healthy", "spoilt"):
        run = make_run(config, tmp_path / name)
        param = max(run.state.net.parameters(), key=torch.numel)
        spoil = torch.zeros_like(param).flatten()
        spoil[:10] = 1 if name == "healthy" else math.nan
        keep = (spoil == 0).view_as(param)
        if name == "healthy":
            param.register_hook(lambda grad, keep=keep: grad * keep)
        else:
            param.register_hook(lambda grad, spoil=spoil: grad + spoil.view_as(grad))
        (stats,) = stats_of(run)
        norms.append(monitored(stats)["gradients/norm"])
        share = monitored(stats)["gradients/nonfinite"]
        total = sum(p.numel() for p in run.state.net.parameters())
        assert share == pytest.approx(0 if name == "healthy" else 10 / total)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_magnitudes_are_root_mean_squares_of_blocks_and_levels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tiny_config(data, status=8, duration=8, monitor=True), tmp_path)
    passes: list[list[torch.Tensor]] = []
    forward = Block.forward

    def recorded(block: Block, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        out = forward(block, x, emb)
        if not block.training:
            passes.append([out.double()])
        return out

    monkeypatch.setattr(Block, "forward", recorded)
    (stats,) = stats_of(run)
    found = monitored(stats)
    unet = run.state.net.unet
    blocks = [f"enc.{n}" for n, b in unet.enc.items() if isinstance(b, Block)] + [f"dec.{n}" for n in unet.dec]
    assert len(passes) == len(blocks) > 8
    outputs = {name: out for name, (out,) in zip(blocks, passes, strict=True)}
    for name, out in outputs.items():
        assert found[f"activations/{name}"] == pytest.approx(out.square().mean().sqrt().item(), rel=1e-6)
        params = [p.flatten().double() for p in unet.get_submodule(name).parameters() if p.ndim]
        assert found[f"weights/{name}"] == pytest.approx(torch.cat(params).square().mean().sqrt().item(), rel=1e-6)
    level = torch.cat([out.flatten() for name, out in outputs.items() if name.startswith("dec.4x4_")])
    assert found["activations/dec.4x4"] == pytest.approx(level.square().mean().sqrt().item(), rel=1e-6)
    assert {f"activations/{half}.{side}" for half in ("enc", "dec") for side in ("8x8", "4x4")} <= found.keys()
    assert found["weights/enc.8x8_conv"] == pytest.approx(1, abs=1e-2)  # what forced weight normalization keeps them at


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_images_are_enough_in_the_number_format_of_the_run(
    precision: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tiny_config(data, precision=precision, batch=40, status=40, duration=40, monitor=True), tmp_path)
    found = []
    forward = Block.forward

    def recorded(block: Block, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        out = forward(block, x, emb)
        if not block.training:
            found.append((len(out), out.dtype))
        return out

    monkeypatch.setattr(Block, "forward", recorded)
    stats_of(run)
    assert set(found) == {(32, torch.bfloat16 if precision == "bf16" else torch.float32)}
    assert not run.state.net.unet._forward_pre_hooks


def test_what_several_processes_hold_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    """Twice the sums, as of two processes that hold all of it: the same norm, share and names."""
    net = torch.nn.Linear(3, 2)
    figures = []
    for copies in (1, 2):
        world = World()
        monkeypatch.setattr(World, "all_reduce_sum", lambda self, tensor, copies=copies: tensor * copies)
        monitor = Monitor(net, world, everything=False)
        monitor.arm()
        net.weight.grad = torch.arange(6.0).view(2, 3)
        net.bias.grad = torch.full([2], math.inf)
        monitor.see_gradients()
        assert monitor.collect(torch.nn.functional.mse_loss) == {}
        monitor.everything = True
        figures.append(monitor._summary(world.all_reduce_sum(torch.tensor([[6.0, 0, 55], [2, 2, 0]])), ["w", "b"]))
        assert monitor.lost == ["b"]
    assert (
        figures[0]
        == figures[1]
        == pytest.approx({"Monitor/gradients/norm": 55**0.5, "Monitor/gradients/nonfinite": 0.25})
    )


def test_between_status_intervals_nothing_is_kept_or_computed(data: Path, tmp_path: Path):
    run = make_run(tiny_config(data, status=24, monitor=True), tmp_path)
    seen = []
    for event in run:
        if isinstance(event, Iteration):
            monitor = run.state.monitor
            seen.append((monitor._inputs is not None, monitor._gradients is not None))
    assert seen == [(False, False), (False, False), (True, True)] * 2


@pytest.mark.slow
def test_a_compiled_network_is_watched_too(data: Path, tmp_path: Path):
    config = tiny_config(data, status=16, duration=32, monitor=True)
    plain, compiled = (make_run(config, tmp_path / name) for name in ("plain", "compiled"))
    compiled.state.net.compile(backend="eager")
    expected, found = (monitored(stats_of(run)[-1]) for run in (plain, compiled))
    assert found == pytest.approx(expected, rel=1e-5)
