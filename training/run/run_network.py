"""The network of a run: made for its data, started from a snapshot, and in the form that a training step calls."""

import itertools
import os
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.errors import ConfigError
from torch_utils.compiling import keep_compiled_code
from torch_utils.distributed import World
from torch_utils.precision import compute_dtype
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.fast.training_network import FastPrecond
from training.networks_edm2 import Precond
from training.own.own_loss import check_loss
from training.own.own_network import OwnForm, OwnNetwork, build_own_network, check_own_network
from training.run.run_data import condition_of, network_shape
from training.run.sharding import shard_network
from training.snapshot import load_snapshot

# Of torch.compile for the training network. Activations are in channels-last order by the network's own hand. The
# compiler's search for layouts would add float32 copies of all convolutions' weights, kept until the backward pass.
COMPILE_OPTIONS: dict[str, Any] = {"layout_optimization": False}

# Gradients that are summed over the processes in one call. Small ones are sent early; large ones take fewer calls.
_BUCKET_MB = 25
_LARGE_BUCKET_MB = 128


def make_network(config: TrainingConfig, dataset: ImageDataset) -> Precond | OwnNetwork:
    """Return a network for the data set, initialized from the run's seed, in training mode, on the CPU."""
    resolution, channels = network_shape(config, dataset)
    label_dim = dataset.label_dim if config.cond else 0
    condition = condition_of(config, dataset)
    cond_channels = 0 if condition is None else condition.channels(channels)
    extra: dict[str, Any] = {"cond_channels": cond_channels} if cond_channels else {}  # snapshots note it only if used
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.network_class is not None:
            shape = {"img_resolution": resolution, "img_channels": channels, "label_dim": label_dim}
            return build_own_network(config.network_class, shape | extra | (config.network_args or {})).train()
        try:
            return Precond(resolution, channels, label_dim, **config.network.arguments(), **extra).train()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def check_network(config: TrainingConfig, dataset: ImageDataset) -> None:
    """Raise ConfigError if no network of this shape can be made for the data set, or if an own one does not fit.

    Allocates no weights, except those of an own network, which is called once.
    """
    if config.network_class is not None:
        net = make_network(config, dataset)
        assert isinstance(net, OwnNetwork)
        check_own_network(net)
        return
    with torch.device("meta"):
        make_network(config, dataset)


def check_own_loss(config: TrainingConfig, dataset: ImageDataset) -> None:
    """Raise ConfigError if a loss of the user's own does not fit the data set."""
    resolution, channels = network_shape(config, dataset)
    condition = condition_of(config, dataset)
    cond_channels = 0 if condition is None else condition.channels(channels)
    check_loss(config, (channels, resolution, resolution), dataset.label_dim if config.cond else 0, cond_channels)


def copy_weights(source: str, net: Precond | OwnNetwork, *, partial: bool) -> tuple[list[str], bool]:
    """Start `net` from the weights of the snapshot `source`.

    Returns (names of tensors left at initialization, whether conditioning channels were added). Added channels start at
    zero, which leaves weight norms, and so the network's output, unchanged. Tensors that the snapshot lacks or has in
    another shape raise ConfigError, unless `partial` leaves them at initialization.
    """
    own_networks = [net.name] if isinstance(net, OwnNetwork) else []
    origin = load_snapshot(source, own_networks=own_networks).net
    theirs = origin.state_dict()
    ours = net.state_dict()
    stem = "" if isinstance(net, OwnNetwork) else f"unet.enc.{next(iter(net.unet.enc))}.weight"
    added = 0
    if net.cond_channels and not origin.cond_channels and stem in theirs:
        weight = theirs[stem]
        added = ours[stem].shape[1] - weight.shape[1]
        if added == net.cond_channels:
            theirs[stem] = torch.cat([weight, weight.new_zeros([weight.shape[0], added, *weight.shape[2:]])], dim=1)
    misfits = [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if misfits and not partial:
        listing = ", ".join(f"{n} {shape_text(ours[n])} here, {shape_text(theirs.get(n))} there" for n in misfits)
        raise ConfigError(f"--init={source} does not fit this network: {listing}; --init-partial leaves these fresh")
    if len(misfits) == len(ours):
        raise ConfigError(f"--init={source} has no tensor that fits this network")
    fitting = {name: theirs[name].to(value) for name, value in ours.items() if name not in misfits}
    net.load_state_dict(fitting, strict=False)
    return misfits, bool(net.cond_channels) and added == net.cond_channels


def shape_text(tensor: torch.Tensor | None) -> str:
    """Return the shape of a tensor, as in 3x8."""
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"


def make_replica(net: Precond | OwnNetwork, config: TrainingConfig, world: World) -> torch.nn.Module:
    """Return the network that the loss calls in place of `net`: fast, compiled, tied to the other processes.

    It computes with the parameters of `net`. With more than one process, its backward pass leaves the mean gradients of
    all processes in them; for sharded parameters see training/run/sharding.py.
    """
    device, bucket_mb = world.device, _BUCKET_MB
    dtype = compute_dtype(config.network.precision, device)
    replica: OwnForm | FastPrecond
    if isinstance(net, OwnNetwork):
        replica = OwnForm(net, dtype=dtype)
    else:
        replica = FastPrecond(net, dtype=dtype, recompute=config.recompute)
    if config.compiles_on(device):
        keep_compiled_code()
        # The compiler's own way to cut the network at full buckets would cut it inside blocks.
        torch._dynamo.config.optimize_ddp = False
        if isinstance(replica, OwnForm):  # of unknown parts, which may have code that cannot be compiled between them
            replica.compile(dynamic=False)
        elif compiles_as_one(config, world):
            replica.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
            bucket_mb = _LARGE_BUCKET_MB
        else:
            _compile_blocks(replica)
    if config.shards_over(world.size):
        shard_network(replica, world, group=config.group_of(world.size))
    if world.size == 1 or config.shards_over(world.size):
        return replica
    with warnings.catch_warnings():
        # The argument that replaces it, forward_sync_buffers, needs PyTorch 2.13.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        one_round = config.share_of(world.size)[1] == 1
        return DistributedDataParallel(
            replica,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
            # A static graph cannot leave the exchange out of some rounds of accumulation.
            static_graph=one_round,
            # Parts of the user's may leave parameters out. A static graph learns by itself which.
            find_unused_parameters=config.has_own_parts and not one_round,
        )


def compiles_as_one(config: TrainingConfig, world: World) -> bool:
    """Return whether a compiled network is one graph, rather than a graph for each block.

    One graph fuses across blocks and costs the host less, but its gradients are all sent at its end. That pays where
    sending takes little of a step: between GPUs of one machine that reach each other's memory, as over NVLink. A
    sharded network gathers and frees its weights block by block.
    """
    if world.size == 1:
        return True
    return not config.shards_over(world.size) and world.device.type == "cuda" and _share_memory(world.size)


def _share_memory(num_ranks: int) -> bool:
    """Return whether all processes are on this machine, each with a GPU that reaches the memory of all others."""
    if os.environ.get("LOCAL_WORLD_SIZE") != str(num_ranks) or torch.cuda.device_count() < num_ranks:
        return False
    pairs = itertools.permutations(range(num_ranks), 2)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)


def _compile_blocks(replica: FastPrecond) -> None:
    """Compile each block on its own, whole; blocks of one shape share code.

    Gradients of a block are sent while those of the previous one are computed, and rows of weights come and go between
    blocks. A network compiled as one has all its gradients at the end.
    """
    blocks = [*replica.enc, *replica.dec]
    options: Any = torch._dynamo.config
    # Every kind of block is another version of the same code. The second name is from before PyTorch 2.7.
    limit = "recompile_limit" if hasattr(options, "recompile_limit") else "cache_size_limit"
    setattr(options, limit, max(getattr(options, limit), 2 * len(blocks)))
    for block in blocks:
        # Not block.compile(): that would include the hooks that gather the rows.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
