"""The factor on the loss that keeps float16 gradients away from zero and from overflow."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from torch_utils.distributed import World

_START = (
    1.0  # the published constant, at which magnitude-preserving networks train; a step that overflows is a step lost
)
_GROWTH_STEPS = 2000


class LossScale:
    """A constant factor, or with 'auto' one that adapts without waiting for the device.

    The adaptive one halves after a step with a gradient element that is not finite, which is not taken (`overflow`),
    and doubles after 2,000 steps without one; gradients are divided by it again. A constant one stays in the gradients,
    as in the published code: Adam does not depend on it, but for its epsilon. `shared` are processes that each see a
    part of the gradients.
    """

    def __init__(self, value: float | Literal["auto"], device: torch.device, shared: World | None = None) -> None:
        self._constant = None if value == "auto" else float(value)
        self._scale = torch.full([], _START, device=device)
        self._clean_steps = torch.zeros([], dtype=torch.int32, device=device)
        self._overflow = torch.zeros([], device=device)
        self._shared = shared

    @property
    def factor(self) -> float | torch.Tensor:
        """What to multiply the loss by: a number, or a scalar tensor on the device."""
        return self._scale if self._constant is None else self._constant

    @property
    def overflow(self) -> torch.Tensor | None:
        """1 where the last `unscale_` met an element that is not finite, else 0, on the device; None for a constant."""
        return self._overflow if self._constant is None else None

    @torch.no_grad()
    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Bring the gradients of a whole step to their own size, in place, and adapt to what they were."""
        if self._constant is not None:
            return
        self._overflow.zero_()
        inverse = self._scale.reciprocal()  # exact, of a power of two
        torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), self._overflow, inverse)
        if self._shared is not None:
            self._shared.all_reduce_sum(self._overflow).clamp_(max=1)
        torch._amp_update_scale_(self._scale, self._clean_steps, self._overflow, 2.0, 0.5, _GROWTH_STEPS)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What an adaptive scale goes on from; empty for a constant."""
        return {"scale": self._scale, "clean_steps": self._clean_steps} if self._constant is None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. A run that had a constant scale starts to adapt from the usual value."""
        if state and self._constant is None:
            self._scale.copy_(state["scale"])
            self._clean_steps.copy_(state["clean_steps"])
