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
from training.fast.training_network import FastPrecond
from training.networks_edm2 import Precond
from training.run.sharding import shard_network


def make_replica(net: Precond, config: TrainingConfig, world: World) -> torch.nn.Module:
    """What stands for `net` in the loss, computing with `net`'s own parameters.

    With more than one process its backward pass leaves the mean of all processes' gradients in them; where they are
    sharded, see training/run/sharding.py.
    """
    device = world.device
    replica = FastPrecond(net, dtype=compute_dtype(config.network.precision, device), recompute=config.recompute)
    if config.compiles_on(device):
        keep_compiled_code()
        if world.size == 1:
            replica.compile(fullgraph=True, dynamic=False)
        else:
            compile_blocks(replica)
    if config.shards_over(world.size):
        shard_network(replica, world, group=config.group_of(world.size))
    if world.size == 1 or config.shards_over(world.size):
        return replica
    with warnings.catch_warnings():
        # Its successor does not exist before PyTorch 2.13.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            replica,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Not with rounds of accumulation, which a static graph cannot leave out of the exchange.
            static_graph=config.share_of(world.size)[1] == 1,
        )


def compile_blocks(replica: FastPrecond) -> None:
    """Compile each block on its own, whole; blocks of one shape share code.

    Gradients of a block are sent while those of the one before are computed, and rows of weights come and go between
    blocks. A network that is compiled as one has all its gradients at the end. The compiler's own way around that cuts
    the network wherever 25 MB of weights are full, which is inside of blocks, so it is switched off.
    """
    blocks = [*replica.enc, *replica.dec]
    options: Any = torch._dynamo.config
    options.optimize_ddp = False
    # Every kind of block is another version of the same code. The second name is from before PyTorch 2.7.
    limit = "recompile_limit" if hasattr(options, "recompile_limit") else "cache_size_limit"
    setattr(options, limit, max(getattr(options, limit), 2 * len(blocks)))
    for block in blocks:
        # Not block.compile(), which would take in the hooks that gather the rows.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def keep_compiled_code() -> None:
    """Let compiled kernels be found again by later runs: PyTorch's own place is lost with the machine's /tmp."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", make_cache_dir_path("compiled"))
