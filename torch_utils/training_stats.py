"""Averages over an interval of training and over all processes, without waiting for the device."""

from collections.abc import Mapping

import torch

from torch_utils.distributed import World


class RunningMeans:
    """Named means of all elements since the last `collect`; sums stay on the device, so adding never synchronizes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._dtype = torch.float32 if world.device.type == "mps" else torch.float64  # MPS has no float64
        self._moments: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add all elements of `values` to the mean called `name`."""
        values = values.detach().to(self._dtype)
        moments = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def collect(self) -> dict[str, float]:
        """Return the means over all processes and start over. Every process must have added the same names."""
        means = {}
        for name in sorted(self._moments):
            total, count = self._world.all_reduce_sum(self._moments[name].clone()).tolist()
            means[name] = total / count
        self._moments.clear()
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Sum and count since the last `collect`, [2], or [R, 2] for R processes, all of which must call this."""
        if self._world.size == 1:
            return dict(self._moments)
        rows = self._world.all_gather_objects({name: value.tolist() for name, value in self._moments.items()})
        return {name: torch.tensor([row[name] for row in rows], dtype=self._dtype) for name in self._moments}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`. If it is from another number of processes, the first one takes the sums of all."""
        rank, size = self._world.rank, self._world.size
        self._moments = {}
        for name, value in state.items():
            rows = value.to(self._world.device, self._dtype).reshape(-1, 2)
            if len(rows) == size:
                self._moments[name] = rows[rank].clone()
            else:
                self._moments[name] = rows.sum(0) if rank == 0 else torch.zeros_like(rows[0])
