"""Averages of quantities over an interval of training and over all processes, without waiting for the device."""

from collections.abc import Mapping

import torch

from torch_utils.distributed import World


class RunningMeans:
    """Named means of the elements of everything added since the last `collect`.

    Sums stay on the device in float64 (float32 where the device has no float64), so that adding never synchronizes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._dtype = torch.float32 if world.device.type == "mps" else torch.float64
        self._moments: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Take all elements of `values` into the mean called `name`."""
        values = values.detach().to(self._dtype)
        moments = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def collect(self) -> dict[str, float]:
        """The means over all processes, and a fresh start. Every process must have added the same names."""
        means = {}
        for name in sorted(self._moments):
            total, count = self._world.all_reduce_sum(self._moments[name].clone()).tolist()
            means[name] = total / count
        self._moments.clear()
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been added in this process since the last `collect`."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self._moments = {name: value.to(self._world.device, self._dtype) for name, value in state.items()}
