"""The network as a training step calls it: in its fast form, compiled, and tied to the other processes."""

import os
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.download import make_cache_dir_path
from torch_utils.distributed import World
from torch_utils.precision import compute_dtype
from training.config import TrainingConfig
from training.fast_network import FastPrecond
from training.networks_edm2 import Precond


def make_replica(net: Precond, config: TrainingConfig, world: World) -> torch.nn.Module:
    """What stands for `net` in the loss, computing with `net`'s own parameters.

    With more than one process its backward pass leaves the mean of all processes' gradients in them.
    """
    device = world.device
    replica: torch.nn.Module = FastPrecond(
        net, dtype=compute_dtype(config.network.precision, device), recompute=config.recompute
    )
    compiled = config.compiles_on(device)
    if world.size > 1:
        with warnings.catch_warnings():
            # Its successor does not exist before PyTorch 2.13.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            replica = DistributedDataParallel(
                replica,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Not when compiled, where the compiler splits its graph at the buckets, nor with rounds of
                # accumulation, which a static graph cannot leave out of the exchange.
                static_graph=not compiled and config.share_of(world.size)[1] == 1,
            )
    if compiled:
        keep_compiled_code()
        replica.compile(fullgraph=world.size == 1, dynamic=False)
    return replica


def keep_compiled_code() -> None:
    """Let compiled kernels be found again by later runs: PyTorch's own place is lost with the machine's /tmp."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", make_cache_dir_path("compiled"))
