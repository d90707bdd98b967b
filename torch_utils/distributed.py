"""The processes of one run: who this one is, what it computes on, and how it talks to the others.

One process on a CPU is the normal case; under torchrun, or any launcher that sets its environment variables, the
same code runs over NCCL on GPUs and over gloo elsewhere.
"""

import datetime
import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed

from dnnlib.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def all_gather_objects(self, value: T) -> list[T]:
        """Every process's `value`, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name` (cpu, cuda, cuda:1, mps), or the best one of this machine: CUDA, then MPS, then CPU.

    Under torchrun, 'cuda' is this process's own GPU. Raises ConfigError where the device does not exist.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device={name} is no device; use cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device={name} is not supported; use cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device={name} was asked for, but PyTorch sees no Apple GPU here")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= count:
            raise ConfigError(f"--device={name} needs GPU {index}, but PyTorch sees {count} here")
        device = torch.device("cuda", index)
    return device


def init(device: str | None = None, *, patience_hours: float = 0.5) -> World:
    """Join the run that torchrun's environment variables describe; without them, be the only process.

    `device` as in `resolve_device`. A process that waits for the others longer than `patience_hours` gives up: they
    have failed, or were dealt much more work. Call `close` on the result before the program ends.
    """
    resolved = resolve_device(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=resolved)
    if not torch.distributed.is_initialized():
        backend = "nccl" if resolved.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=patience_hours))
    return World(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size(), device=resolved)
