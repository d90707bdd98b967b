"""Guidance as a wrapper around a denoiser; solvers call one denoiser and know nothing of it.

Sources: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Eq. 3; Kynkäänniemi
et al., "Applying Guidance in a Limited Interval", arXiv 2404.07724.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dnnlib.errors import ConfigError
from dnnlib.parse import half_unit
from torch_utils.cuda import SideBySide
from training.sampling.denoisers import BothDenoisers, Network, WithoutLabels, bind_labels, merged_call
from training.sampling.solvers import Denoiser


def extrapolate(d_guide: torch.Tensor, d_main: torch.Tensor, weight: float) -> torch.Tensor:
    """D_guide + weight (D_main - D_guide) (Eq. 3 of arXiv 2406.02507), for denoised images [N, C, H, W]."""
    return torch.lerp(d_guide, d_main, weight)


def nearest_level(bound: float, levels: Sequence[float]) -> float:
    """Return the level of a schedule that `bound` means, or `bound` itself.

    Papers set bounds to levels and print them rounded: 2.90 for 2.9015. A bound therefore means the nearest level if
    that is within half a unit of its last digit. 0 means no level.
    """
    level = min(levels, key=lambda level: abs(level - bound))
    # At least a millionth, for levels that were computed in float32.
    return level if bound > 0 and abs(level - bound) <= max(half_unit(bound), 1e-6 * level) else bound


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Strength of guidance, shares of the guides, and guided steps. Raises ConfigError for invalid values."""

    weight: float = 1  # of `extrapolate`; with 1 no guide is called
    num_guides: int = 0
    shares: tuple[float, ...] | None = None  # of the guides, from 0 to 1 and 1 in sum; None = equal
    interval: tuple[float, float] | None = None  # guide the steps at noise levels in (low, high]; see `on_schedule`

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"guidance={self.weight} must be a finite number such as 1.4, or 1 for no guidance")
        if self.weight != 1 and not self.num_guides:
            raise ConfigError(f"guidance={self.weight:g} needs a guiding network; add one (gnet) or use 1")
        if self.shares is not None:
            self._check_shares(self.shares)
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ConfigError(
                f"the guidance interval {_numbers(self.interval)} must be two noise levels LO,HI with 0 <= LO < HI,"
                " such as 0.28,2.90"
            )

    def _check_shares(self, shares: tuple[float, ...]) -> None:
        if len(shares) != self.num_guides:
            raise ConfigError(f"{len(shares)} shares do not fit {self.num_guides} guides; give one for each guide")
        # `not all(...)` so that NaN is refused too; the sum may be off by rounding.
        if not all(share >= 0 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
            raise ConfigError(
                f"the guides cannot share the weight as {_numbers(shares)}; "
                "each share must be 0 or above, and all together 1"
            )

    def applies(self, step_sigma: float) -> bool:
        """Whether a step that starts at this noise level of the schedule is guided."""
        low, high = self.interval or (0, math.inf)
        return self.weight != 1 and low < step_sigma <= high

    def on_schedule(self, levels: Sequence[float]) -> "Guidance":
        """Return the guidance whose interval ends at the noise levels that it means (see `nearest_level`).

        Bounds that would mean the same level stay as they are, so that they can enclose it.
        """
        if self.interval is None:
            return self
        low, high = (nearest_level(bound, levels) for bound in self.interval)
        return replace(self, interval=(low, high)) if low < high else self

    def denoiser(self, net: Network, guides: Sequence[Network], labels: torch.Tensor | None) -> Denoiser:
        """Return the guided denoiser of `net` for fixed `labels` [N, L], which go to the guides, too.

        Where the one guide is `net` without labels, both are evaluated as one batch of 2N. A CPU does so for a single
        image only: with more it is busy anyway (benchmarks/self_guidance.py).
        """
        both = None
        active = [guide for guide, share in zip(guides, self._shares(), strict=True) if share > 0]
        if len(active) == 1 and isinstance(active[0], WithoutLabels) and active[0].net is net and labels is not None:
            both = merged_call(net, labels) if labels.device.type != "cpu" or len(labels) == 1 else None
        return self.wrap(bind_labels(net, labels), [bind_labels(guide, labels) for guide in guides], both)

    def wrap(self, main: Denoiser, guides: Sequence[Denoiser], both: BothDenoisers | None = None) -> Denoiser:
        """Return the guided denoiser. Guides are called in guided steps only, and never with a share of 0.

        On a CUDA device a guide runs next to the main network, on its own stream. `both` replaces the two calls.
        """
        assert len(guides) == self.num_guides
        if self.weight == 1:
            return main
        if both is None:
            both = SideBySide(self._weighted_sum(guides), main)

        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            if not self.applies(step_sigma):
                return main(x, sigma, step_sigma)
            d_guide, d_main = both(x, sigma, step_sigma)
            return extrapolate(d_guide, d_main, self.weight)

        return denoise

    def _weighted_sum(self, guides: Sequence[Denoiser]) -> Denoiser:
        """Several guides as one: D_main + (w - 1) sum_i s_i (D_main - D_i) is Eq. 3 with sum_i s_i D_i as the guide."""
        active = [(guide, share) for guide, share in zip(guides, self._shares(), strict=True) if share > 0]
        if len(active) == 1:
            return active[0][0]

        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            return torch.stack([share * guide(x, sigma, step_sigma) for guide, share in active]).sum(0)

        return denoise

    def _shares(self) -> Sequence[float]:
        return self.shares or [1 / max(self.num_guides, 1)] * self.num_guides


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
