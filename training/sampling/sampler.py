"""The published sampler function, other samplers in its place, and random numbers that belong to one image.

Source: Karras et al., arXiv 2206.00364, Algorithm 2 and Eq. 5; the options are in training/sampling/options.py.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.sampling.denoisers import Network, as_list
from training.sampling.guidance import Guidance
from training.sampling.options import Noise, SamplerOptions, non_default
from training.sampling.solvers import result_of


def edm_sampler(
    net: Network,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    gnet: Network | Sequence[Network] | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    guidance: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Noise = torch.randn_like,
    *,
    interval: tuple[float, float] | None = None,
    shares: Sequence[float] | None = None,
    solver: str = "heun",
) -> torch.Tensor:
    """Turn `noise` [N, C, H, W] of unit variance into images [N, C, H, W] of type `dtype` (Algorithm 2).

    `net` and the guides `gnet`, one or several, are called as D = net(x, sigma, labels); `labels` [N, L] go to all. The
    guide `WithoutLabels(net)` is the network itself without labels, for one that was trained with label dropout. For
    networks that are conditioned on images, pass those of `training.sampling.denoisers.conditioned`.

    With guidance 1 no guide is called. `interval` (low, high] restricts guidance to the steps that start at these noise
    levels of the schedule; its bounds may be rounded (`training.sampling.guidance.nearest_level`). `shares` split
    guidance among several guides; they add up to 1 and are equal by default. `solver`: heun (2 * num_steps - 1
    evaluations), euler or dpmpp2m (num_steps each). `num_steps` = 1 gives D(sigma_max * noise, sigma_max), the mean of
    all images, since only the Euler step to zero remains. `randn_like` draws the churn. Raises ConfigError for invalid
    values.
    """
    guides = as_list(gnet)
    options = SamplerOptions.from_keywords(
        num_guides=len(guides), num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho,
        guidance=guidance, S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise, dtype=dtype, interval=interval,
        shares=shares, solver=solver,
    )  # fmt: skip
    return result_of(options.evaluations(net, noise, labels, guides, randn_like=randn_like))


@dataclass(frozen=True, kw_only=True)
class ForeignSampler:
    """A caller's own sampler, called like `edm_sampler` with its keywords as they were given."""

    function: Callable[..., torch.Tensor]
    keywords: dict[str, Any]
    guidance: Guidance
    name: str | None = None  # module:function, if the user gave it by name

    def record(self) -> dict[str, Any]:
        """Return its name and the keywords that differ from their defaults, as PNG files note them."""
        defaults = {name: p.default for name, p in inspect.signature(self.function).parameters.items()}
        name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        return {**non_default(self.keywords, defaults), "sampler": name}

    def sample(
        self,
        net: Network,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        guides: Sequence[Network],
        *,
        randn_like: Noise,
    ) -> torch.Tensor:
        """Return the images."""
        gnet = list(guides) if len(guides) > 1 else guides[0] if guides else None
        return self.function(net=net, noise=noise, labels=labels, gnet=gnet, randn_like=randn_like, **self.keywords)


Sampler = SamplerOptions | ForeignSampler


def sampler_keywords(sampler: Sampler) -> dict[str, Any]:
    """Return all keywords, for records; those of a caller's own sampler as they were given, and its name."""
    if isinstance(sampler, SamplerOptions):
        return sampler.keywords()
    return {**sampler.keywords, "sampler": sampler.record()["sampler"]}


def sampler_of(function: Callable[..., torch.Tensor], keywords: dict[str, Any], num_guides: int) -> Sampler:
    """Return what samples with `function` and its `keywords`. Raises ConfigError for invalid values."""
    if function is edm_sampler:
        return SamplerOptions.from_keywords(num_guides=num_guides, **keywords)
    options = {name: keywords[name] for name in ("shares", "interval") if name in keywords}
    guidance = Guidance(weight=keywords.get("guidance", 1), num_guides=num_guides, **options)
    return ForeignSampler(function=function, keywords=keywords, guidance=guidance)


class StackedRandomGenerator:
    """One random generator per image, so that what is drawn for an image depends on its seed alone.

    The generators live on `device`. Where PyTorch has none for it, they live on the CPU and the numbers are copied.
    CPU, CUDA and MPS generators of equal seed draw different numbers. Seeds are taken modulo 2**32.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int]) -> None:
        self.device = torch.device(device)
        self.generators = [_make_generator(self.device, int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        """Standard normal [N, ...]: row i from generator i. Keywords as for torch.randn."""
        return self._stack(torch.randn, (), size, kwargs)

    def randn_like(self, input: torch.Tensor) -> torch.Tensor:
        """Standard normal with the shape, type and device of `input` [N, ...]."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *args: int, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        """Integers [N, ...] below `args` = (high,) or in (low, high): row i from generator i."""
        return self._stack(torch.randint, args, size, kwargs)

    def _stack(
        self, draw: Callable[..., torch.Tensor], args: tuple[int, ...], size: Sequence[int], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if size[0] != len(self.generators):
            raise ValueError(f"size {list(size)} asks for {size[0]} rows of {len(self.generators)} generators")
        target = kwargs.pop("device", None) or self.device
        row = tuple(size[1:])
        rows = [draw(*args, size=row, generator=g, device=g.device, **kwargs) for g in self.generators]
        return torch.stack(rows).to(target)


def _make_generator(device: torch.device, seed: int) -> torch.Generator:
    try:
        generator = torch.Generator(device)
    except (RuntimeError, NotImplementedError):
        generator = torch.Generator("cpu")
    return generator.manual_seed(seed)
