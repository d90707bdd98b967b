"""Guidance as a wrapper around a denoiser; solvers see one denoiser and know nothing of it.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Eq. 3.

Shape legend: N images, C channels, H x W pixels, L labels.
"""

import math
from collections.abc import Callable

import torch

from dnnlib.errors import ConfigError

# A network called as D = net(x, sigma, labels), with sigma a scalar tensor.
Network = Callable[..., torch.Tensor]

# What solvers call: D = denoise(x, sigma) for x [N, C, H, W] at one noise level, a Python number.
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


def bind_labels(net: Network, labels: torch.Tensor | None) -> Denoiser:
    """The denoiser of `net` for fixed `labels` [N, L]; its result has the type of the state x."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        # Filled on the device: no copy from the host, which would wait for all work in flight.
        level = torch.full((), sigma, dtype=x.dtype, device=x.device)
        return net(x, level, labels).to(x.dtype)

    return denoise


def apply_guide(main: Denoiser, guide: Denoiser, guidance: float) -> Denoiser:
    """Extrapolate from the guide's answer through the main one (Eq. 3): D = D_guide + guidance (D_main - D_guide).

    An unconditional guide makes this classifier-free guidance; a smaller or less trained conditional one,
    autoguidance.
    """

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.lerp(guide(x, sigma), main(x, sigma), guidance)

    return denoise


def require_guide(guidance: float, *, has_guide: bool) -> bool:
    """Whether a run with this strength calls its guide: it does unless guidance is 1.

    Raises ConfigError for a strength that is no number, and for one that needs a guide where there is none.
    """
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance={guidance} is no strength; use a number such as 1.4, or 1 for none")
    if guidance != 1 and not has_guide:
        raise ConfigError(f"guidance={guidance:g} needs a guiding network and none is given; add one (gnet) or use 1")
    return guidance != 1
