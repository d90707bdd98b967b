"""The sampler of EDM: noise levels, optional churn, and random numbers that belong to one image.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Algorithm 2 and Eq. 5.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dnnlib.errors import ConfigError
from training.sampling.guidance import Guidance, Network, listed
from training.sampling.solvers import CHURNING, SOLVERS, Churn, Solver

Noise = Callable[[torch.Tensor], torch.Tensor]  # standard normal numbers in the shape of its argument


@dataclass(frozen=True, kw_only=True)
class HeunOptions:
    """Noise levels and churn of one sampling run. Raises ConfigError for values that cannot work."""

    num_steps: int = 32
    sigma_min: float = 0.002  # last noise level before zero
    sigma_max: float = 80  # noise level to start from
    rho: float = 7  # larger values put more of the steps at low noise levels
    S_churn: float = 0  # noise added over all steps, as a sum of the relative increases of sigma
    S_min: float = 0  # churn only at noise levels from here ...
    S_max: float = math.inf  # ... up to here
    S_noise: float = 1  # standard deviation of the added noise; a little above 1 makes up for lost detail

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_steps != int(self.num_steps):
            raise ConfigError(f"{self.num_steps} sampling steps cannot be taken; ask for a whole number from 1 up")
        if not 0 < self.sigma_min <= self.sigma_max < math.inf:
            raise ConfigError(
                f"noise levels cannot run from sigma_max={self.sigma_max:g} down to sigma_min={self.sigma_min:g}; "
                "they need 0 < sigma_min <= sigma_max"
            )
        if not 0 < self.rho < math.inf:
            raise ConfigError(f"rho={self.rho:g} gives no noise levels; it must be above 0 (7 is usual)")
        for name in ("S_churn", "S_min", "S_max", "S_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name):g} cannot be used; it must be 0 or above")

    def sigmas(self) -> list[float]:
        """The N+1 noise levels t_0 = sigma_max, ..., t_{N-1} = sigma_min, t_N = 0 (Eq. 5); a single step starts at
        sigma_max.

        Written with sigma_max factored out, so that no rho overflows, and with exact end points, so that limits
        such as S_max = sigma_max include them.
        """
        if self.num_steps == 1:
            return [float(self.sigma_max), 0.0]
        slope = (self.sigma_min / self.sigma_max) ** (1 / self.rho) - 1
        inner = [
            self.sigma_max * (1 + i / (self.num_steps - 1) * slope) ** self.rho for i in range(1, self.num_steps - 1)
        ]
        return [float(self.sigma_max), *inner, float(self.sigma_min), 0.0]


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
    cond_images: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn `noise` [N, C, H, W] of unit variance into images [N, C, H, W] of type `dtype` (Algorithm 2).

    `net` and the guides `gnet`, one or several, are called as D = net(x, sigma, labels); `labels` [N, L] go to all. The
    guide `WithoutLabels(net)` is the network itself without labels, for one that was trained with label dropout.
    With guidance 1 no guide is called. `interval` (low, high] restricts guidance to the steps that set out at these
    noise levels of the schedule; in the others no guide is called. `shares` split guidance among several guides; they
    add up to 1 and are equal by default. `solver`: heun (2 * num_steps - 1 evaluations), euler or dpmpp2m (num_steps
    each). `num_steps` = 1 gives D(sigma_max * noise, sigma_max), the mean of all images, since one Euler step to zero
    is what remains. `randn_like` draws the churn. `cond_images` [N, K, H, W] go to those networks that are conditioned
    on images (their attribute cond_channels is K), in a keyword of that name. Raises ConfigError for values that cannot
    work.
    """
    options = HeunOptions(
        num_steps=num_steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
    )
    solve = choose_solver(solver, options, randn_like)
    guides = listed(gnet)
    guided = Guidance(
        weight=guidance,
        num_guides=len(guides),
        shares=None if shares is None else tuple(shares),
        interval=interval,
    )
    return solve(guided.denoiser(net, guides, labels, cond_images), options.sigmas(), noise.to(dtype))


def choose_solver(name: str, options: HeunOptions, randn_like: Noise = torch.randn_like) -> Solver:
    """The solver called `name`, with churn as `options` ask for it, called as solver(denoise, sigmas, noise).

    Raises ConfigError for another name, and for churn options where the solver has no churn.
    """
    if name not in SOLVERS:
        raise ConfigError(f"'{name}' is no solver; there are {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    if solver in CHURNING:
        return partial(solver, churn=_churn(options, randn_like)) if options.S_churn > 0 else solver
    plain = HeunOptions()
    for option in ("S_churn", "S_min", "S_max", "S_noise"):
        if getattr(options, option) != getattr(plain, option):
            able = " or ".join(known for known, candidate in SOLVERS.items() if candidate in CHURNING)
            raise ConfigError(
                f"{option}={getattr(options, option):g} is for solvers that add noise ({able}), not {name}"
            )
    return solver


def _churn(options: HeunOptions, randn_like: Noise) -> Churn:
    """Raise the noise level a little by fresh noise, within the limits that the options set."""
    gamma = min(options.S_churn / options.num_steps, math.sqrt(2) - 1)

    def churn(x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
        if not options.S_min <= sigma <= options.S_max:
            return x, sigma
        sigma_hat = sigma * (1 + gamma)
        return x + math.sqrt(sigma_hat**2 - sigma**2) * options.S_noise * randn_like(x), sigma_hat

    return churn


class StackedRandomGenerator:
    """One random generator per image, so that what is drawn for an image depends on its seed alone.

    The generators live on `device`; where PyTorch has none for it, they live on the CPU and the numbers are copied.
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
