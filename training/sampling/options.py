"""Everything `edm_sampler` takes besides networks and tensors: noise levels, churn, guidance and solver."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dnnlib.errors import ConfigError
from dnnlib.text import unknown
from training.sampling.denoisers import Network
from training.sampling.guidance import Guidance
from training.sampling.schedule import SOLVER_NAMES, HeunOptions
from training.sampling.solvers import CHURNING, SOLVERS, Denoiser, Evaluations, result_of

Noise = Callable[[torch.Tensor], torch.Tensor]  # standard normal numbers in the shape of its argument


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Noise levels, guidance and solver, valid once constructed. Raises ConfigError for values that do not fit."""

    heun: HeunOptions = field(default_factory=HeunOptions)  # noise levels of all solvers, churn of heun and euler
    guidance: Guidance = field(default_factory=Guidance)
    solver: str = SOLVER_NAMES[0]  # a key of SOLVERS
    dtype: torch.dtype = torch.float32  # of the states, and so of the images

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(unknown("solver", self.solver, SOLVERS))
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
        solver: str = SOLVER_NAMES[0],
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
    def exact_guidance(self) -> Guidance:
        """`guidance` on the noise levels of this schedule, which decide what its printed interval means."""
        return self.guidance.on_schedule(self.heun.sigmas()[:-1])

    @property
    def guided_steps(self) -> list[int]:
        """Indices of the steps that call a guide."""
        guidance = self.exact_guidance
        return [i for i, sigma in enumerate(self.heun.sigmas()[:-1]) if guidance.applies(sigma)]

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
        return self.solve(self.exact_guidance.denoiser(net, guides, labels), noise, randn_like)

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
