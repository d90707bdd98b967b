"""What is on the screen of an explorer, as one value: a network, a guide, seeds, a class, and how to sample."""

import math
from dataclasses import dataclass
from typing import Literal

from dnnlib.errors import ConfigError
from training.sampling.request import SamplingRequest, resolve_sampling

MAX_IMAGES = 256
_MAX_SEED = (1 << 32) - 1  # seeds are taken modulo the next number


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that pictures depend on. Raises ConfigError for what cannot work, as far as that shows without files.

    Equal settings give equal pictures, as long as the files behind them stay as they are.
    """

    net: str  # a network, as --net takes it, or the folder of a run
    ema: float | None = None  # EMA length, in thousandths, of a run's network; None for a network by itself
    guide: str | None = None  # as --gnet takes it; 'self' = the network itself, without its class
    guidance: float = 1.0
    interval: tuple[float, float] | None = None  # of noise levels (low, high] that are guided; None = all
    class_idx: int | Literal["all", "none"] | None = None  # None = each seed draws one; none = leave it out
    first_seed: int = 0
    num_images: int = 16
    num_steps: int = 18
    solver: str = "heun"

    def __post_init__(self) -> None:
        if not self.net.strip():
            raise ConfigError("there is no network to sample from; choose one, or give a file or the folder of a run")
        if self.ema is not None and not (0 < self.ema < 0.289 and round(self.ema, 3) == self.ema):
            raise ConfigError(f"{self.ema} is no EMA length here; choose one from 0.001 to 0.288, in thousandths")
        if self.guide is not None and not self.guide.strip():
            raise ConfigError("the guide has no name; choose a network, or none")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance {self.guidance} is no strength; choose a number such as 1.5, or 1 for none")
        if self.guide is None and self.guidance != 1:
            raise ConfigError(f"guidance {self.guidance:g} needs a guiding network; choose a guide, or guidance 1")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise ConfigError(
                f"guidance cannot be limited to noise levels above {low:g} and up to {high:g}; the first one must be"
                " the smaller one"
            )
        _require_between("images", self.num_images, 1, MAX_IMAGES)
        _require_between("as first seed", self.first_seed, 0, _MAX_SEED + 1 - self.num_images)
        _require_between("steps", self.num_steps, 1, 1000)
        self.request()

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return list(range(self.first_seed, self.first_seed + self.num_images))

    def request(self) -> SamplingRequest:
        """What to ask of the sampler, the guide left out where no step calls it. Its network is as in `net`."""
        guided = self.guide is not None
        return resolve_sampling(
            net=self.net,
            gnet=(self.guide,) if self.guide is not None else (),
            guidance=self.guidance if guided else None,
            interval=self.interval if guided else None,
            solver=self.solver,
            num_steps=self.num_steps,
        )

    def differences(self, other: "Setting") -> list[str]:
        """The names of the fields in which they differ."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


def _require_between(what: str, value: int, low: int, high: int) -> None:
    if value != int(value) or not low <= value <= high:
        raise ConfigError(f"{value:g} {what} cannot be; choose a whole number from {low} to {high}")
