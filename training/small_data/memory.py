"""What a training process keeps in memory, by counting."""

from dataclasses import dataclass

import torch

from torch_utils.saved_tensors import saved_bytes
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.run.state import TrainingState
from training.training_loop import CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, by what they are for."""

    weights: int  # with their gradients, Adam's two moments and the tracked averages
    activations: int  # what a round's images leave for the backward pass, and the weights as they act on them
    copies: int  # of weights, moments and averages, while a checkpoint is on its way to the disk; on the host
    images: int  # of the data set, decoded; on the host
    program: int = 0  # what the process took before the run; on the host

    def total(self, device: torch.device) -> int:
        """On a CPU all of it; elsewhere what lies in the device's memory."""
        on_device = self.weights + self.activations
        return on_device + self.copies + self.images + self.program if device.type == "cpu" else on_device


def count_memory(
    state: TrainingState, config: TrainingConfig, dataset: ImageFolderDataset, *, per_round: int
) -> Memory:
    """What one process of the run `config` keeps, unsharded and not compiled, with `per_round` images at a time.

    `state` has the run's network, on the run's device.
    """
    weight_bytes = sum(parameter.nbytes for parameter in state.net.parameters())
    kept = 1 + 2 + len(config.ema_stds)  # weights, Adam's moments, averages
    one, two = (loss_bytes(state, num_images) for num_images in (1, 2))
    item_bytes = dataset.num_channels * dataset.resolution**2 * (4 if dataset.holds_latents else 1)
    images = len(dataset) * item_bytes
    return Memory(
        weights=weight_bytes * (kept + 1),
        activations=one + (two - one) * (per_round - 1),
        copies=weight_bytes * kept if config.background_saves else 0,
        images=images if config.workers == 0 and images <= CACHE_BYTES else 0,
    )


def loss_bytes(state: TrainingState, num_images: int) -> int:
    """The bytes of all tensors that the loss of `num_images` keeps for its backward pass, each counted once, but for
    the parameters.
    """
    net, device = state.net, state.world.device
    size = net.img_resolution
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros([num_images, net.img_channels, height, width], device=device)
    labels = torch.zeros([num_images, net.label_dim], device=device)
    noise = torch.ones_like(images)
    seen = {}
    if net.cond_channels:
        seen["cond_images"] = torch.zeros([num_images, net.cond_channels, height, width], device=device)
    return saved_bytes(
        lambda: state.loss_fn(state.replica, images, labels, rnd_normal=noise[:, :1, :1, :1], unit_noise=noise, **seen)
    )
