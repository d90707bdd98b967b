"""What happens to the weights around a step: forced normalization before it, cleared gradients and Adam at its end.

Source: Karras et al., arXiv 2312.02696, Eq. 47 and 66, Appendix B.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from training.fast.ops import EPS
from training.networks_edm2 import MPConv

BETAS = (0.9, 0.99)  # of Adam


def make_optimizer(params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam in PyTorch's fused form, which takes one pass over weights, gradients and both moments."""
    return torch.optim.Adam(params, lr=lr, betas=BETAS, fused=True)


def start_moments(optimizer: torch.optim.Adam) -> None:
    """Give the optimizer the state that it would make in its first step, for others to fill in."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    moments = [
        {"step": torch.zeros([]), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for p in params
    ]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(moments))})


def with_fused_adam(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer that was stored by whatever form of Adam, for the one that is used here."""
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@torch.no_grad()
def normalize_weights(net: torch.nn.Module) -> None:
    """Bring every weight to unit magnitude, row by row, in place (Eq. 66): once before a step's forward passes.

    Row magnitudes take one call a weight, what follows from them one call for all.
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
