"""One step of training: gradients, optimizer, averages, starting weights."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_close, assert_same_state, tiny_config, write_dataset
from tests.helpers.training_step import GREY, LATENTS, RGB, batch_of, make_state, wake
from torch_utils.distributed import World
from training.dataset import ImageFolderDataset
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.networks_edm2 import Precond
from training.run.run_network import check_network, make_network
from training.run.state import TrainingState
from training.snapshot import Snapshot, save_snapshot


class Recorded:
    """Stands in for the noise stream and the encoder, giving what a recorded run drew."""

    def __init__(self) -> None:
        self.draws: list[torch.Tensor] = []

    def normal(self, start: int, num: int, shape: tuple[int, ...], purpose: int) -> torch.Tensor:
        draw = self.draws.pop(0)
        assert draw.shape == (num, *shape)
        return draw

    def encode_latents(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return x


def test_six_steps_end_at_the_published_weights_and_averages(golden):
    tensors, metadata = golden("train-run.safetensors")
    arguments = json.loads(metadata["config"])
    lr = {key: float(value) for key, value in (pair.split("=") for pair in metadata["lr"].split())}
    config = tiny_config(
        Path("none"),
        batch=int(metadata["batch_size"]),
        lr=lr["ref_lr"],
        decay=lr["ref_batches"],
        rampup=lr["rampup_Mimg"],
        channels=arguments["model_channels"],
        channel_mult=tuple(arguments["channel_mult"]),
        attn_resolutions=tuple(arguments["attn_resolutions"]),
        channels_per_head=arguments["channels_per_head"],
    )
    data = SimpleNamespace(
        resolution=arguments["img_resolution"],
        num_channels=4,
        label_dim=arguments["label_dim"],
        holds_latents=False,
        class_names=None,
    )
    state = make_state(config, data)
    state.net.load_state_dict({k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")})
    recorded = Recorded()
    state._noise = state.encoder = recorded

    for step, (loss, rate) in enumerate(zip(json.loads(metadata["losses"]), json.loads(metadata["lrs"]), strict=True)):
        assert state.learning_rate == pytest.approx(rate, rel=1e-9)
        recorded.draws = [tensors[f"step{step}.rnd_normal"], tensors[f"step{step}.noise_unit"]]
        result = state.step(tensors[f"step{step}.images"], tensors[f"step{step}.labels"])
        assert result.mean().item() == pytest.approx(loss, rel=1e-3)
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
    assert state.nimg == 6 * config.batch

    results = {"final.": state.net.state_dict()}
    results |= {f"ema{suffix}.": net.state_dict() for net, suffix in state.ema.get()}
    assert results.keys() == {"final.", "ema-0.050.", "ema-0.100."}
    for prefix, result in results.items():
        keys = [key for key in tensors if key.startswith(prefix)]
        assert len(keys) > 30
        for key in keys:
            assert_close(result[key.removeprefix(prefix)], tensors[key], 1e-3, key)


def gradients(state: TrainingState, dataset: SimpleNamespace) -> dict[str, torch.Tensor]:
    wake(state.net)
    state.accumulate_gradients(*batch_of(dataset))
    return {name: param.grad for name, param in state.net.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("dataset", [RGB, LATENTS], ids=["rgb", "latents"])
def test_rounds_of_accumulation_do_not_change_the_gradients(dataset):
    config = tiny_config(Path("none"))
    whole = gradients(make_state(config, dataset), dataset)
    assert all(grad.abs().max() > 0 for grad in whole.values())
    for batch_gpu in (1, 2, 4):
        split = gradients(make_state(dataclasses.replace(config, batch_gpu=batch_gpu), dataset), dataset)
        assert split.keys() == whole.keys()
        all_split, all_whole = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (split, whole))
        assert (all_split - all_whole).norm() < 1e-6 * all_whole.norm()
        for name, grad in split.items():
            if grad.ndim > 0:  # a scalar's gradient is a sum over all pixels, of which rounding may leave little
                assert_close(grad, whole[name], 1e-5, name)


def test_rounds_of_accumulation_do_not_change_the_loss_of_an_image():
    whole = make_state().accumulate_gradients(*batch_of(RGB))
    split = make_state(tiny_config(Path("none"), batch_gpu=2)).accumulate_gradients(*batch_of(RGB))
    assert_close(split, whole, 1e-6)


def test_gradients_scale_with_the_loss_scale():
    plain, scaled = (gradients(make_state(tiny_config(Path("none"), ls=ls)), RGB) for ls in (1, 64))
    for name, grad in plain.items():
        assert_close(scaled[name], grad * 64, 1e-6, name)


def test_the_noise_changes_from_step_to_step_and_with_the_seed():
    state, other = make_state(), make_state(tiny_config(Path("none"), seed=1))
    first = state.accumulate_gradients(*batch_of(RGB))
    state.nimg += 8
    other.net.load_state_dict(state.net.state_dict())
    assert not torch.allclose(state.accumulate_gradients(*batch_of(RGB)), first)
    assert not torch.allclose(other.accumulate_gradients(*batch_of(RGB)), first)


def test_dropout_depends_on_the_position_in_the_run_only():
    first, again, without = (make_state(tiny_config(Path("none"), dropout=p)) for p in (0.5, 0.5, 0))
    for state in (first, again, without):
        wake(state.net)
    torch.manual_seed(1)
    expected = first.step(*batch_of(RGB))
    torch.manual_seed(2)
    assert torch.equal(again.step(*batch_of(RGB)), expected)
    assert not torch.allclose(without.step(*batch_of(RGB)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_element_that_is_not_finite_becomes_zero(value):
    state, clean = make_state(), make_state()
    for each in (state, clean):
        wake(each.net)
    seen: list[torch.Tensor] = []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[0, 0] = value
        return grad

    def zero(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[0, 0] = 0
        return grad

    state.net.unet.out_conv.weight.register_hook(spoil)
    clean.net.unet.out_conv.weight.register_hook(zero)
    state.optimizer.register_step_pre_hook(lambda *_: seen.append(state.net.unet.out_conv.weight.grad.clone()))
    for each in (state, clean):
        each.step(*batch_of(RGB))
    assert (seen[0][0, 0] == 0).all()
    assert seen[0].isfinite().all()
    assert_same_state(state.state_dict(), clean.state_dict())


def test_the_next_step_normalizes_stored_weights_before_its_forward_pass():
    state = make_state()
    for _ in range(3):
        state.step(*batch_of(RGB))
    stepped = {name: param.detach().clone() for name, param in state.net.named_parameters() if param.ndim > 0}
    loss_fn, at_forward = state.loss_fn, {}

    def recorded(*args, **kwargs):
        at_forward.update({name: param.detach().clone() for name, param in state.net.named_parameters()})
        return loss_fn(*args, **kwargs)

    state.loss_fn = recorded
    state.step(*batch_of(RGB))
    for name, param in at_forward.items():
        if param.ndim > 0:
            rows = param.flatten(1)
            magnitude = rows.square().mean(dim=1).sqrt()
            assert (magnitude - 1).abs().max() < 1e-3, name
            cosine = torch.nn.functional.cosine_similarity(rows, stepped[name].flatten(1))
            assert (cosine - 1).abs().max() < 1e-5, name
    # The step itself leaves the sphere; otherwise there would be nothing to show.
    assert max((w.flatten(1).square().mean(dim=1).sqrt() - 1).abs().max() for w in stepped.values()) > 1e-3


@pytest.mark.parametrize(
    ("dataset", "channels", "encoder"),
    [(RGB, 3, StandardRGBEncoder), (GREY, 1, StandardRGBEncoder), (LATENTS, 4, StabilityVAEEncoder)],
    ids=["rgb", "grey", "latents"],
)
def test_the_data_decides_encoder_and_channels(dataset, channels, encoder):
    state = make_state(dataset=dataset)
    assert isinstance(state.encoder, encoder)
    assert state.step(*batch_of(dataset)).shape == (8, channels, 8, 8)


def test_latents_are_sampled_anew_in_every_step_from_the_stream():
    state = make_state(dataset=LATENTS)
    latents, labels = batch_of(LATENTS)
    seen = []
    encode = state.encoder.encode_latents
    state.encoder.encode_latents = lambda x, eps=None: seen.append(eps) or encode(x, eps)
    for _ in range(2):
        state.step(latents, labels)
    assert all(eps.shape == (8, 4, 8, 8) for eps in seen)
    assert not torch.equal(*seen)


def test_starting_weights_come_from_the_seed_in_the_published_order():
    config = tiny_config(Path("none"), seed=7)
    torch.manual_seed(7)
    expected = Precond(8, 3, 3, **config.network.arguments())
    torch.manual_seed(1)
    assert_same_state(make_network(config, RGB).state_dict(), expected.state_dict())
    without = make_network(dataclasses.replace(config, cond=False), RGB)
    assert without.label_dim == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_mult": (1, 1, 1, 1, 1)}, "8x8 .* divisible by 16"),
        ({"channels": 10, "channels_per_head": 6}, "20 channels do not divide over 3"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused_before_it_is(change, message):
    with pytest.raises(ConfigError, match=message):
        check_network(tiny_config(Path("none"), **change), RGB)


def test_a_network_of_terabytes_is_checked_without_allocating_its_weights():
    huge = tiny_config(Path("none"), channels=1 << 14, channels_per_head=64)
    before = psutil.Process().memory_info().rss
    check_network(huge, RGB)
    with pytest.raises(ConfigError, match=r"8x8 .* divisible by 16"):
        check_network(tiny_config(Path("none"), channels=1 << 14, channel_mult=(1, 1, 1, 1, 1)), RGB)
    assert psutil.Process().memory_info().rss - before < 256 << 20


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    net = make_network(tiny_config(Path("none"), seed=5), RGB).eval()
    wake(net)
    path = tmp_path / "network-snapshot-0000001-0.050.safetensors"
    save_snapshot(Snapshot(net=net), path)
    return path


def test_init_starts_from_the_weights_of_a_snapshot(snapshot: Path):
    source = make_network(tiny_config(Path("none"), seed=5), RGB)
    wake(source)
    state = make_state(tiny_config(Path("none"), init=str(snapshot)))
    assert state.uninitialized == []
    for net in (state.net, *(ema for ema, _ in state.ema.get())):
        for name, value in net.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, source.state_dict()[name].half().float()), name


def test_init_lists_what_does_not_fit_and_leaves_it_fresh_where_allowed(snapshot: Path):
    config = tiny_config(Path("none"), init=str(snapshot))
    with pytest.raises(ConfigError, match=r"unet\.emb_label\.weight 8x5 here, 8x3 there.*--init-partial"):
        make_state(
            config, SimpleNamespace(resolution=8, num_channels=3, label_dim=5, holds_latents=False, class_names=None)
        )
    data = SimpleNamespace(resolution=8, num_channels=1, label_dim=3, holds_latents=False, class_names=None)
    allowed = dataclasses.replace(config, init_partial=True)
    state = make_state(allowed, data)
    fresh = make_network(config, data).state_dict()
    taken = make_state(config).net.state_dict()
    assert sorted(state.uninitialized) == ["unet.enc.8x8_conv.weight", "unet.out_conv.weight"]
    for name, value in state.net.state_dict().items():
        assert torch.equal(value, (fresh if name in state.uninitialized else taken)[name]), name


def test_init_from_a_network_with_nothing_in_common_is_refused(snapshot: Path):
    config = tiny_config(Path("none"), init=str(snapshot), init_partial=True, channels=12, channels_per_head=12)
    state = make_state(config)  # the scalar gains still fit
    assert 0 < len(state.uninitialized) < len(state.net.state_dict())
    with pytest.raises(ConfigError, match=r"missing\.pkl"):
        make_state(tiny_config(Path("none"), init="missing.pkl"))


def test_a_state_restores_bitwise_and_goes_on_as_if_never_stored():
    config = tiny_config(Path("none"), dropout=0.2)
    state, other = make_state(config), make_state(dataclasses.replace(config))
    for _ in range(2):
        state.step(*batch_of(RGB))
    other.load_state_dict(copy.deepcopy(state.state_dict()), "a test")
    assert_same_state(other.state_dict(), state.state_dict())
    for each in (state, other):
        each.step(*batch_of(RGB))
    assert_same_state(other.state_dict(), state.state_dict())


@pytest.mark.parametrize("part", ["state", "net", "optimizer", "ema"])
@pytest.mark.parametrize("damage", [None, 3, {}, []])
def test_a_checkpoint_of_something_else_is_refused(part, damage):
    state = make_state()
    with pytest.raises(ConfigError, match=r"^here\.pt does not belong to this run"):
        state.load_state_dict({**state.state_dict(), part: damage}, "here.pt")


def test_other_average_lengths_than_the_checkpoints_are_refused():
    state = make_state()
    with pytest.raises(ConfigError, match="widths"):
        make_state(tiny_config(Path("none"), ema_stds=(0.05, 0.2))).load_state_dict(state.state_dict(), "here.pt")


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_stored_data_set_steps(tmp_path: Path, channels: int):
    dataset = ImageFolderDataset(write_dataset(tmp_path / "data.zip", channels=channels))
    state = TrainingState(tiny_config(tmp_path / "data.zip"), dataset, World(), resumed=False)
    items = [dataset[i] for i in range(8)]
    images, labels = (torch.stack([torch.from_numpy(item[part]) for item in items]) for part in (0, 1))
    assert state.step(images, labels).isfinite().all()
