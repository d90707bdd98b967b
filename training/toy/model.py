"""The network of the 2-D toy example: a small MLP whose output is a log density, and whose gradient is the score.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Appendix C.

Shape legend: N points, D their dimension, H hidden width.

Files of the published layout carry this text, and the published reader executes it. It therefore imports only the
standard library, torch and torch_utils.persistence. The names of parameters and submodules are the file format.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils import persistence

_SILU_MAGNITUDE = 0.596  # of SiLU's output for standard normal input


@persistence.persistent_class
class MPSiLU(nn.Module):
    """SiLU scaled to keep the magnitude of normally distributed input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply elementwise to any shape."""
        return F.silu(x) / _SILU_MAGNITUDE


@persistence.persistent_class
class MPLinear(nn.Module):
    """Fully connected layer with forced weight normalization, as in EDM2's networks."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))

    def matrix(self) -> torch.Tensor:
        """The matrix [out, in] that acts on the input, with rows of unit length.

        Training mode normalizes the stored weight too, so that steps keep their size relative to the weight.
        """
        if self.training:
            self.weight.data.copy_(_normalize_rows(self.weight.detach()))
        return _normalize_rows(self.weight) / math.sqrt(self.weight.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [N, in] to [N, out]."""
        return x @ self.matrix().t()


@persistence.persistent_class
class ToyModel(nn.Module):
    """Learned log density and score at any noise level above 0; at 0 they are not finite.

    Points x are [..., D], and `sigma` is a number or a tensor that broadcasts to [...].
    """

    def __init__(self, in_dim: int = 2, num_layers: int = 4, hidden_dim: int = 64, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        layers: list[nn.Module] = [MPLinear(in_dim + 2, hidden_dim)]
        for _ in range(num_layers):
            layers += [MPSiLU(), MPLinear(hidden_dim, hidden_dim)]
        self.layers = nn.Sequential(*layers)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor = 0) -> torch.Tensor:
        """Log density [...], up to a constant for each sigma."""
        level, _, scaled, features = self._input(x, sigma)
        y = self.layers(features)
        return (y.square().mean(-1) * (self.gain / level) - scaled.square().sum(-1) / 2).reshape(x.shape[:-1])

    def logp(self, x: torch.Tensor, sigma: float | torch.Tensor = 0) -> torch.Tensor:
        """Log density [...], up to a constant for each sigma."""
        return self(x, sigma)

    def pdf(self, x: torch.Tensor, sigma: float | torch.Tensor = 0) -> torch.Tensor:
        """Density [...], scaled to a maximum of 1: at low noise levels all values would underflow otherwise."""
        logp = self(x, sigma)
        return (logp - logp.max()).exp()

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor = 0, graph: bool = False) -> torch.Tensor:
        """Gradient [..., D] of the log density, by the chain rule written out; with `graph` differentiable itself."""
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            return self._score(x, sigma)

    def _score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        level, scale, scaled, features = self._input(x, sigma)
        first, *rest = [layer.matrix() for layer in self.layers if isinstance(layer, MPLinear)]
        y = features @ first.t()
        slopes = []
        for matrix in rest:
            activation, slope = _SiLUWithSlope.apply(y)
            y = activation @ matrix.t()
            slopes.append(slope)
        gradient = y * (self.gain * 2 / y.shape[-1] / level)[:, None]
        for matrix, slope in zip(reversed(rest), reversed(slopes), strict=True):
            gradient = gradient @ matrix * slope
        return (((gradient @ first)[:, : x.shape[-1]] - scaled) * scale[:, None]).reshape(x.shape)

    def _input(self, x: torch.Tensor, sigma: float | torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Noise level [N], scale of the points [N], scaled points [N, D] and features of the first layer [N, D + 2]."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1]).flatten()
        scale = (level.square() + self.sigma_data**2).rsqrt()
        scaled = x.reshape(-1, x.shape[-1]) * scale[:, None]
        features = torch.cat([scaled, level.log()[:, None] / 4, torch.ones_like(scale)[:, None]], dim=1)
        return level, scale, scaled, features


class _SiLUWithSlope(torch.autograd.Function):
    """MPSiLU and its derivative at once; the second derivative is written out for a fast backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """SiLU and its derivative, both scaled."""
        s = x.sigmoid()
        silu = x * s
        slope = torch.addcmul(silu + s, silu, s, value=-1).div_(_SILU_MAGNITUDE)
        ctx.save_for_backward(s, silu, slope)
        return silu / _SILU_MAGNITUDE, slope

    @staticmethod
    def backward(ctx: Any, grad_silu: torch.Tensor, grad_slope: torch.Tensor) -> torch.Tensor:
        """Return the gradient in x from those in both results; SiLU'' is s (1 - s) (2 + x (1 - 2 s))."""
        s, silu, slope = ctx.saved_tensors
        curvature = (1 - s) * torch.add(s, torch.addcmul(silu / 2, silu, s, value=-1)) * (2 / _SILU_MAGNITUDE)
        return torch.addcmul(grad_silu * slope, grad_slope, curvature)


def _normalize_rows(weight: torch.Tensor) -> torch.Tensor:
    """Scale each row of [out, in] to unit magnitude (root mean square)."""
    return weight / (weight.square().mean(dim=1, keepdim=True).sqrt() + 1e-4)
