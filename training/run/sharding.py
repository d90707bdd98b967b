"""One network over all processes (FSDP2): each keeps some rows of every weight, of its moments and of its averages.

Before a block computes, its rows are gathered from all processes, in float32, since rows are normalized in float32
before they are rounded to the number format of the activations; its gradients are averaged and scattered in float32
too. So a sharded run computes what one without sharding does (tests/training/run/test_sharding.py). docs/scaling.md
has the traffic and the memory.

Everything between the passes over the network (forced normalization, Adam, averages) acts on single rows or elements.
It acts on the local module: a network of the same names that has this process's rows as its parameters.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from torch_utils.checkpoints.stored import check_same, flatten
from torch_utils.distributed import World
from training.fast.training_network import FastPrecond
from training.networks_edm2 import Precond
from training.own.own_network import OwnForm, OwnNetwork, remade


def shard_network(replica: FastPrecond | OwnForm, world: World, *, group: int) -> None:
    """Spread the weights of `replica`, and so of its `net`, over groups of `group` consecutive processes.

    All processes must have the same weights. With more than one group, every group has a copy, and gradients are
    averaged over all (HSDP).

    The parameters of `net` become DTensors on the run's device. Scalars (gains) stay whole in every process, since
    `fully_shard` accepts none: see `scatter_gradients`. The embedding layers of all blocks, which the network applies
    in one product, are gathered with what belongs to no block. An own network is one block.
    """
    # Imported here: most runs do not need it, and it takes a third as long as importing torch.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if group == world.size:
        mesh = init_device_mesh(world.device.type, (group,))
    else:
        names = ("copies", "parts")
        mesh = init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=names)
    for param in replica.parameters():
        if param.ndim == 0:
            param.data = param.data.to(world.device)
    replica.register_forward_hook(_with_own_memory)
    for block in [] if isinstance(replica, OwnForm) else [*replica.enc, *replica.dec]:
        with _hidden(block, lambda name, param: _left_whole(param) or name == "block.emb_linear.weight"):
            fully_shard(block, mesh=mesh)
    with _hidden(replica, lambda name, param: _left_whole(param)):
        fully_shard(replica, mesh=mesh)


def _with_own_memory(module: nn.Module, args: Any, output: Any) -> Any:
    """Return the results without views, for which FSDP2 warns that its hooks may be lost."""
    return tuple(x.clone() if x._is_view() else x for x in output) if isinstance(output, tuple) else output


def _left_whole(param: torch.Tensor) -> bool:
    """Return whether `fully_shard` must skip a parameter.

    These are scalars (`ignored_params` needs PyTorch > 2.6) and parameters already sharded, which are reachable a
    second time through the fast network's reference to the original.
    """
    return param.ndim == 0 or _is_spread(param)


@contextlib.contextmanager
def _hidden(module: nn.Module, which: Callable[[str, torch.Tensor], bool]) -> Iterator[None]:
    """Temporarily detach the parameters for which which(name, parameter) is true."""
    hidden = [
        (owner, name, param)
        for prefix, owner in module.named_modules()
        for name, param in owner._parameters.items()
        if param is not None and which(f"{prefix}.{name}", param)
    ]
    for owner, name, _ in hidden:
        owner._parameters[name] = None
    try:
        yield
    finally:
        for owner, name, param in hidden:
            owner._parameters[name] = param


def local_module(net: Precond | OwnNetwork) -> Precond | OwnNetwork:
    """Return a network whose parameters are this process's rows of a sharded `net`, in the same memory.

    It is never called: it holds what Adam, normalization and averages act on.
    """
    local = _without_content(net)
    rows: dict[int, nn.Parameter] = {}  # by the parameter, which an own network may use under several names
    for name, param in net.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        if id(param) not in rows:
            rows[id(param)] = nn.Parameter(_rows(param.detach()), requires_grad=param.requires_grad)
        local.get_submodule(owner)._parameters[attribute] = rows[id(param)]
    for name, buffer in net.named_buffers():
        owner, _, attribute = name.rpartition(".")
        local.get_submodule(owner)._buffers[attribute] = buffer
    return local.train()


@torch.no_grad()
def scatter_gradients(net: nn.Module, local: nn.Module, world: World) -> None:
    """After a backward pass, move the gradients of a sharded `net` to its local module.

    Gradients of rows are already averaged over the processes. Those of scalars are averaged here, in one sum for all.
    """
    pairs = list(zip(net.parameters(), local.parameters(), strict=True))
    scalars = [param.grad for param, _ in pairs if param.ndim == 0 and param.grad is not None]
    if scalars:
        means = world.all_reduce_sum(torch.stack(scalars)) / world.size
        torch._foreach_copy_(scalars, list(means.unbind()))
    for param, rows in pairs:
        # The first forward pass may have moved rows that need padding to be even over the processes.
        if _rows(param.detach()).data_ptr() != rows.data_ptr():
            rows.data = _rows(param.detach())
        rows.grad = None if param.grad is None else _rows(param.grad)
        param.grad = None


def whole_like(rows: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return rows of the sharded `param` as a DTensor of its shape; `rows` itself if `param` is not sharded."""
    if not _is_spread(param):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(rows.detach(), *_layout(param), run_check=False, shape=param.shape, stride=param.stride())


@torch.no_grad()
def gathered(
    local: nn.Module, net: Precond | OwnNetwork, world: World, *, main_only: bool = False
) -> Precond | OwnNetwork:
    """Return a whole network from the rows in the local modules, in float16 as in files. Every process calls this.

    With `main_only` it is in the memory of the main process's host and has no content elsewhere. It is gathered tensor
    by tensor, so that a GPU holds at most one whole tensor at a time.
    """
    like = dict(net.named_parameters(remove_duplicate=False))
    tensors = {}
    for name, value in local.state_dict().items():
        value = value.to(torch.float16)
        if name in like:
            value = _full(whole_like(value, like[name]))
        if not main_only:
            tensors[name] = value
        elif world.is_main:
            tensors[name] = value.cpu()
    result = _without_content(net).eval().requires_grad_(False)
    if tensors:
        result.load_state_dict(tensors, assign=True)
    return result


def _without_content(net: Any) -> Precond | OwnNetwork:
    """Return a network like `net` whose tensors are to be replaced: without values, unless it is the user's own."""
    if isinstance(net, OwnNetwork):
        return remade(net)
    with torch.device("meta"):
        return Precond(*net._init_args, **net._init_kwargs)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = cast(Any, tensor).to_local() if _is_spread(tensor) else tensor
    return rows


def _full(tensor: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = cast(Any, tensor).full_tensor() if _is_spread(tensor) else tensor
    return whole


def sharded_state(data: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """Return the contents of a checkpoint: `data` of the local module, with its rows as DTensors like those of `net`.

    `data` is as in TrainingState.state_dict(). Nothing is copied.
    """
    params = dict(net.named_parameters(remove_duplicate=False))
    moments = data["optimizer"]["state"]

    def named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: whole_like(t, params[n]) if n in params else t for n, t in tensors.items()}

    state = {
        index: {k: whole_like(v, param) if v.ndim else v for k, v in moments[index].items()}
        for index, param in enumerate(net.parameters())
        if index in moments
    }
    return {
        **data,
        "net": named(data["net"]),
        "optimizer": {**data["optimizer"], "state": state},
        "ema": {**data["ema"], "emas": [named(tensors) for tensors in data["ema"]["emas"]]},
    }


@torch.no_grad()
def copy_rows(data: Any, target: Any) -> None:
    """Copy this process's rows of the whole tensors in `data` into the tensors of the same names in `target`.

    Raises ValueError if names or shapes differ.
    """
    to, source = ({k: v for k, v in flatten(d).items() if isinstance(v, torch.Tensor)} for d in (target, data))
    check_same(source, to)
    for name, tensor in to.items():
        whole = source[name]
        if _is_spread(tensor):
            _rows(tensor).copy_(_rows_of(whole, tensor))
        else:
            tensor.copy_(whole)


def _rows_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a whole tensor, if it were spread as `like` is."""
    mesh, placements = _layout(like)
    (axis,) = (index for index, placement in enumerate(placements) if placement.is_shard())
    per_rank, rank = -(-len(whole) // mesh.size(axis)), mesh.get_local_rank(axis)
    return whole[rank * per_rank : (rank + 1) * per_rank]


def _layout(tensor: Any) -> tuple[Any, Any]:
    """Return the processes that a tensor is spread over, and how."""
    return tensor.device_mesh, tensor.placements


def _is_spread(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing that class."""
    return hasattr(tensor, "to_local")
