"""Checks that results on a GPU are right: graphs, memory, seeds, number formats, attention."""

import contextlib
import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.philox import class_of_seed, noise_of_seed
from benchmarks.gpu_check.records import Finding, Row, Setting
from benchmarks.numerics_sampling import images_of, in_float32
from benchmarks.numerics_training import compare_formats
from benchmarks.sample import IMG512_S, SMALL, random_network
from benchmarks.train import SHAPES, TINY, our_state, wait
from torch_utils.cuda import SideBySide, StaticCall, record_graph, record_plainly
from torch_utils.precision import numerics, precision_note
from training.fast.ops import ATTENTION_KERNELS
from training.fast.prepare import PrepareNetwork
from training.networks_edm2 import image_size
from training.sampling.sampler import edm_sampler

# Bounds for the gradient of a number format relative to float32: about ten times what was measured on a CPU
# (docs/numerics.md), for other orders of summation.
_GRADIENT_BOUNDS = {"fp32": 1e-3, "tf32": 0.1, "fp16": 0.1, "bf16": 0.3}


def graphs_at_once(setting: Setting) -> Finding:
    """Replay two recorded chains of matrix products at the same time, then one after the other is gone."""
    device = torch.device(setting.device)
    width, num = (16, 3) if setting.tiny else (768, 2000)
    generator = torch.Generator(device).manual_seed(0)

    def make() -> Callable[..., torch.Tensor]:
        weights = [torch.randn([width, width], device=device, generator=generator) * width**-0.5 for _ in range(8)]

        def chain(x: torch.Tensor) -> torch.Tensor:
            for weight in weights:
                x = torch.nn.functional.linear(x, weight)
            return x

        return chain

    record = record_graph if device.type == "cuda" else record_plainly
    x = torch.randn([32, width], device=device, generator=generator)
    with numerics(), torch.no_grad():
        chains = [make(), make()]
        calls = [StaticCall(chain, record) for chain in chains]
        alone = [call(x) for call in calls]
        off = max(float((a - chain(x)).norm() / a.norm()) for a, chain in zip(alone, chains, strict=True))
        wrong = torch.zeros([], dtype=torch.int64, device=device)
        both = SideBySide(*calls)
        for _ in range(num):
            for result, expected in zip(both(x), alone, strict=True):
                wrong += (result != expected).any()
        at_once = int(wrong)
        del both, calls[1]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        filling = [torch.full([1 << (10 if setting.tiny else 26)], float("nan"), device=device) for _ in range(8)]
        for _ in range(num // 10 + 1):
            wrong += (calls[0](x) != alone[0]).any()
        after = int(wrong) - at_once
        del filling
    value = f"{at_once} of {2 * num} replays differ at once, {after} afterwards; {off:.0e} from eager"
    return Finding(passed=at_once == 0 and after == 0 and off < 1e-4, value=value)


def dropped_networks(setting: Setting) -> Finding:
    """Prepare networks, call and drop them, with the garbage collector off: their memory must be free at once."""
    device = torch.device(setting.device)
    options = SMALL | {"model_channels": 8, "channels_per_head": 8} if setting.tiny else IMG512_S | {"num_blocks": 1}
    net, _ = random_network(options, device, seed=0)
    size = sum(param.numel() * 2 for param in net.parameters())
    x = torch.zeros([2, net.img_channels, *image_size(net)], device=device)
    used, alive = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4 if setting.tiny else 10):
            prepared = PrepareNetwork(precision="fp16")(net, device)
            prepared(x, 1.0, torch.eye(net.label_dim, device=device)[:2])
            alive.append(weakref.ref(prepared))
            del prepared
            if device.type == "cuda":
                torch.cuda.synchronize()
                used.append(torch.cuda.memory_allocated() / size)
    finally:
        gc.enable()
    kept = sum(ref() is not None for ref in alive)
    growth = used[-1] - used[0] if used else 0.0
    value = f"{kept} of {len(alive)} dropped networks still in memory; growth {growth:.2f} networks"
    return Finding(passed=kept == 0 and growth < 0.05, value=value)


def host_waits(setting: Setting) -> Finding:
    """Take training steps and sample while PyTorch raises an error for whatever makes the host wait."""
    device = torch.device(setting.device)
    shape = TINY if setting.tiny else SHAPES["small"]
    state = our_state(shape, "fp16", device, compile=False)
    size = [shape.batch, shape.channels, shape.resolution, shape.resolution]
    images = torch.zeros(size, dtype=torch.uint8, device=device)
    labels = torch.eye(shape.label_dim, device=device)[torch.arange(shape.batch, device=device) % shape.label_dim]
    net = PrepareNetwork(precision="fp16")(state.net.eval(), device)
    noise = torch.randn(size, device=device)
    state.net.train()

    def sample() -> torch.Tensor:
        return edm_sampler(net, noise, labels, num_steps=4)

    with torch.no_grad():
        sample()  # records the graph
    state.step(images, labels)
    with no_waiting(device):
        for _ in range(3):
            state.step(images, labels)
    with no_waiting(device), torch.no_grad():
        sample()
    return Finding(passed=True, value="3 steps and one sampling run without a wait")


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise an error in the block for an operation that makes the host wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def seeds_and_images(setting: Setting) -> Finding:
    """Compare the noise of seeds 0 to 7 with Philox computed on the CPU, and images of the demo in several ways."""
    device = torch.device(setting.device)
    rows: list[Row] = []
    noise_error, classes = 0.0, 0
    num_seeds, shape = (1, [4, 2, 2]) if setting.tiny else (8, [4, 64, 64])
    for seed in range(num_seeds):
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(shape, device=device, generator=generator).cpu().numpy().ravel()
        label = int(torch.randint(1000, [], device=device, generator=generator))
        noise_error = max(noise_error, float(np.abs(noise - noise_of_seed(seed, noise.size)).max()))
        classes += label == class_of_seed(seed, 1000)
    if device.type != "cuda":
        noise_error = 0.0  # a CPU has another generator
    rows.append({"what": "noise, largest difference", "is": f"{noise_error:.0e}"})
    rows.append({"what": "classes drawn as expected", "is": f"{classes} of {num_seeds}"})
    num = 2 if setting.tiny else 8
    options: dict[str, Any] = {"num_steps": 2} if setting.tiny else {}
    usual = PrepareNetwork(precision="fp32")
    expected = images_of(usual, num, device, **options)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "batches of 1": lambda: images_of(usual, num, device, **{**options, "max_batch_size": 1}),
        "plain network, eager": lambda: images_of(in_float32, num, device, **options),
        "guide after the network, not next to it": lambda: one_after_the_other(usual, num, device, **options),
    }
    levels = {}
    for name, way in ways.items():
        levels[name] = int(np.abs(way() - expected).max())
        rows.append({"what": f"images, {name}: gray levels", "is": str(levels[name])})
    value = f"noise to {noise_error:.0e}, images to {max(levels.values())} gray levels"
    return Finding(passed=noise_error < 1e-5 and max(levels.values()) <= 1, value=value, rows=tuple(rows))


def one_after_the_other(prepare: PrepareNetwork, num: int, device: torch.device, **options: Any) -> np.ndarray:
    """Return the images with guide and network on one stream."""

    def call(both: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return both._first(*args), both._second(*args)

    with mock.patch.object(SideBySide, "__call__", call):
        return images_of(prepare, num, device, **options)


def number_formats(setting: Setting) -> Finding:
    """Compare loss and gradient of the shipped network, and images, in each number format with eager float32."""
    device = torch.device(setting.device)
    rows: list[Row] = []
    misses = []
    for error in compare_formats(1 if setting.tiny else 64, device):
        rows.append(error.row())
        if error.gradient > _GRADIENT_BOUNDS[error.mode]:
            misses.append(f"{error.mode}: gradient off by {error.gradient:.1e}")
    num = 2 if setting.tiny else 16
    options: dict[str, Any] = {"num_steps": 2} if setting.tiny else {}
    expected = images_of(in_float32, num, device, **options)
    for row in rows:
        precision: Any = row["format"]
        if precision == "fp16" and precision_note("fp16", device):
            row |= {"images, mean gray levels": "-"}
            continue
        images = images_of(PrepareNetwork(precision=precision), num, device, **options)
        mean = float(np.abs(images - expected).mean())
        row |= {"images, mean gray levels": f"{mean:.3f}"}
        if mean > (0.1 if precision == "fp32" else 2):
            misses.append(f"{precision}: images off by {mean:.2f} gray levels on average")
    summary = "; ".join(misses) or ", ".join(f"{row['format']} {row['gradient']}" for row in rows)
    return Finding(passed=not misses, value=summary, rows=tuple(rows))


def attention_kernels(setting: Setting) -> Finding:
    """Time each attention kernel for the shapes of img512-S, forward and backward, next to the pinned choice."""
    device = torch.device(setting.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shapes = [(2, 2, 16)] if setting.tiny else [(64, 9, 256), (64, 12, 64), (256, 9, 256), (256, 12, 64)]
    kernels: dict[str, SDPBackend | list[SDPBackend]] = {
        "pinned": ATTENTION_KERNELS,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    rows: list[Row] = []
    worst = 0.0
    for num, heads, positions in shapes:
        size = [num, positions, 3, heads, 64]  # as training/fast/ops.py lays q, k and v out
        packed = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        exact = _attention(packed.detach()[:4].double().cpu().requires_grad_())
        times = {}
        row = {"images, heads, positions": f"{num}, {heads}, {positions}"}
        for name, backends in kernels.items():
            try:
                with sdpa_kernel(backends):
                    times[name] = _milliseconds(partial(_attention, packed), device, 2 if setting.tiny else 20)
                    error = max(
                        float((a[:4].double().cpu() - b).abs().max())
                        for a, b in zip(_attention(packed), exact, strict=True)
                    )
                row[name] = f"{times[name]:.3f} ms, {error:.0e}"
            except RuntimeError:
                row[name] = "-"
        rows.append(row)
        worst = max(worst, times["pinned"] / min(times.values()))
    value = f"the pinned kernel takes up to {worst:.2f} times the fastest"
    return Finding(passed=worst <= 1.1 if device.type == "cuda" else None, value=value, rows=tuple(rows))


def _attention(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of attention, and the gradient of its sum of squares, for [N, S, 3, h, 64]."""
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    result = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    (gradient,) = torch.autograd.grad(result, packed, result.detach() * 2)
    return result.detach(), gradient


def _milliseconds(work: Callable[[], Any], device: torch.device, num: int) -> float:
    """Return the time of `work`: the median of five turns of `num` calls, after one that is not counted."""
    times = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        for _ in range(num):
            work()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start) / num)
    return statistics.median(times[1:])
