"""The network for sampling against published numbers and the network that it was made of; images and their batches."""

import copy
import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.sampling import CASES, golden_network
from tests.helpers.small_network import OPTIONS, small_network
from torch_utils.cuda import StaticCall, record_plainly
from torch_utils.precision import cpu_threads
from training.fast.inference_network import InferencePrecond
from training.fast.ops import packed
from training.fast.prepare import PrepareNetwork
from training.networks_edm2 import Precond
from training.sampling.denoisers import bind_labels
from training.sampling.generation import generate_images
from training.sampling.sampler import StackedRandomGenerator, edm_sampler
from training.sampling.schedule import HeunOptions
from training.snapshot import load_snapshot

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"
GUIDE = GOLDEN_DIR / "snapshots" / "rgb-cond-guide.pkl"
CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    not packed(torch.zeros(8, 8, 3, 3), 8, 8).is_mkldnn, reason="PyTorch has no oneDNN convolutions here"
)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_outputs_are_the_published_ones(golden, name, pack):
    g, metadata = golden(f"precond-{name}.safetensors")
    net = Precond(**json.loads(metadata["config"])).eval()
    net.load_state_dict({key[6:]: value for key, value in g.items() if key.startswith("state.")})
    ours = InferencePrecond(net, pack=pack)(g["in.x"], g["in.sigma"], g.get("in.class_labels"))
    theirs = g["out.D_x"]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_network_that_it_was_made_of(options):
    net = small_network(**options).eval()
    ours = InferencePrecond(net)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, net.img_channels, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.eye(net.label_dim)[:3] if net.label_dim else None
    with torch.no_grad():
        for sigma, classes in (
            (torch.tensor(0.3), labels),
            (torch.tensor([0.1, 2.0, 70.0]), labels),
            (5.0, None),
            (0.5, None if labels is None else labels[:1]),
        ):
            expected = net(x, sigma, classes)
            actual = ours(x, sigma, classes)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32():
    net = small_network().eval()
    x, labels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.eye(5)[:3]
    expected = InferencePrecond(net)(x, 2.0, labels)
    for pack in (True, False):
        actual = InferencePrecond(net, dtype=torch.bfloat16, pack=pack)(x, 2.0, labels)
        assert 0 < float((actual - expected).norm() / expected.norm()) < 0.02


def test_parameters_in_float16_give_what_they_give_in_float32():
    half = small_network().eval().half()
    x, labels = torch.randn(2, 3, 16, 16), torch.eye(5)[:2]
    ours = InferencePrecond(half)
    assert {value.dtype for value in half.parameters()} == {torch.float16}
    assert torch.equal(ours(x, 1.5, labels), InferencePrecond(copy.deepcopy(half).float())(x, 1.5, labels))


def test_later_changes_of_the_network_do_not_reach_it():
    net = small_network().eval()
    ours = InferencePrecond(net)
    x, labels = torch.randn(2, 3, 16, 16), torch.eye(5)[:2]
    before = ours(x, 1.5, labels)
    with torch.no_grad():
        for value in [*net.parameters(), *net.buffers()]:
            value.zero_()
    assert torch.equal(ours(x, 1.5, labels), before)


def sample_case(case: str, golden: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a published case from networks prepared as `how` says, and those that were published."""
    tensors, metadata = golden("sampler.safetensors")
    kwargs = json.loads(metadata["cases"])[case]
    net = InferencePrecond(golden_network(tensors, metadata["config"], "net"), **how)
    match kwargs.pop("gnet", None):
        case "c":
            kwargs["gnet"] = InferencePrecond(golden_network(tensors, metadata["config"], "gnet_cond"), **how)
        case "u":
            guide = golden_network(tensors, metadata["config_gnet_uncond"], "gnet_uncond")
            kwargs["gnet"] = InferencePrecond(guide, **how)
    if kwargs.pop("dtype", None) == "f64":
        kwargs["dtype"] = torch.float64
    if "S_churn" in kwargs:
        kwargs["randn_like"] = StackedRandomGenerator("cpu", json.loads(metadata["churn_seeds"])).randn_like
    return edm_sampler(net, tensors["in.noise"], tensors["in.labels"], **kwargs), tensors[f"out.{case}"]


@pytest.mark.parametrize("case", CASES)
def test_the_sampler_gives_the_published_images(case, golden):
    for pack in (True, False):
        actual, expected = sample_case(case, golden, pack=pack)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def images_of(prepare: PrepareNetwork | None, **options: Any) -> np.ndarray:
    options = {"net": NET, "num_steps": 4, "device": "cpu"} | options
    batches = [batch.images.numpy() for batch in generate_images(prepare=prepare, **options) if batch.seeds]
    return np.concatenate(batches).astype(int)


@pytest.mark.parametrize("case", ["plain", "class3", "auto"])
def test_images_are_the_published_ones(case, golden):
    tensors, metadata = golden("seed-to-image.safetensors")
    options = {"plain": {}, "class3": {"class_idx": 3}, "auto": {"gnet": GUIDE, "guidance": 0.0}}[case]
    if "guidance" in options:
        options["guidance"] = float(metadata["guidance"])
    options |= {"seeds": json.loads(metadata["seeds"]), "num_steps": int(metadata["num_steps"]), "max_batch_size": 5}
    expected = tensors[f"images.{case}"].numpy().astype(int)
    for precision in (None, "fp32", "tf32", "fp16"):  # float32 on a CPU, all of them
        difference = np.abs(images_of(PrepareNetwork(precision=precision), **options) - expected)
        assert difference.max() <= 1 and np.mean(difference > 0) <= 0.03
    difference = np.abs(images_of(PrepareNetwork(precision="bf16"), **options) - expected)
    assert 0 < np.mean(difference) < 1 and difference.max() <= 12  # measured: see docs/numerics.md


@packs
def test_in_float32_an_image_is_bitwise_the_same_in_every_batch():
    options = {"gnet": GUIDE, "guidance": 1.4, "S_churn": 10, "seeds": range(7)}
    latents = []

    def keep(**kwargs: Any) -> torch.Tensor:
        latents.append(edm_sampler(**kwargs))
        return latents[-1]

    results = {}
    with cpu_threads(1):
        for size in (7, 1, 2, 3):
            latents.clear()
            images_of(PrepareNetwork(), sampler_fn=keep, max_batch_size=size, **options)
            results[size] = torch.cat(latents)
    for size in (1, 2, 3):
        assert torch.equal(results[size], results[7]), size


@packs
def test_in_float32_padding_changes_no_image():
    class Padded(PrepareNetwork):
        def __call__(self, net: Any, device: torch.device) -> Any:
            prepared = super().__call__(net, device)
            prepared.fixed_batch = True
            return prepared

    options = {"seeds": range(5), "max_batch_size": 4}
    assert np.array_equal(images_of(Padded(), **options), images_of(PrepareNetwork(), **options))


@pytest.mark.parametrize(
    ("solver", "interval", "main_calls", "guide_calls"),
    [("heun", None, 63, 63), ("euler", None, 32, 32), ("dpmpp2m", None, 32, 32), ("heun", (0.28, 2.9), 63, 14)],
)
def test_each_network_is_evaluated_as_often_as_the_solver_says(solver, interval, main_calls, guide_calls):
    """With one noise level a call, and a class embedding that is computed once."""
    seen: dict[str, list[Any]] = {"main": [], "guide": []}

    def counted(name: str) -> Any:
        def through(evaluate: Any) -> Any:
            def call(x: torch.Tensor, sigma: torch.Tensor, label_emb: torch.Tensor | None) -> torch.Tensor:
                seen[name].append((tuple(sigma.shape), label_emb))
                return torch.zeros_like(x)

            return call

        return InferencePrecond(small_network(), through=through)

    noise = torch.randn(2, 3, 16, 16)
    main, guide = counted("main"), counted("guide")
    if interval is not None:
        assert guide_calls == 2 * sum(interval[0] < sigma <= interval[1] for sigma in HeunOptions().sigmas()[:-2])
    edm_sampler(main, noise, torch.eye(5)[:2], gnet=guide, guidance=2, interval=interval, solver=solver)
    assert (len(seen["main"]), len(seen["guide"])) == (main_calls, guide_calls)
    for calls in seen.values():
        assert {shape for shape, _ in calls} == {(1,)}
        assert all(label_emb is calls[0][1] for _, label_emb in calls)


def test_bound_labels_are_those_of_the_moment():
    net, x = InferencePrecond(small_network()), torch.randn(2, 3, 16, 16)
    labels = torch.eye(5)[:2]
    denoise = bind_labels(net, labels)
    before = denoise(x, 1.0, 1.0)
    assert torch.equal(before, net(x, torch.tensor(1.0), labels))
    labels.zero_()
    assert torch.equal(denoise(x, 1.0, 1.0), before)


def test_one_graph_serves_every_noise_level_and_class():
    net = small_network().eval()
    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def through(evaluate: Any) -> Any:
        return torch.compile(evaluate, fullgraph=True, dynamic=False, backend=backend)

    ours = InferencePrecond(net, pack=False, through=through)
    for sigma in (0.1, 1.0, 60.0):
        x, labels = torch.randn(3, 3, 16, 16), torch.eye(5)[:3].roll(int(sigma), 0)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, sigma, labels), net(x, sigma, labels), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def traced(evaluate: Any) -> Any:
    return torch.compile(evaluate, fullgraph=True, dynamic=False, backend="eager")


@pytest.mark.parametrize("through", [None, traced, lambda evaluate: StaticCall(evaluate, record_plainly)])
def test_a_dropped_network_is_gone_at_once(through):
    """On a GPU its weights and the memory of its graph would stay until a collection of cycles happens to run."""
    net = InferencePrecond(small_network().eval(), pack=through is None, through=through)
    gc.collect()
    gc.disable()
    try:
        edm_sampler(net, torch.randn(2, 3, 16, 16), torch.eye(5)[:2], num_steps=2)
        parts = [weakref.ref(part) for part in (net, *net.modules(), *net.buffers())]
        del net
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()


@pytest.mark.slow
def test_compiled_it_gives_the_published_images(golden):
    """With the default backend, and a ragged last batch, which is padded."""
    tensors, metadata = golden("seed-to-image.safetensors")
    notices: list[str] = []
    options = {"seeds": json.loads(metadata["seeds"]), "num_steps": int(metadata["num_steps"]), "max_batch_size": 5}
    actual = images_of(PrepareNetwork(compile=True, announce=notices.append), **options)
    difference = np.abs(actual - tensors["images.plain"].numpy().astype(int))
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.03
    assert len(notices) == 2 and "compiled in" in notices[1]


def test_networks_of_other_kinds_stay_unchanged_with_a_notice_to_the_user():
    class Changed(Precond):
        pass

    notices: list[str] = []
    for net in (torch.nn.Identity(), lambda x, sigma, labels: x, Changed(4, 1, 0, model_channels=4, channel_mult=[1])):
        assert PrepareNetwork(announce=notices.append)(net, CPU) is net
        assert not notices
        assert PrepareNetwork(precision="bf16", announce=notices.append)(net, CPU) is net
        assert "is not a Precond: it runs unchanged" in notices.pop()


def test_what_is_prepared_already_is_left_alone():
    prepare = PrepareNetwork()
    ours = prepare(load_snapshot(NET).net, CPU)
    assert isinstance(ours, InferencePrecond) and prepare(ours, CPU) is ours
    assert (ours.dtype, ours.use_fp16, ours.fixed_batch) == (torch.float32, False, False)
    assert PrepareNetwork(precision="bf16")(load_snapshot(NET).net, CPU).dtype == torch.bfloat16
    assert PrepareNetwork(compile=True)(load_snapshot(NET).net, CPU).fixed_batch


@pytest.mark.gpu
def test_on_a_gpu_the_recorded_network_is_the_plain_one():
    device = torch.device("cuda")
    net = small_network().eval().to(device)
    ours = PrepareNetwork(precision="fp32")(net, device)
    assert ours.fixed_batch
    noise, labels = torch.randn(4, 3, 16, 16, device=device), torch.eye(5, device=device)[:4]
    guide = PrepareNetwork(precision="fp32")(small_network(num_blocks=0).eval().to(device), device)
    actual = edm_sampler(ours, noise, labels, gnet=guide, guidance=1.5, num_steps=4)
    with torch.no_grad():
        plain = small_network(num_blocks=0).eval().to(device)
        expected = edm_sampler(net, noise, labels, gnet=plain, guidance=1.5, num_steps=4)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
