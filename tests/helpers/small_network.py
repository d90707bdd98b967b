"""A network of the least size with every kind of layer, its gains away from zero, and the distance of its gradients."""

from typing import Any

import torch

from training.networks_edm2 import Precond
from training.run.update import normalize_weights

SMALL: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 5,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "channels_per_head": 8,
    "attn_resolutions": [8],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_dim": 0, "img_channels": 8},
    {"channel_mult": [1, 1, 2], "attn_resolutions": [16, 8], "channels_per_head": 4},
    {"channel_mult_noise": 2, "channel_mult_emb": 3, "label_balance": 0.3, "concat_balance": 0.7},
    {"resample_filter": [1, 3, 3, 1], "res_balance": 0.5, "attn_balance": 0.2, "clip_act": 1.0},
    {"num_blocks": 2, "clip_act": None, "sigma_data": 0.7, "logvar_channels": 32},
]


def small_network(**options: Any) -> Precond:
    """A network whose gains are away from zero and whose weights have unit magnitude."""
    torch.manual_seed(0)
    net = Precond(**(SMALL | options), use_fp16=False).train()
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(0.6) if param.ndim == 0 else param.mul_(2)
    normalize_weights(net)
    return net


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of two gradients of the same name."""
    assert set(ours) == set(theirs)
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs)
