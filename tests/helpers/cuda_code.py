"""The CUDA code that the compiler generates for a training block, on a machine without a GPU (needs triton).

`generated(sorts)` starts `python -m tests.helpers.cuda_code SORTS`, since what it replaces inside of PyTorch is not
restored. A block is traced with its gradient on fake tensors of the CPU, which have no memory; the graphs are moved to
fake tensors of a GPU; Inductor writes their code, and nothing is built or run. Attention is the CPU's operation.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock


class Sort(NamedTuple):
    """A sort of block: channels of input and output, side of the output in pixels, and the options of `Block`."""

    in_channels: int
    out_channels: int
    side: int
    flavor: str
    resample_mode: str
    attention: bool

    @property
    def in_side(self) -> int:
        """Side of the input in pixels."""
        return {"keep": self.side, "down": self.side * 2, "up": self.side // 2}[self.resample_mode]


class Buffer(NamedTuple):
    """Shape, strides and type of a tensor in generated code."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


_SIZES = r"\(([\d, ]*)\), \(([\d, ]*)\)"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@dataclass(frozen=True)
class Code:
    """Generated code of one graph: its source, and the bytes that it reads and writes by Inductor's own count."""

    source: str
    nbytes: int

    @property
    def launches(self) -> int:
        """Number of kernels generated for this graph that are launched."""
        return len(re.findall(r"^\s+triton_\w+\.run\(", self.source, re.MULTILINE))

    @property
    def libraries(self) -> list[str]:
        """Operations that are left to libraries: convolutions, products, attention."""
        return re.findall(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.(\w+)", self.source, re.MULTILINE)

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """The inputs, and the tensors that the code allocates, by name."""
        allocated = rf"^\s+(\w+) = (?:empty_strided_cuda|rand_strided)\({_SIZES}, .*?dtype=torch\.(\w+)\)"
        allocated = allocated.replace(", .*?dtype=", r"(?:, device='cuda:0')?, (?:dtype=)?")
        return {
            name: Buffer(_numbers(shape), _numbers(stride), dtype)
            for name, shape, stride, dtype in re.findall(allocated, self.source, re.MULTILINE)
        }

    @property
    def checked_strides(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes and strides that the code expects of the results of libraries."""
        expected = rf"assert_size_stride\(buf\d+, {_SIZES}, 'torch"
        return [(_numbers(shape), _numbers(stride)) for shape, stride in re.findall(expected, self.source)]

    @property
    def returned(self) -> list[str]:
        """Names of the buffers that the graph returns, without its inputs."""
        *_, values = re.findall(r"^        return \((.*)\)$", self.source, re.MULTILINE)
        return re.findall(r"\bbuf\d+", values)


def generated(sorts: list[Sort], *, num_images: int, options: dict[str, Any]) -> list[tuple[Code, Code]]:
    """Return the code of forward and backward pass of each sort of block in float16, with Inductor's `options`."""
    assert all(sort.out_channels % 64 == 0 for sort in sorts)
    command = [sys.executable, "-m", "tests.helpers.cuda_code", json.dumps([sorts, num_images, options])]
    settings = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return [(Code(*forward), Code(*backward)) for forward, backward in results]


class _Traced(Exception):
    """Ends a call whose code is known."""


def _stop(*args: Any) -> Any:
    raise _Traced


def _pretend_gpu() -> None:
    """Make PyTorch's compiler believe in an H100, and convolutions in cuDNN's layouts."""
    import torch
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface, get_registered_device_interfaces
    from torch._inductor.fx_passes import joint_graph, post_grad

    card = SimpleNamespace(
        name="NVIDIA H100",
        type="cuda",
        index=0,
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
        gcnArchName="",
        is_integrated=False,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": card,
        "get_device_capability": (9, 0),
        "get_device_name": card.name,
        "get_compute_capability": 90,
        "get_raw_stream": 0,
        "current_stream": SimpleNamespace(cuda_stream=0, stream_id=0),
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "synchronize": None,
        "set_rng_state": None,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    get_registered_device_interfaces()
    for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name, value in answers.items():
            if hasattr(owner, name):
                answer = mock.Mock(return_value=value)
                setattr(owner, name, answer if owner is torch.cuda else staticmethod(answer))

    def layout(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.memory_format:
        last = (t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if any(last) else torch.contiguous_format

    replacements: list[tuple[Any, str, Any]] = [
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8)),
        (torch.utils._triton, "has_triton", lambda: True),
        (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
        # Patterns for CUDA are made by running them.
        (joint_graph, "lazy_init", lambda *args, **kwargs: None),
        (post_grad, "lazy_init", lambda *args, **kwargs: None),
        (torch._C, "_select_conv_backend", lambda *args, **kwargs: torch._C._ConvBackend.Cudnn),  # type: ignore[attr-defined]
        (torch._C, "_conv_determine_backend_memory_format", layout),
    ]
    for owner, name, value in replacements:
        setattr(owner, name, value)


def _graphs(function: Any, args: tuple[Any, ...]) -> list[Any]:
    """Trace `function` and its gradient as the compiler would: two graphs on fake tensors of the CPU."""
    import torch
    import torch._functorch.config
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table

    torch._functorch.config.force_non_lazy_backward_lowering = True
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(_stop)

    def partition(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        _recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **kwargs, compiler="inductor")

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table, partition_fn=partition
    )
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*args)
    except _Traced:
        return graphs
    raise AssertionError("the function ran without being compiled")


def _code(graph: Any, *, is_backward: bool) -> tuple[str, int]:
    """Let Inductor write the code of `graph`, moved to a GPU; return it and its bytes."""
    import torch
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found: list[tuple[str, int]] = []

    def written(lowering: GraphLowering) -> Any:
        source = lowering.codegen()[0]
        found.append((str(getattr(source, "value", source)), lowering.count_bytes()[0]))
        raise _Traced

    fake = FakeTensorMode()
    inputs = []
    with fake:
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                node.meta = {
                    "val": torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
                }
                inputs.append(node.meta["val"])
            elif "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
    with (
        torch._guards.tracing(torch._guards.TracingContext(fake)),
        fake,
        mock.patch.object(GraphLowering, "compile_to_module", written),
    ):
        try:
            compile_fx_inner(graph, inputs, is_backward=is_backward, cudagraphs=False)
        except Exception:
            if not found:
                raise
    return found[0]


def _main(sorts: list[Sort], num_images: int, options: dict[str, Any]) -> None:
    import torch
    import torch._inductor.config
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.set_num_threads(1)
    _pretend_gpu()
    from training.fast.training_network import FastBlock
    from training.networks_edm2 import Block

    results = []
    for sort in sorts:
        with FakeTensorMode(allow_non_fake_inputs=True), torch._inductor.config.patch(options):
            block = Block(
                sort.in_channels,
                sort.out_channels,
                768,
                flavor=sort.flavor,
                resample_mode=sort.resample_mode,
                attention=sort.attention,
            )
            shape = (num_images, sort.in_channels, sort.in_side, sort.in_side)
            x = torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last).requires_grad_()
            # A part of the scales of all blocks, as in the network.
            scale = torch.empty(num_images, 4 * sort.out_channels, dtype=x.dtype)[:, : sort.out_channels]
            graphs = _graphs(FastBlock(block).train().forward, (x, scale.requires_grad_()))
        with torch._inductor.config.patch(options):
            results.append([_code(graph, is_backward=bool(index)) for index, graph in enumerate(graphs)])
    print(json.dumps(results))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _main([Sort(*sort) for sort in given[0]], given[1], given[2])
