"""The loss of a run: the paper's, or one of the user's own, called like `EDM2Loss`: the contract, and its check.

Shape legend: N images, C channels, K conditioning channels, H x W pixels, L labels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from dnnlib.own_part import OwnPart
from torch_utils.precision import unchanged_random_state
from training.config import TrainingConfig
from training.loss import EDM2Loss
from training.own.own_network import require_result

Loss = Callable[..., torch.Tensor]  # as EDM2Loss


def make_loss(config: TrainingConfig, sigma_data: float) -> Loss:
    """Return the loss. An own class gets those of P_mean, P_std and sigma_data that its constructor names."""
    usual = {"P_mean": config.P_mean, "P_std": config.P_std, "sigma_data": sigma_data}
    if config.loss_class is None:
        return EDM2Loss(**usual)
    part, given = OwnPart(option="loss", name=config.loss_class), config.loss_args or {}
    with part.calls("the signature"):
        named = inspect.signature(part.load()).parameters
    loss: Loss = part.make(**{name: value for name, value in usual.items() if name in named} | given)
    if not callable(loss):
        raise part.error(f"does not fit: it makes a {type(loss).__name__}, which cannot be called")
    return loss


def check_loss(config: TrainingConfig, shape: tuple[int, int, int], label_dim: int, cond_channels: int) -> None:
    """Raise ConfigError unless an own loss keeps the contract: called on two images of `shape` (C, H, W)."""
    if config.loss_class is None:
        return
    part, loss = OwnPart(option="loss", name=config.loss_class), make_loss(config, 0.5)
    images = torch.linspace(-1, 1, 2 * shape[0] * shape[1] * shape[2]).reshape(2, *shape)
    labels = torch.eye(2, label_dim)
    draws = {"rnd_normal": torch.zeros(2, 1, 1, 1), "unit_noise": images.flip(0)}
    if cond_channels:
        draws["cond_images"] = torch.zeros(2, cond_channels, *shape[1:])
    call = f"loss(net, images {list(images.shape)}, labels {list(labels.shape)}, {', '.join(f'{n}=' for n in draws)})"
    with unchanged_random_state(torch.device("cpu")), part.calls(call), torch.enable_grad():
        result: Any = loss(_StandIn(), images, labels, **draws)
    require_result(
        *(part, call, result, images.shape),
        expected="a value per element",
        without_gradients="; it must depend on what net returns",
    )


class _StandIn(torch.nn.Module):
    """A denoiser with one weight, called like `Precond`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones([]))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
        cond_images: torch.Tensor | None = None,
    ) -> Any:
        """Return images, and zeros for their uncertainty."""
        denoised = self.weight * x / (1 + torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1))
        return (denoised, self.weight * torch.zeros(len(x), 1, 1, 1)) if return_logvar else denoised
