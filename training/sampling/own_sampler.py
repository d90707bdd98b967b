"""A sampler of the user's own, a function called like `edm_sampler`: the contract, and the check that it is kept."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dnnlib.own_part import OwnPart
from torch_utils.precision import unchanged_random_state
from training.sampling.guidance import Guidance
from training.sampling.sampler import ForeignSampler

_CALLED_WITH = ("net", "noise", "labels", "gnet", "randn_like")  # always, as keywords
_SHAPE = [2, 3, 8, 8]


def own_sampler(name: str, keywords: Mapping[str, Any], num_guides: int) -> ForeignSampler:
    """Import the function `name`, and return it with those keywords that were given for it.

    A guidance weight of 1 is left out if the function has no such parameter. Raises ConfigError unless it keeps the
    contract: called with a denoiser of Gaussian data, on the CPU.
    """
    part = OwnPart(option="sampler", name=name)
    function = part.load()
    with part.calls("the signature"):
        parameters = inspect.signature(function).parameters
    takes_all = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    keywords = {key: value for key, value in keywords.items() if (key, value) != ("guidance", 1) or key in parameters}
    for key in (*_CALLED_WITH, *keywords):
        if key not in parameters and not takes_all:
            raise part.error(f"does not fit: it has no parameter {key}")
    weight = keywords.get("guidance", 1) if num_guides else 1
    sampler = ForeignSampler(
        function=function, keywords=keywords, guidance=Guidance(weight=weight, num_guides=num_guides), name=name
    )
    call = f"{', '.join(_CALLED_WITH)}{''.join(f', {key}={value}' for key, value in keywords.items())}"
    with unchanged_random_state(torch.device("cpu")), part.calls(f"a call with {call}"), torch.no_grad():
        guides = [_StandIn() for _ in range(num_guides)]
        noise, labels = torch.randn(_SHAPE), torch.eye(2, 4)
        result: Any = sampler.sample(_StandIn(), noise, labels, guides, randn_like=torch.randn_like)
    problem = None
    if not isinstance(result, torch.Tensor):
        problem = f"a {type(result).__name__}, not a tensor"
    elif list(result.shape) != _SHAPE:
        problem = f"the shape {list(result.shape)} for noise {_SHAPE}"
    elif not result.is_floating_point():
        problem = f"{result.dtype}, not floating-point numbers"
    if problem is not None:
        raise part.error(f"does not fit: it returns {problem}")
    return sampler


class _StandIn:
    """The ideal denoiser of Gaussian data with standard deviation 0.5, called like a network."""

    img_channels, img_resolution, label_dim, sigma_data = _SHAPE[1], _SHAPE[2], 4, 0.5

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        return x * self.sigma_data**2 / (self.sigma_data**2 + level.square())
