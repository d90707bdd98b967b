"""What a training process keeps in memory, by counting; the network's activations on tensors without content."""

from dataclasses import dataclass

import torch

from torch_utils.precision import compute_dtype
from training.config import TrainingConfig
from training.dataset import ImageFolderDataset
from training.fast.network import FastPrecond
from training.loss import EDM2Loss
from training.run.state import make_network, network_shape
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
    config: TrainingConfig, dataset: ImageFolderDataset, device: torch.device, *, num_params: int, per_round: int
) -> Memory:
    """What one process of the run keeps, unsharded and not compiled, with `per_round` images at a time."""
    weight_bytes = 4 * num_params
    kept = 1 + 2 + len(config.ema_stds)  # weights, Adam's moments, averages
    one, two = (saved_bytes(config, dataset, device, num_images) for num_images in (1, 2))
    item_bytes = dataset.num_channels * dataset.resolution**2 * (4 if dataset.holds_latents else 1)
    images = len(dataset) * item_bytes
    return Memory(
        weights=weight_bytes * (kept + 1),
        activations=one + (two - one) * (per_round - 1),
        copies=weight_bytes * kept if config.background_saves else 0,
        images=images if config.workers == 0 and images <= CACHE_BYTES else 0,
    )


def saved_bytes(config: TrainingConfig, dataset: ImageFolderDataset, device: torch.device, num_images: int) -> int:
    """The bytes of all tensors that a step with `num_images` keeps for its backward pass on `device`, each counted
    once, but for the parameters. Nothing is computed. Attention is counted in a plain form; kernels keep less.
    """
    with torch.device("meta"):
        net = make_network(config, dataset).train().requires_grad_(True)
    dtype = compute_dtype(config.network.precision, device)
    replica = FastPrecond(net, dtype=dtype, recompute=config.recompute)
    resolution, channels = network_shape(config, dataset)
    images = torch.zeros([num_images, channels, resolution, resolution], device="meta")
    labels = torch.zeros([num_images, net.label_dim], device="meta")
    sizes: dict[int, int] = {}
    kept = []  # so that no storage is another one under the same number

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        EDM2Loss()(replica, images, labels)
    return sum(sizes.values())
