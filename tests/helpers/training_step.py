"""States of training for single steps, without a data set."""

from pathlib import Path
from types import SimpleNamespace

import torch

from tests.helpers.tiny import tiny_config
from torch_utils.distributed import World
from training.config import TrainingConfig
from training.run.state import TrainingState

# What TrainingState wants to know about a data set.
RGB = SimpleNamespace(resolution=8, num_channels=3, label_dim=3, holds_latents=False, class_names=None)
GREY = SimpleNamespace(resolution=8, num_channels=1, label_dim=3, holds_latents=False, class_names=None)
LATENTS = SimpleNamespace(
    resolution=8, num_channels=8, label_dim=3, holds_latents=True, encoder_entry=None, class_names=None
)


def make_state(config: TrainingConfig | None = None, dataset: SimpleNamespace = RGB) -> TrainingState:
    """The state at the start of a run."""
    return TrainingState(config or tiny_config(Path("none")), dataset, World(), resumed=False)


def batch_of(dataset: SimpleNamespace, num: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of random images, or latents, with labels."""
    generator = torch.Generator().manual_seed(0)
    shape = [num, dataset.num_channels, dataset.resolution, dataset.resolution]
    labels = torch.eye(3)[torch.arange(num) % 3]
    if dataset is LATENTS:
        return torch.randn(shape, generator=generator), labels
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), labels


def wake(net: torch.nn.Module) -> None:
    """Set the scalar gains, which start at zero, so that every weight has a gradient."""
    for param in net.parameters():
        if param.ndim == 0:
            param.data.fill_(0.7)
