"""Networks and denoisers to sample with, and the images of a generator."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training.networks_edm2 import Precond
from training.sampling.generation import GeneratedImages

CASES = ["plain_32", "heun_8", "guid_cond", "guid_uncond", "guid_below_1", "range", "churn", "f64", "two_steps"]


@dataclass
class GaussianDenoiser:
    """The exact denoiser of data distributed as N(mean, std^2), called like a network; counts its calls."""

    mean: float = 0.0
    std: float = 0.5
    calls: list[float] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append(float(sigma))
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


def golden_network(tensors: dict[str, torch.Tensor], config: str, name: str) -> Precond:
    """A network of a golden file."""
    net = Precond(**json.loads(config)).eval().requires_grad_(False)
    prefix = f"{name}."
    net.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    return net


def tiny_network(label_dim: int = 3, channels: int = 3, resolution: Any = 4) -> Precond:
    """A network of the fewest weights."""
    torch.manual_seed(0)
    net = Precond(
        resolution, channels, label_dim, model_channels=4, channel_mult=[1], num_blocks=1, channels_per_head=4
    )
    torch.nn.init.constant_(net.unet.out_gain, 1)
    return net.eval().requires_grad_(False)


def collect(images: GeneratedImages) -> np.ndarray:
    """All images of a generator in one array."""
    return np.concatenate([batch.images.cpu().numpy() for batch in images if batch.images is not None])
