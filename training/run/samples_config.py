"""Which sample grids a run draws while it trains; see training/run/run_samples.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from dnnlib.errors import ConfigError

MAX_COLUMNS = 64


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """A grid at each snapshot: a row for each class, with images from seeds that stay the same."""

    num: int  # images of each class: the grid's columns
    classes: tuple[int, ...] | None = None  # the rows from the top; None = all, or some spread evenly over many
    std: float | None = None  # the tracked EMA length to draw from; None = the first one
    steps: int = 32  # of Heun's method
    batch: int = 32  # images at once and process

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MAX_COLUMNS:
            raise ConfigError(f"--samples={self.num} is no number of images for each class from 1 to {MAX_COLUMNS}")
        if self.steps < 2:
            raise ConfigError(f"--samples-steps={self.steps} is too small; 2 is the least")
        if self.batch < 1:
            raise ConfigError(f"--samples-batch={self.batch} must be a number above 0")
        if self.classes is not None and (not self.classes or min(self.classes) < 0):
            raise ConfigError("--samples-classes needs class numbers from 0 on, e.g. 0,1,7")

    def check_tracked(self, ema_stds: Sequence[float]) -> None:
        """Raise ConfigError where the run does not track the EMA length."""
        if self.std is not None and f"{self.std:.3f}" not in [f"{std:.3f}" for std in ema_stds]:
            tracked = ", ".join(f"{std:.3f}" for std in ema_stds)
            raise ConfigError(f"--samples-std={self.std:g} is none of the tracked lengths: {tracked}")
