"""Prepare a loaded network for sampling: the inference network, in a precision, compiled or recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torch_utils.cuda import StaticCall, compiled
from torch_utils.precision import compute_dtype, numerics
from torch_utils.precision_names import Precision
from training.fast.inference_network import Evaluate, InferencePrecond
from training.networks_edm2 import Block, Precond
from training.own.own_network import OwnForm, OwnNetwork, prepared_own_network


@dataclass(frozen=True, kw_only=True)
class PrepareNetwork:
    """The `prepare` argument of `generate_images`. Only a `Precond` and an `OwnNetwork` change."""

    precision: Precision | None = None  # None = as published: float16 on CUDA if the network has use_fp16, else float32
    compile: bool = False
    automatic: bool = False  # whether `compile` was chosen for the number of images
    announce: Callable[[str], None] | None = None  # called with notices for the user

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change images, in JSON types.

        Automatic compilation is not among them, so that --skip-existing takes images of more seeds or processes.
        """
        return {"precision": self.precision, "compile": self.compile and not self.automatic}

    def __call__(self, net: Any, device: torch.device) -> Any:
        """Return `net`, which is on `device`, in the form for sampling."""
        if isinstance(net, InferencePrecond | OwnForm):
            return net
        if isinstance(net, OwnNetwork):
            through = partial(self._accelerate, recorded=False, fullgraph=False)
            return prepared_own_network(net, dtype=_dtype(net, self.precision, device), through=through)
        if type(net) is not Precond:
            if self.announce is not None and (self.precision is not None or self.compile):
                self.announce(f"{type(net).__name__} is not a Precond: it runs unchanged, in its own precision.")
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

    def _accelerate(self, evaluate: Evaluate, *, recorded: bool, fullgraph: bool = True) -> Evaluate:
        call: Evaluate = compiled(evaluate, self.announce, fullgraph=fullgraph) if self.compile else evaluate
        call = _in_tf32(call) if self.precision == "tf32" else call
        return StaticCall(call) if recorded else call


def _in_tf32(evaluate: Evaluate) -> Evaluate:
    """Wrap `evaluate` to allow TF32 in it, but not in the decoder and the detectors of metrics that run in between."""

    def call(*args: torch.Tensor | None) -> torch.Tensor:
        with numerics(cudnn_benchmark=torch.backends.cudnn.benchmark, precision="tf32"):
            return evaluate(*args)

    return call


def _dtype(net: Precond | OwnNetwork, precision: Precision | None, device: torch.device) -> torch.dtype:
    if precision is None:
        precision = "fp16" if net.use_fp16 else "fp32"
    return compute_dtype(precision, device)


def _is_recordable(net: Precond) -> bool:
    """Return True if a CUDA graph can record `net`: a resampling filter that is not the default is copied from the
    host in every evaluation, which a graph cannot do."""
    blocks = [module for module in net.modules() if isinstance(module, Block) and module.resample_mode != "keep"]
    return all(len(block.resample_filter) == 2 and len(set(block.resample_filter)) == 1 for block in blocks)
