"""The update of the weights: learning rate, forced normalization before a step, cleared gradients and Adam after it.

Source: Karras et al., arXiv 2312.02696, Eq. 47, 66 and 67, Section 2.3, Table 6 and Appendix B.
"""

import math
from collections.abc import Iterable
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


def start_moments(optimizer: torch.optim.Adam) -> None:
    """Give the optimizer the state that its first step would make, to be filled in by others."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    moments = [
        {"step": torch.zeros([]), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for p in params
    ]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(moments))})


def with_fused_adam(state: dict[str, Any]) -> dict[str, Any]:
    """Return the stored state of any form of Adam as a state of the fused form."""
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@torch.no_grad()
def normalize_weights(net: torch.nn.Module) -> None:
    """Scale every row of every weight to unit magnitude in place (Eq. 66): once before a step's forward passes.

    Row magnitudes take one call per weight, the rest one call for all weights.
    """
    weights = [module.weight.flatten(1) for module in net.modules() if isinstance(module, MPConv)]
    norms = [torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in weights]
    torch._foreach_mul_(norms, [1 / math.sqrt(rows.shape[1]) for rows in weights])
    torch._foreach_add_(norms, EPS)
    torch._foreach_div_(weights, norms)


@torch.no_grad()
def clear_nonfinite(gradients: Iterable[torch.Tensor]) -> None:
    """Set gradient elements that are not finite to zero, in place."""
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0, posinf=0, neginf=0, out=gradient)
