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
from torch_utils.cuda.side_by_side import SideBySide
from training.sampling.solvers import Denoiser

# A network called as D = net(x, sigma, labels), with sigma a scalar tensor; one with cond_channels above 0 gets the
# keyword cond_images, too.
Network = Callable[..., torch.Tensor]

# Called as a denoiser; gives the guide's denoised images and the main network's.
Both = Callable[[torch.Tensor, float, float], Sequence[torch.Tensor]]

SELF = "self"  # in place of a guide's file: the main network itself, without labels


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


class WithoutLabels:
    """A conditional network that is told of no label, whatever it is given: zeros, as label dropout has shown them.

    Called like `net`, and sharing its weights. As a guide of `net` itself this is classifier-free guidance with one
    network (Ho and Salimans, arXiv 2207.12598).
    """

    def __init__(self, net: Any) -> None:
        self.net = net

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.net, name)  # image size, channels and whatever else callers ask a network for

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None, **more: Any
    ) -> torch.Tensor:
        """The denoised images [N, C, H, W]. `more` goes to `net`."""
        return self.bind(class_labels, **more)(x, sigma)

    def bind(self, class_labels: torch.Tensor | None, **more: Any) -> Callable[..., torch.Tensor]:
        """The denoiser D(x, sigma); `class_labels` [N, L] give the shape of the zeros."""
        if hasattr(self.net, "bind"):
            bound: Callable[..., torch.Tensor] = self.net.bind(None, **more)  # one row of zeros for all images
            return bound
        zeros = None if class_labels is None else torch.zeros_like(class_labels)
        return lambda x, sigma: self.net(x, sigma, zeros, **more)


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

    def _shares(self) -> Sequence[float]:
        return self.shares or [1 / max(self.num_guides, 1)] * self.num_guides

    def applies(self, step_sigma: float) -> bool:
        """Whether a step that sets out at this noise level of the schedule is guided."""
        low, high = self.interval or (0, math.inf)
        return self.weight != 1 and low < step_sigma <= high

    def denoiser(
        self,
        net: Network,
        guides: Sequence[Network],
        labels: torch.Tensor | None,
        cond_images: torch.Tensor | None = None,
    ) -> Denoiser:
        """The guided denoiser of `net` for fixed `labels` [N, L] and `cond_images`, which go to the guides, too.

        Where the one guide is `net` without labels, both are evaluated as one batch of 2N. A CPU does so for a single
        image only: it is busy with more (benchmarks/self_guidance.py).
        """
        both = None
        active = [guide for guide, share in zip(guides, self._shares(), strict=True) if share > 0]
        if len(active) == 1 and isinstance(active[0], WithoutLabels) and active[0].net is net and labels is not None:
            both = one_batch(net, labels, cond_images) if labels.device.type != "cpu" or len(labels) == 1 else None
        bound = [bind_labels(network, labels, cond_images) for network in (net, *guides)]
        return self.wrap(bound[0], bound[1:], both)

    def wrap(self, main: Denoiser, guides: Sequence[Denoiser], both: Both | None = None) -> Denoiser:
        """The guided denoiser. A guide is called in guided steps only, and never if its share is 0; on a CUDA device
        beside the main network, on a stream of its own. `both` takes the place of the two calls in guided steps.
        """
        assert len(guides) == self.num_guides
        if self.weight == 1:
            return main
        active = [(guide, share) for guide, share in zip(guides, self._shares(), strict=True) if share > 0]
        guide = active[0][0] if len(active) == 1 else _weighted_sum(active)
        both = SideBySide(guide, main) if both is None else both

        def denoise(x: torch.Tensor, sigma: float, step_sigma: float) -> torch.Tensor:
            if not self.applies(step_sigma):
                return main(x, sigma, step_sigma)
            guided_by, denoised = both(x, sigma, step_sigma)
            return torch.lerp(guided_by, denoised, self.weight)

        return denoise


def one_batch(net: Network, labels: torch.Tensor, cond_images: torch.Tensor | None = None) -> Both:
    """`net` without labels and with `labels` [N, L], evaluated together on 2N images."""
    seen = None if cond_images is None else torch.cat([cond_images, cond_images])
    denoise = bind_labels(net, torch.cat([torch.zeros_like(labels), labels]), seen)
    return lambda x, sigma, step_sigma: denoise(torch.cat([x, x]), sigma, step_sigma).chunk(2)


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
