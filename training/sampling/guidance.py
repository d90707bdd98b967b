"""Guidance as a wrapper around a denoiser; solvers see one denoiser and know nothing of it.

Sources: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Eq. 3; Kynkäänniemi
et al., "Applying Guidance in a Limited Interval", arXiv 2404.07724.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.side_by_side import SideBySide
from training.sampling.solvers import Denoiser

# A network called as D = net(x, sigma, labels), with sigma a scalar tensor; one with cond_channels above 0 gets the
# keyword cond_images, too.
Network = Callable[..., torch.Tensor]


def bind_labels(net: Network, labels: torch.Tensor | None, cond_images: torch.Tensor | None = None) -> Denoiser:
    """The denoiser of `net` for fixed `labels` [N, L]; its result has the type of the state x.

    `cond_images` [N, K, H, W] go to networks that are conditioned on images. A network with a method `bind`
    (fast/inference_network.py) is given both once, here, and not with each evaluation.
    """
    seen = {"cond_images": cond_images} if getattr(net, "cond_channels", 0) else {}
    bound = net.bind(labels, **seen) if hasattr(net, "bind") else None

    def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
        # Filled on the device: no copy from the host, which would wait for all work in flight.
        level = torch.full((), sigma, dtype=x.dtype, device=x.device)
        return (net(x, level, labels, **seen) if bound is None else bound(x, level)).to(x.dtype)

    return denoise


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, by how many guides and in which steps to guide. Raises ConfigError for what cannot work."""

    weight: float = 1  # D = D_guide + weight (D_main - D_guide); 1 = unguided, and no guide is called
    num_guides: int = 0
    shares: tuple[float, ...] | None = None  # of the guides, from 0 to 1 and 1 in sum; None = equal
    interval: tuple[float, float] | None = None  # guide the steps that set out at noise levels in (low, high]

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"guidance={self.weight} is no strength; use a number such as 1.4, or 1 for none")
        if self.weight != 1 and not self.num_guides:
            raise ConfigError(
                f"guidance={self.weight:g} needs a guiding network and none is given; add one (gnet) or use 1"
            )
        if self.shares is not None:
            self._check_shares(self.shares)
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ConfigError(
                f"the guidance interval {_numbers(self.interval)} is none; give two noise levels LO,HI "
                "with 0 <= LO < HI, such as 0.28,2.90"
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
        """Whether a step that sets out at this noise level of the schedule is guided."""
        low, high = self.interval or (0, math.inf)
        return self.weight != 1 and low < step_sigma <= high

    def wrap(self, main: Denoiser, guides: Sequence[Denoiser]) -> Denoiser:
        """The guided denoiser. A guide is called in guided steps only, and never if its share is 0; on a CUDA device
        beside the main network, on a stream of its own.
        """
        assert len(guides) == self.num_guides
        if self.weight == 1:
            return main
        shares = self.shares or (1 / len(guides),) * len(guides)
        active = [(guide, share) for guide, share in zip(guides, shares, strict=True) if share > 0]
        guide = active[0][0] if len(active) == 1 else _weighted_sum(active)
        both = SideBySide(guide, main)

        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            if not self.applies(step_sigma):
                return main(x, sigma, step_sigma)
            return torch.lerp(*both(x, sigma, step_sigma), self.weight)

        return denoise


def listed(gnet: Any) -> list[Any]:
    """The guides of an argument that is one guide, a list or tuple of them, or None."""
    if gnet is None:
        return []
    return list(gnet) if isinstance(gnet, list | tuple) else [gnet]


def _weighted_sum(parts: Sequence[tuple[Denoiser, float]]) -> Denoiser:
    """Several guides as one: D_main + (w - 1) sum_i s_i (D_main - D_i) is Eq. 3 with sum_i s_i D_i as the guide."""

    def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
        return torch.stack([share * part(x, sigma, step_sigma) for part, share in parts]).sum(0)

    return denoise


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
