"""The update of the weights: learning rate, forced normalization before a step, cleared gradients and Adam after it.

Source: Karras et al., arXiv 2312.02696, Eq. 47, 66 and 67, Section 2.3, Table 6 and Appendix B.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from training.networks_edm2 import EPS, MPConv

BETAS = (0.9, 0.99)  # of Adam


def learning_rate_schedule(
    cur_nimg: float, batch_size: int, ref_lr: float = 0.01, ref_batches: float = 70e3, rampup_Mimg: float = 10
) -> float:
    """Adam's learning rate after `cur_nimg` images: linear ramp-up, then decay with the inverse square root (Eq. 67).

    `ref_lr` applies until `ref_batches` batches have passed; 0 turns the decay off. `rampup_Mimg` is the length of the
    ramp-up in millions of images; 0 turns it off.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(cur_nimg / (ref_batches * batch_size), 1))
    if rampup_Mimg > 0:
        lr *= min(cur_nimg / (rampup_Mimg * 1e6), 1)
    return lr


def make_optimizer(params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Adam:
    """Return Adam in PyTorch's fused form, which takes one pass over weights, gradients and both moments."""
    return torch.optim.Adam(params, lr=lr, betas=BETAS, fused=True)


def start_moments(optimizer: torch.optim.Adam, indices: Collection[int]) -> None:
    """Give the parameters of these indices the state that a first step would make, to be filled in by others."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    moments = {
        i: {"step": torch.zeros([]), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for i, p in enumerate(params)
        if i in indices
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def with_fused_adam(state: dict[str, Any]) -> dict[str, Any]:
    """Return the stored state of any form of Adam as a state of the fused form."""
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def pack_weights(net: torch.nn.Module) -> None:
    """Move the weights of `net`: those with rows of the same length follow one another in memory.

    `normalize_weights` then needs a few kernels for all of them, instead of two for each.
    """
    groups: dict[int, list[torch.nn.Parameter]] = {}
    for weight in weights_of(net):
        groups.setdefault(weight.shape[1:].numel(), []).append(weight)
    for weights in groups.values():
        packed = torch.cat([weight.detach().flatten() for weight in weights])
        for weight, part in zip(weights, packed.split([weight.numel() for weight in weights]), strict=True):
            weight.data = part.view(weight.shape)


def weights_of(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    """List the weights of `net` that are normalized."""
    return [module.weight for module in net.modules() if isinstance(module, MPConv)]


def normalize_weights(net: torch.nn.Module) -> None:
    """Scale every row of every weight to unit magnitude in place (Eq. 66): once before a step's forward passes."""
    normalize_rows(weights_of(net))


@torch.no_grad()
def normalize_rows(weights: Sequence[torch.Tensor]) -> None:
    """Do the work of `normalize_weights` for the result of `weights_of`.

    Weights that `pack_weights` has put together take one call for their magnitudes and one for the division. Weights
    with rows that are not unbroken in memory are normalized one by one.
    """
    by_length: dict[int, list[torch.Tensor]] = {}
    for weight in weights:
        if not _has_unbroken_rows(weight):
            norm = torch.linalg.vector_norm(weight, dim=list(range(1, weight.ndim)), keepdim=True)
            weight.div_(norm / math.sqrt(weight.shape[1:].numel()) + EPS)
            continue
        by_length.setdefault(weight.shape[1:].numel(), []).append(weight)
    rows = [part.view(-1, length) for length, group in by_length.items() for part in joined(group)]
    if not rows:
        return
    norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in rows]
    torch._foreach_mul_(norms, [1 / math.sqrt(part.shape[1]) for part in rows])
    torch._foreach_add_(norms, EPS)
    for part, norm in zip(rows, norms, strict=True):  # _foreach_div_ would do the same: the shapes differ
        part.div_(norm)


def _has_unbroken_rows(weight: torch.Tensor) -> bool:
    """Return whether rows follow one another in memory without gaps; their elements may be in any order."""
    shape, strides = weight.shape, weight.stride()
    length = shape[1:].numel()
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
    return span == length and strides[0] == length


@torch.no_grad()
def flat_gradients(params: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients as a few flat tensors in the same memory, for work on all elements.

    Buckets of DistributedDataParallel are flat already. Gradients that lie alone in memory are moved together, since a
    copy of all costs less than a kernel for each.
    """
    owners = [param for param in params if param.grad is not None]
    gradients = [param.grad for param in owners if param.grad is not None]
    if all(gradient.is_contiguous() for gradient in gradients):
        flat = joined(gradients)
        if 4 * len(flat) <= len(gradients):
            return flat
    if not gradients:
        return []
    moved = torch.cat([gradient.flatten() for gradient in gradients])
    for param, part in zip(owners, moved.split([gradient.numel() for gradient in gradients]), strict=True):
        param.grad = part.view(param.shape)
    return [moved]


def joined(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the elements of contiguous `tensors` as flat tensors in the same memory, one for each unbroken stretch."""
    placed = sorted(
        ((x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x) for x in tensors if x.numel()),
        key=lambda place: place[:2],
    )
    stretches: list[tuple[torch.Tensor, int]] = []
    end = None
    for storage, offset, num, tensor in placed:
        if (storage, offset) == end:
            first, length = stretches.pop()
            stretches.append((first, length + num))
        else:
            stretches.append((tensor, num))
        end = (storage, offset + num)
    return [first.detach().as_strided((length,), (1,)) for first, length in stretches]


@torch.no_grad()
def clear_nonfinite(gradients: Iterable[torch.Tensor]) -> None:
    """Set gradient elements that are not finite to zero, in place."""
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0, posinf=0, neginf=0, out=gradient)
