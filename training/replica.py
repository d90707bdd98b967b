"""The network as a training step calls it: in its fast form, compiled, and tied to the other processes."""

import os
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.download import make_cache_dir_path
from torch_utils.distributed import World
from torch_utils.precision import compute_dtype
from training.config import TrainingConfig
from training.fast_network import FastPrecond
from training.networks_edm2 import Precond
from training.sharding import shard_network


def make_replica(net: Precond, config: TrainingConfig, world: World) -> torch.nn.Module:
    """What stands for `net` in the loss, computing with `net`'s own parameters.

    With more than one process its backward pass leaves the mean of all processes' gradients in them; where they are
    sharded, see training/sharding.py.
    """
    device = world.device
    replica = FastPrecond(net, dtype=compute_dtype(config.network.precision, device), recompute=config.recompute)
    compiled = config.compiles_on(device)
    if compiled:
        keep_compiled_code()
    if config.shards_over(world.size):
        if compiled:
            compile_blocks(replica)
        shard_network(replica, world)
        return replica
    if compiled:
        replica.compile(fullgraph=True, dynamic=False)
    if world.size == 1:
        return replica
    with warnings.catch_warnings():
        # Its successor does not exist before PyTorch 2.13.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            replica,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Not when compiled, where the compiler splits its graph at the buckets, nor with rounds of accumulation,
            # which a static graph cannot leave out of the exchange.
            static_graph=not compiled and config.share_of(world.size)[1] == 1,
        )


def compile_blocks(replica: FastPrecond) -> None:
    """Compile each block on its own: between blocks, rows of weights come and go. Blocks of one shape share code."""
    blocks = [*replica.enc, *replica.dec]
    options: Any = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # the second is the first before PyTorch 2.7
        if hasattr(options, name):
            setattr(options, name, max(getattr(options, name), 2 * len(blocks)))
            break
    for block in blocks:
        # Not block.compile(), which would take in the hooks that gather the rows.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def keep_compiled_code() -> None:
    """Let compiled kernels be found again by later runs: PyTorch's own place is lost with the machine's /tmp."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", make_cache_dir_path("compiled"))
