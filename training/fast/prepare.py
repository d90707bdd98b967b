"""What happens to a network between its file and the sampler: laid out for inference, in a precision, compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torch_utils.cuda.compilation import compiled
from torch_utils.cuda.static_call import StaticCall
from torch_utils.precision import Precision, compute_dtype, numerics
from training.fast.inference_network import Evaluate, InferencePrecond
from training.networks_edm2 import Block, Precond


@dataclass(frozen=True, kw_only=True)
class PrepareNetwork:
    """The `prepare` of `generate_images`. Networks of other kinds than `Precond` stay as they are."""

    precision: Precision | None = None  # None = as published: float16 on CUDA where the network says so, else float32
    compile: bool = False
    announce: Callable[[str], None] | None = None  # is told what a user should know

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the images, in JSON's types."""
        return {"precision": self.precision, "compile": self.compile}

    def __call__(self, net: Any, device: torch.device) -> Any:
        """`net`, on `device`, ready to sample from."""
        if isinstance(net, InferencePrecond):
            return net
        if type(net) is not Precond:
            if self.announce is not None and (self.precision is not None or self.compile):
                self.announce(
                    f"{type(net).__name__} is another kind of network: it runs in its own precision, as it is."
                )
            return net
        on_gpu = device.type == "cuda"
        recorded = on_gpu and _is_recordable(net)
        return InferencePrecond(
            net,
            dtype=_dtype(net, self.precision, device),
            pack=not self.compile,
            through=partial(self._accelerate, recorded=recorded),
            fixed_batch=recorded or self.compile,
        )

    def _accelerate(self, evaluate: Evaluate, *, recorded: bool) -> Evaluate:
        call: Evaluate = compiled(evaluate, self.announce) if self.compile else evaluate
        call = _in_tf32(call) if self.precision == "tf32" else call
        return StaticCall(call) if recorded else call


def _in_tf32(evaluate: Evaluate) -> Evaluate:
    """`evaluate` with TF32 allowed; not so the decoder and the detectors of metrics beside it."""

    def call(*args: torch.Tensor | None) -> torch.Tensor:
        with numerics(cudnn_benchmark=torch.backends.cudnn.benchmark, precision="tf32"):
            return evaluate(*args)

    return call


def _dtype(net: Precond, precision: Precision | None, device: torch.device) -> torch.dtype:
    if precision is None:
        precision = "fp16" if net.use_fp16 else "fp32"
    return compute_dtype(precision, device)


def _is_recordable(net: Precond) -> bool:
    """Whether an evaluation copies nothing from the host, which a CUDA graph could not: resampling with a filter of its
    own does."""
    blocks = [module for module in net.modules() if isinstance(module, Block) and module.resample_mode != "keep"]
    return all(len(block.resample_filter) == 2 and len(set(block.resample_filter)) == 1 for block in blocks)
