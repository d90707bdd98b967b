"""One network over all processes (FSDP2): each keeps some rows of every weight, of its moments and of its averages.

Before a block computes, its rows are gathered from all processes, in float32, since rows are normalized in float32
before they are rounded to the number format of the activations; its gradients are averaged and scattered in float32
too. So a sharded run computes what one without sharding does (tests/training/run/test_sharding.py). docs/scaling.md
has what is
sent, and what it takes of memory.

Everything between the passes over the network (forced normalization, Adam, averages) acts on rows alone or element by
element. It is done on the `part`: a network of the same names that has this process's rows as its parameters.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from torch_utils.checkpoints.stored_tensor import check_same, flatten
from torch_utils.distributed import World
from training.fast.training_network import FastPrecond
from training.networks_edm2 import Precond


def shard_network(replica: FastPrecond, world: World, *, group: int) -> None:
    """Spread the weights of `replica`, and so of its `net`, over `group` processes in a row, which must have the same.

    Where there are more processes, every such group has a copy, and gradients are averaged over all (HSDP).

    The parameters of `net` become DTensors; they are on the run's device then, whatever they were on before. Scalars
    (gains) stay whole in every process, since `fully_shard` takes none: see `hand_over_gradients`.
    """
    # Imported here: most runs do without, and it takes a third of the time that torch itself takes.
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
    for module in (*replica.enc, *replica.dec, replica):
        with _sharded_or_scalar_hidden(module):
            fully_shard(module, mesh=mesh)


def _with_own_memory(module: nn.Module, args: Any, output: Any) -> Any:
    """The results without views, on which FSDP2 warns that its hooks could get lost."""
    return tuple(x.clone() if x._is_view() else x for x in output) if isinstance(output, tuple) else output


@contextlib.contextmanager
def _sharded_or_scalar_hidden(module: nn.Module) -> Iterator[None]:
    """Keep parameters that `fully_shard` must not see out of its sight.

    Scalars, for which its argument `ignored_params` is newer than PyTorch 2.6, and those that belong to a part which
    was sharded before, which it would find again by way of the network that the fast one stands for.
    """
    hidden = []
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is not None and (param.ndim == 0 or _is_spread(param)):
                hidden.append((owner, name, param))
    for owner, name, _ in hidden:
        owner._parameters[name] = None
    try:
        yield
    finally:
        for owner, name, param in hidden:
            owner._parameters[name] = param


def own_part(net: Precond) -> Precond:
    """A network with this process's rows of a sharded `net` as its parameters, in the same memory; not to be called."""
    part = _without_content(net)
    for name, param in net.named_parameters():
        owner, _, attribute = name.rpartition(".")
        part.get_submodule(owner)._parameters[attribute] = nn.Parameter(_rows(param.detach()))
    for name, buffer in net.named_buffers():
        owner, _, attribute = name.rpartition(".")
        part.get_submodule(owner)._buffers[attribute] = buffer
    return part.train()


@torch.no_grad()
def hand_over_gradients(net: nn.Module, part: nn.Module, world: World) -> None:
    """After a backward pass, move the gradients of a sharded `net` to its `part`.

    Those of rows are averaged over the processes already; those of scalars are here, in one sum for all of them.
    """
    pairs = list(zip(net.parameters(), part.parameters(), strict=True))
    scalars = [param.grad for param, _ in pairs if param.ndim == 0 and param.grad is not None]
    if scalars:
        means = world.all_reduce_sum(torch.stack(scalars)) / world.size
        torch._foreach_copy_(scalars, list(means.unbind()))
    for param, rows in pairs:
        # The first forward pass may have moved what takes padding to be even over the processes.
        if _rows(param.detach()).data_ptr() != rows.data_ptr():
            rows.data = _rows(param.detach())
        rows.grad = None if param.grad is None else _rows(param.grad)
        param.grad = None


def whole_like(rows: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Rows that belong to `param`'s as a tensor over all processes of its shape; `rows` itself where that has none."""
    if not _is_spread(param):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(rows.detach(), *_layout(param), run_check=False, shape=param.shape, stride=param.stride())


@torch.no_grad()
def gathered(part: nn.Module, net: Precond, world: World, *, main_only: bool = False) -> Precond:
    """A whole network from the rows in `part`, of all processes, in float16 as files have it; each must call this.

    With `main_only` it is in the memory of the main process's host, and has no content in the others. It is gathered
    tensor by tensor, so that no GPU has more than one of them whole on the way there.
    """
    like = dict(net.named_parameters())
    tensors = {}
    for name, value in part.state_dict().items():
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


def _without_content(net: Any) -> Precond:
    with torch.device("meta"):
        return Precond(*net._init_args, **net._init_kwargs)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = cast(Any, tensor).to_local() if _is_spread(tensor) else tensor
    return rows


def _full(tensor: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = cast(Any, tensor).full_tensor() if _is_spread(tensor) else tensor
    return whole


def sharded_state(data: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds, from the parts' `data`: the same nested containers, rows as DTensors like `net`'s.

    `data` is TrainingState.state_dict()'s of the part. Nothing is copied.
    """
    params = dict(net.named_parameters())
    moments = data["optimizer"]["state"]

    def named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: whole_like(t, params[n]) if n in params else t for n, t in tensors.items()}

    state = {
        index: {k: whole_like(v, param) if v.ndim else v for k, v in moments[index].items()}
        for index, param in enumerate(params.values())
        if index in moments
    }
    return {
        **data,
        "net": named(data["net"]),
        "optimizer": {**data["optimizer"], "state": state},
        "ema": {**data["ema"], "emas": [named(tensors) for tensors in data["ema"]["emas"]]},
    }


@torch.no_grad()
def take_rows(data: Any, target: Any) -> None:
    """Copy whole tensors in `data` into those in the same places of `target`, of which each process takes its rows.

    Raises ValueError where names or shapes differ.
    """
    ours, theirs = ({k: v for k, v in flatten(d).items() if isinstance(v, torch.Tensor)} for d in (target, data))
    check_same(theirs, ours)
    for name, tensor in ours.items():
        whole = theirs[name]
        if _is_spread(tensor):
            _rows(tensor).copy_(_rows_of(whole, tensor))
        else:
            tensor.copy_(whole)


def _rows_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's rows of a whole tensor that is to be spread as `like` is."""
    mesh, placements = _layout(like)
    (axis,) = (index for index, placement in enumerate(placements) if placement.is_shard())
    per_rank, rank = -(-len(whole) // mesh.size(axis)), mesh.get_local_rank(axis)
    return whole[rank * per_rank : (rank + 1) * per_rank]


def _layout(tensor: Any) -> tuple[Any, Any]:
    """Over which processes a tensor is spread, and how."""
    return tensor.device_mesh, tensor.placements


def _is_spread(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, asked without importing these."""
    return hasattr(tensor, "to_local")
