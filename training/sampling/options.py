"""Everything `edm_sampler` takes besides networks and tensors: noise levels, churn, guidance and solver.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Algorithm 2 and Eq. 5.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dnnlib.errors import ConfigError
from dnnlib.fields import option
from training.sampling.denoisers import Network
from training.sampling.guidance import Guidance
from training.sampling.solvers import CHURNING, SOLVERS, Churn, Denoiser, Evaluations, result_of

Noise = Callable[[torch.Tensor], torch.Tensor]  # standard normal numbers in the shape of its argument


@dataclass(frozen=True, kw_only=True)
class HeunOptions:
    """Noise levels and churn of one sampling run. Raises ConfigError for invalid values.

    edm2/options/sampling.py makes a command-line option from each field and its help.
    """

    num_steps: int = option(32, "Sampling steps", flag="steps")
    sigma_min: float = option(0.002, "Lowest noise level")  # the last one before zero
    sigma_max: float = option(80, "Highest noise level")  # the first one
    rho: float = option(7, "Exponent of the noise levels")  # larger values put more steps at low noise levels
    S_churn: float = option(0, "Strength of added noise; heun, euler")  # sum of the relative increases of sigma
    S_min: float = option(0, "Add noise from this noise level ...")
    S_max: float = option(math.inf, "... up to this one")
    S_noise: float = option(1, "Inflation of added noise")  # its standard deviation; above 1 makes up for lost detail

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_steps != int(self.num_steps):
            raise ConfigError(f"{self.num_steps} sampling steps are impossible; ask for a whole number from 1 up")
        if not 0 < self.sigma_min <= self.sigma_max < math.inf:
            raise ConfigError(
                f"noise levels cannot run from sigma_max={self.sigma_max:g} down to sigma_min={self.sigma_min:g}; "
                "they need 0 < sigma_min <= sigma_max"
            )
        if not 0 < self.rho < math.inf:
            raise ConfigError(f"rho={self.rho:g} must be above 0; 7 is usual")
        for name in ("S_churn", "S_min", "S_max", "S_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name):g} must be 0 or above")

    def sigmas(self) -> list[float]:
        """Return the N+1 noise levels t_0 = sigma_max, ..., t_{N-1} = sigma_min, t_N = 0. One step has sigma_max and 0.

        Eq. 5: t_i = (sigma_max^(1/rho) + i / (N-1) * (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho for i < N.

        Here sigma_max is factored out, t_i = sigma_max * (1 + i / (N-1) * ((sigma_min / sigma_max)^(1/rho) - 1))^rho,
        so that no rho overflows. The end points are exact, so that limits such as S_max = sigma_max include them.
        """
        if self.num_steps == 1:
            return [float(self.sigma_max), 0.0]
        slope = (self.sigma_min / self.sigma_max) ** (1 / self.rho) - 1
        inner = [
            self.sigma_max * (1 + i / (self.num_steps - 1) * slope) ** self.rho
            for i in range(1, int(self.num_steps) - 1)
        ]
        return [float(self.sigma_max), *inner, float(self.sigma_min), 0.0]

    def churn(self, randn_like: Noise) -> Churn:
        """Return the function that raises a state's noise level a little by fresh noise, within the limits."""
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1)

        def churn(x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
            if not self.S_min <= sigma <= self.S_max:
                return x, sigma
            sigma_hat = sigma * (1 + gamma)
            return x + math.sqrt(sigma_hat**2 - sigma**2) * self.S_noise * randn_like(x), sigma_hat

        return churn


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Noise levels, guidance and solver, valid once constructed. Raises ConfigError for values that do not fit."""

    heun: HeunOptions = field(default_factory=HeunOptions)  # noise levels of all solvers, churn of heun and euler
    guidance: Guidance = field(default_factory=Guidance)
    solver: str = "heun"  # a key of SOLVERS
    dtype: torch.dtype = torch.float32  # of the states, and so of the images

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"unknown solver '{self.solver}'; choose from {', '.join(SOLVERS)}")
        if SOLVERS[self.solver] in CHURNING:
            return
        default = HeunOptions()
        for name in ("S_churn", "S_min", "S_max", "S_noise"):
            if getattr(self.heun, name) != getattr(default, name):
                able = " or ".join(known for known, solver in SOLVERS.items() if solver in CHURNING)
                value = f"{name}={getattr(self.heun, name):g}"
                raise ConfigError(f"{value} is for solvers that add noise ({able}), not {self.solver}")

    @classmethod
    def from_keywords(
        cls,
        *,
        num_guides: int = 0,
        guidance: float = 1,
        interval: tuple[float, float] | None = None,
        shares: Sequence[float] | None = None,
        solver: str = "heun",
        dtype: torch.dtype = torch.float32,
        **heun: Any,
    ) -> "SamplerOptions":
        """Return the options that keywords of `edm_sampler` stand for. `heun`: the fields of HeunOptions."""
        shares = None if shares is None else tuple(shares)
        return cls(
            heun=HeunOptions(**heun),
            guidance=Guidance(weight=guidance, num_guides=num_guides, shares=shares, interval=interval),
            solver=solver,
            dtype=dtype,
        )

    def keywords(self) -> dict[str, Any]:
        """Return the same as keywords of `edm_sampler`, for records and command lines."""
        return {
            **dataclasses.asdict(self.heun),
            "guidance": self.guidance.weight,
            "interval": self.guidance.interval,
            "shares": self.guidance.shares,
            "solver": self.solver,
            **({} if self.dtype == torch.float32 else {"dtype": self.dtype}),
        }

    @property
    def is_guided(self) -> bool:
        """Whether any step calls a guide."""
        return any(self.guidance.applies(sigma) for sigma in self.heun.sigmas()[:-1])

    def record(self) -> dict[str, Any]:
        """Return the keywords that differ from their defaults, as PNG files note them."""
        return non_default(self.keywords(), SamplerOptions().keywords())

    def solve(self, denoise: Denoiser, noise: torch.Tensor, randn_like: Noise = torch.randn_like) -> Evaluations:
        """Return the solver's generator for `noise` [N, ...] of unit variance. `randn_like` draws the churn."""
        churn = {"churn": self.heun.churn(randn_like)} if self.heun.S_churn > 0 else {}
        return SOLVERS[self.solver].evaluations(denoise, self.heun.sigmas(), noise.to(self.dtype), **churn)

    def evaluations(
        self,
        net: Network,
        noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        guides: Sequence[Network] = (),
        *,
        randn_like: Noise = torch.randn_like,
    ) -> Evaluations:
        """Return `edm_sampler` as a generator of the guided denoiser's evaluations, which returns the images."""
        return self.solve(self.guidance.denoiser(net, guides, labels), noise, randn_like)

    def sample(
        self,
        net: Network,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        guides: Sequence[Network],
        *,
        randn_like: Noise,
    ) -> torch.Tensor:
        """Return the images that `evaluations` end with."""
        return result_of(self.evaluations(net, noise, labels, guides, randn_like=randn_like))


def non_default(keywords: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that differ from their defaults, all as JSON gives them back."""
    keywords, defaults = as_json(keywords), as_json(defaults)
    return {name: value for name, value in keywords.items() if name not in defaults or value != defaults[name]}


def as_json(value: Any) -> Any:
    """Return `value` as it comes back from JSON: tuples as lists, dtypes by name, others by the name of their type."""
    return json.loads(json.dumps(value, default=lambda x: str(x) if isinstance(x, torch.dtype) else type(x).__name__))
