"""Statistics of a detector's outputs, gathered batch by batch and over all processes: moments, and single rows.

Shape legend: N rows of this batch, F columns.
"""

import numpy as np
import torch

from torch_utils.distributed import World

_PIECE_BYTES = 64 << 20  # of a process's rows, in one exchange


def accumulation_device(device: torch.device) -> torch.device:
    """Return the device of float64 sums: `device`, or the CPU for MPS, which lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Moments:
    """Mean and covariance of all rows seen, in float64.

    Rows are taken relative to the mean of the first batch, so that a large common offset causes no cancellation. Each
    batch is centered on its own mean and merged by the formula of Chan, Golub and LeVeque (1979).
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: torch.Tensor | None = None  # [F]
        self._mean = torch.zeros(0)  # [F], relative to the shift
        self._scatter = torch.zeros(0)  # [F, F], sum of outer products of centered rows

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [N, F]."""
        if len(rows) == 0:
            return
        rows = rows.to(accumulation_device(rows.device)).to(torch.float64)
        if self._shift is None:
            self._shift = rows.mean(0)
            self._mean = torch.zeros_like(self._shift)
            self._scatter = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._shift
        total = self.count + len(rows)
        mean = rows.mean(0)
        between = (mean - self._mean) * (self.count * len(rows) / total) ** 0.5
        centered = torch.cat([rows - mean, between[None]])
        self._scatter.addmm_(centered.T, centered)
        self._mean += (mean - self._mean) * (len(rows) / total)
        self.count = total

    def merge(self, world: World) -> tuple[int, np.ndarray, np.ndarray]:
        """Return count, mean [F] and covariance [F, F] (divisor count - 1) over all processes, in each of them."""
        shares = world.all_gather_objects((self.count, None if self._shift is None else self._shift.cpu()))
        total = sum(count for count, _ in shares)
        shift = next((shift for _, shift in shares if shift is not None), torch.zeros(0, dtype=torch.float64))
        device = accumulation_device(world.device)  # sums over processes are taken there
        shift = shift.to(device)
        own_mean = torch.zeros_like(shift)
        if self._shift is not None:
            own_mean = self._mean.to(device) + (self._shift.to(device) - shift)
        mean = world.all_reduce_sum(own_mean * (self.count / max(total, 1)))
        between = (own_mean - mean) * self.count**0.5
        scatter = between[:, None] * between
        if self._shift is not None:
            scatter += self._scatter.to(device)
        covariance = world.all_reduce_sum(scatter) / max(total - 1, 1)
        return total, (mean + shift).cpu().numpy(), covariance.cpu().numpy()


class Rows:
    """Single rows with their positions in the whole sequence, kept as float32 on the CPU."""

    def __init__(self) -> None:
        self._keys: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(self, keys: np.ndarray, rows: torch.Tensor) -> None:
        """Keep rows [N, F] whose positions are `keys`, int64 [N]."""
        if len(keys):
            self._keys.append(keys)
            self._rows.append(rows.to("cpu", torch.float32).numpy())

    def merge(self, world: World) -> np.ndarray:
        """Return the rows of all processes sorted by position, in each process: float32 [M, F].

        They are exchanged in pieces, which pass through the GPU's memory, those of all processes at once.
        """
        keys = np.concatenate(self._keys) if self._keys else np.zeros(0, dtype=np.int64)
        rows = np.concatenate(self._rows) if self._rows else np.zeros([0, 0], dtype=np.float32)
        num = max(_PIECE_BYTES // max(rows[:1].nbytes, 1), 1)
        shares: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(world.size)]
        for index in range(max(world.all_gather_objects(-(-len(keys) // num)))):
            part = slice(index * num, (index + 1) * num)
            for share, piece in zip(shares, world.all_gather_objects((keys[part], rows[part])), strict=True):
                share.append(piece)
        pieces = [piece for share in shares for piece in share if len(piece[0])]
        if not pieces:
            return np.zeros([0, 0], dtype=np.float32)
        order = np.argsort(np.concatenate([keys for keys, _ in pieces]), kind="stable")
        return np.concatenate([rows for _, rows in pieces])[order]
