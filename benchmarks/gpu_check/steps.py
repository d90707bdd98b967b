"""Checks of the speed of training steps: compiled, against the oracle, and their convolutions."""

import dataclasses
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.records import Finding, Row, Setting
from benchmarks.sample import IMG512_S, is_matrix_work
from benchmarks.train import SHAPES, TINY, Shape, Way, matrix_rate, our_state, wait, ways_of
from torch_utils.cuda import keep_compiled_code
from torch_utils.precision import numerics
from training.config import TrainingConfig
from training.flops import count_flops
from training.networks_edm2 import MPConv, Precond
from training.run.run_network import make_network

_WHOLE_SEC = 420.0  # to compile img512-S as a whole on a machine that never did (an estimate)
TINY_NET = {"img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}  # fmt: skip


def img512_s(setting: Setting, *, whole: bool, batch: int) -> Shape:
    """Return the shape to train: img512-S as a whole, or its two largest levels, which compile in a quarter."""
    if setting.tiny:
        return dataclasses.replace(TINY, batch=batch)
    shape = dataclasses.replace(SHAPES["s"], batch=batch)
    if whole:
        return shape
    network = dataclasses.replace(shape.network, num_blocks=1, channel_mult=(1, 2), attn_resolutions=(32,))
    return dataclasses.replace(shape, name=f"two levels of {shape.name}", network=network)


def matrix_operations(shape: Shape) -> float:
    """Return the operations of a step on the batch: those of convolutions, products and attention."""
    with torch.device("meta"):
        net = make_network(TrainingConfig(data="", network=shape.network), shape.dataset())
    return 2.0 * 3 * count_flops(net).matrix_flops * shape.batch


def compiled_marker() -> Path:
    """Return the file that says that this PyTorch compiled img512-S as a whole for this card before."""
    keep_compiled_code()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"gpu_check-{torch.__version__}-{card}".replace(" ", "_").replace("/", "_")
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name


def seconds_of(work: Callable[[], Any], device: torch.device, num: int) -> tuple[float, float]:
    """Return the seconds of `work` and those of the host alone, which issues it: medians of three turns of `num`."""
    whole, host = [], []
    for _ in range(3):
        wait(device)
        start = time.perf_counter()
        for _ in range(num):
            work()
        host.append((time.perf_counter() - start) / num)
        wait(device)
        whole.append((time.perf_counter() - start) / num)
    return statistics.median(whole), statistics.median(host)


def training_batch(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of a batch."""
    size = [shape.batch, shape.channels, shape.resolution, shape.resolution]
    images = torch.randint(0, 256, size, device=device).to(torch.uint8)
    return images, torch.eye(shape.label_dim, device=device)[torch.arange(shape.batch, device=device) % shape.label_dim]


def compiled_step(setting: Setting) -> Finding:
    """Compile a training step; count graphs and kernels; compute the gradients of one batch twice."""
    device = torch.device(setting.device)
    shape = img512_s(setting, whole=False, batch=4 if setting.tiny else 32)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with numerics():
        start = time.perf_counter()
        state = our_state(shape, "fp16", device, compile=not setting.tiny)
        images, labels = training_batch(shape, device)
        state.step(images, labels)
        wait(device)
        compile_sec = time.perf_counter() - start
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"].get("unique_graphs", 0)
        step_sec, host_sec = seconds_of(lambda: state.step(images, labels), device, 1 if setting.tiny else 10)
        kernels, share = kernels_of(lambda: state.step(images, labels), device)
        differing = gradients_that_differ(state, images, labels)
    rows = (
        {"what": "first step, s", "is": f"{compile_sec:.0f}"},
        {"what": "graphs, graph breaks", "is": f"{graphs}, {breaks}"},
        {"what": "a step, ms", "is": f"{1e3 * step_sec:.1f}"},
        {"what": "of which the host issues work, ms", "is": f"{1e3 * host_sec:.1f}"},
        {"what": "kernels a step", "is": str(kernels)},
        {"what": "matrix work, share of the kernels' time", "is": f"{share:.0%}"},
        {"what": "weights whose gradient differs the second time", "is": str(differing)},
    )
    value = f"{breaks} breaks, {1e3 * step_sec:.1f} ms a step, {kernels} kernels, {differing} gradients differ"
    return Finding(passed=breaks == 0 and differing == 0, value=value, rows=rows)


def gradients_that_differ(state: Any, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Return for how many parameters the gradient of the same batch with the same noise has other bits next time."""
    gradients = []
    for _ in range(2):
        state.optimizer.zero_grad(set_to_none=True)
        state.accumulate_gradients(images, labels)
        gradients.append([param.grad.clone() for param in state.local.parameters() if param.grad is not None])
    state.optimizer.zero_grad(set_to_none=True)
    return sum(not torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def kernels_of(work: Callable[[], Any], device: torch.device) -> tuple[int, float]:
    """Return the number of kernels of `work` (on a CPU of operations), and the share of matrix work of their time."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        work()
        wait(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = recorded.key_averages()
    if on_gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, key) for event in events)
    matrix = sum(getattr(event, key) for event in events if is_matrix_work(event.key))
    return sum(event.count for event in events), matrix / max(total, 1e-9)


def training(setting: Setting) -> Iterator[Finding]:
    """Time steps at 32 and 256 images against the matrix rate, and against the oracle at 32.

    The network is whole if it was compiled here before or there is time to; else it has two levels, whose mix of work
    is another: then the shares are numbers without a bound.
    """
    device = torch.device(setting.device)
    marker = compiled_marker()
    whole = not setting.tiny and (marker.exists() or setting.left() > _WHOLE_SEC)
    bounds = {32: 0.45, 256: 0.53}
    rows: list[Row] = []
    is_fast = True
    with numerics():
        rate = matrix_rate(torch.float16 if device.type == "cuda" else torch.float32, device)
        for batch, way in training_ways(setting, device, whole=whole):
            shape = img512_s(setting, whole=whole, batch=batch)
            way.open()
            step_sec = min(way(1 if setting.tiny else 5) for _ in range(3))
            share = matrix_operations(shape) / step_sec / rate
            is_fast &= way.name.startswith("plain") or share >= bounds.get(batch, 0)
            rows.append(
                {
                    "network": shape.name,
                    "way": way.name,
                    "images": str(batch),
                    "ms a step": f"{1e3 * step_sec:.1f}",
                    "images/s": f"{batch / step_sec:.0f}",
                    "of the matrix rate": f"{share:.0%}",
                    "memory, GiB": f"{way.memory / 2**30:.1f}",
                }
            )
            way.close()
            value = "; ".join(f"{row['way']}, {row['images']} images: {row['of the matrix rate']}" for row in rows)
            yield Finding(passed=is_fast if whole else None, value=value, rows=tuple(rows))
    if whole:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def training_ways(setting: Setting, device: torch.device, *, whole: bool) -> Iterator[tuple[int, Way]]:
    """Yield the number of images and the way to train on them: ours, then the oracle's at the smaller number."""
    for batch in [1] if setting.tiny else [32, 256]:
        shape = img512_s(setting, whole=whole, batch=batch)
        compiled = not setting.tiny
        plain, _ = ways_of(shape, ["fp16"], device, compiled=compiled, recompute=False)
        yield batch, Way("ours, fp16", plain.dtype, device, partial(our_step, shape, device, compiled=compiled))
        if batch <= 32:
            yield batch, plain


def our_step(shape: Shape, device: torch.device, *, compiled: bool) -> Callable[[], Any]:
    """Return a training step. That of `ways_of` compiles once more, for a comparison of results."""
    state = our_state(shape, "fp16", device, compile=compiled)
    return partial(state.step, *training_batch(shape, device))


def conv_shapes(net: Precond) -> list[tuple[int, int, int, int, int]]:
    """Return (inputs, outputs, kernel, resolution, how many) of the convolutions of `net`, most work first."""
    found: Counter[tuple[int, int, int, int]] = Counter()

    def see(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
        assert isinstance(module, MPConv)
        outputs, inputs, kernel, _ = module.weight.shape
        found[inputs, outputs, kernel, args[0].shape[-1]] += 1

    convs = [module for module in net.modules() if isinstance(module, MPConv) and module.weight.ndim == 4]
    hooks = [module.register_forward_hook(see) for module in convs]
    count_flops(net)
    for hook in hooks:
        hook.remove()
    rows = [(*shape, num) for shape, num in found.items()]
    return sorted(rows, key=lambda row: -row[0] * row[1] * row[2] ** 2 * row[3] ** 2 * row[4])


def convolutions(setting: Setting) -> Finding:
    """Time forward pass and both gradients of the twelve largest convolutions, with and without cuDNN's search."""
    device = torch.device(setting.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        net = Precond(**(TINY_NET if setting.tiny else IMG512_S))
    batch = 2 if setting.tiny else 64
    rate = matrix_rate(dtype, device)
    rows: list[Row] = []
    shares = []
    for inputs, outputs, kernel, resolution, num in conv_shapes(net)[: 2 if setting.tiny else 12]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        x, grad = (torch.randn([batch, c, resolution, resolution], **options) for c in (inputs, outputs))
        w = torch.randn([outputs, inputs, kernel, kernel], **options)
        x, grad, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad, w))
        operations = 2.0 * batch * inputs * outputs * kernel**2 * resolution**2
        row = {"convolution": f"{num} x {inputs} to {outputs}, {kernel}x{kernel}, at {resolution}x{resolution}"}
        for benchmark in (True, False):
            with numerics(cudnn_benchmark=benchmark):
                for name, work in conv_works(x, grad, w).items():
                    work()
                    sec = min(seconds_of(work, device, 1 if setting.tiny else 5)[0] for _ in range(2))
                    row[f"{name}{'' if benchmark else ', no search'}"] = f"{operations / sec / rate:.0%}"
                    if benchmark:
                        shares.append(operations / sec / rate)
        rows.append(row)
        if setting.left() < 5:
            break
    value = f"{min(shares):.0%} to {max(shares):.0%} of the matrix rate, median {statistics.median(shares):.0%}"
    return Finding(passed=None, value=value, rows=tuple(rows))


def conv_works(x: torch.Tensor, grad: torch.Tensor, w: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the three passes of a convolution by name."""
    pad = [w.shape[-1] // 2] * 2

    def backward(mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(grad, x, w, None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, padding=pad),
        "input gradient": lambda: backward([True, False, False]),
        "weight gradient": lambda: backward([False, True, False]),
    }
