"""Noise levels and churn of one sampling run, and the names of the solvers. Options need both, without torch.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Algorithm 2 and Eq. 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.errors import ConfigError
from dnnlib.fields import option

if TYPE_CHECKING:
    import torch

SOLVER_NAMES = ("heun", "euler", "dpmpp2m")  # the first is the default


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
    S_min: float = option(0, "Lowest noise level at which noise is added")
    S_max: float = option(math.inf, "Highest noise level at which noise is added")
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

    def churn(
        self, randn_like: "Callable[[torch.Tensor], torch.Tensor]"
    ) -> "Callable[[torch.Tensor, float], tuple[torch.Tensor, float]]":
        """Return the function that raises a state's noise level a little by fresh noise, within the limits."""
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1)

        def churn(x: "torch.Tensor", sigma: float) -> "tuple[torch.Tensor, float]":
            if not self.S_min <= sigma <= self.S_max:
                return x, sigma
            sigma_hat = sigma * (1 + gamma)
            return x + math.sqrt(sigma_hat**2 - sigma**2) * self.S_noise * randn_like(x), sigma_hat

        return churn
