"""The factor on the loss that keeps float16 gradients away from zero and from overflow."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World

# The published constant, at which magnitude-preserving networks train. Starting higher loses a step at each overflow.
_START = 1.0
_GROWTH_STEPS = 2000


def check_loss_scale(value: float | Literal["auto"], device: torch.device) -> None:
    """Raise ConfigError if PyTorch cannot adapt a loss scale on `device`."""
    if value == "auto" and device.type == "mps" and torch.__version__ < "2.8":
        raise ConfigError(
            f"--ls=auto on an Apple GPU needs PyTorch 2.8; this is {torch.__version__}: update it, or leave --ls out"
        )


class LossScale:
    """A constant factor, or for 'auto' a factor that adapts without waiting for the device.

    An adaptive factor halves after a step with a non-finite gradient, which is skipped (`overflow`), and doubles after
    2,000 finite steps; gradients are divided by it. A constant factor stays in the gradients, as in the published code:
    except for its epsilon, Adam does not depend on it. `shared` are processes that each see a part of the gradients.
    """

    def __init__(self, value: float | Literal["auto"], device: torch.device, shared: World | None = None) -> None:
        self._constant = None if value == "auto" else float(value)
        self._scale = torch.full([], _START, device=device)
        self._clean_steps = torch.zeros([], dtype=torch.int32, device=device)
        self._overflow = torch.zeros([], device=device)
        self._shared = shared

    @property
    def factor(self) -> float | torch.Tensor:
        """Factor for the loss: a number, or a scalar tensor on the device."""
        return self._scale if self._constant is None else self._constant

    @property
    def overflow(self) -> torch.Tensor | None:
        """Scalar on the device: 1 if the last `unscale_` met a non-finite element, else 0; None for a constant."""
        return self._overflow if self._constant is None else None

    @torch.no_grad()
    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide the gradients of a whole step by the factor, in place, and adapt the factor to them."""
        if self._constant is not None:
            return
        self._overflow.zero_()
        inverse = self._scale.reciprocal()  # exact, because the scale is a power of two
        torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), self._overflow, inverse)
        if self._shared is not None:
            self._shared.all_reduce_sum(self._overflow).clamp_(max=1)
        torch._amp_update_scale_(self._scale, self._clean_steps, self._overflow, 2.0, 0.5, _GROWTH_STEPS)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of an adaptive factor; empty for a constant."""
        return {"scale": self._scale, "clean_steps": self._clean_steps} if self._constant is None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. After a constant factor, an adaptive one starts from the usual value."""
        if state and self._constant is None:
            self._scale.copy_(state["scale"])
            self._clean_steps.copy_(state["clean_steps"])
