"""The training loss of EDM2.

Source: Karras et al., arXiv 2312.02696, Equations 14, 15, 16 and 21.

Snapshots of the published layout carry this text, and the published reader executes it. It therefore imports only the
standard library, torch and torch_utils.persistence.
"""

from typing import Any

import torch

from torch_utils import persistence


@persistence.persistent_class
class EDM2Loss:
    """Denoising loss with log-normally distributed noise levels, weighted by the network's own uncertainty.

    `P_mean` and `P_std` are mean and standard deviation of ln(sigma); `sigma_data` is the data's standard deviation.
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5) -> None:
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def __call__(
        self,
        net: Any,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        rnd_normal: torch.Tensor | None = None,
        unit_noise: torch.Tensor | None = None,
        cond_images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss per element [N, C, H, W].

        `rnd_normal` [N, 1, 1, 1] gives the noise levels and `unit_noise` [N, C, H, W] the noise, both standard normal.
        By default they are drawn from torch's global generator, in this order. `cond_images` go to the network
        unchanged; the loss covers all elements of `images`, including those that the condition shows.
        """
        if rnd_normal is None:
            rnd_normal = torch.randn([images.shape[0], 1, 1, 1], device=images.device)
        if unit_noise is None:
            unit_noise = torch.randn_like(images)
        # Noise levels and weight lambda(sigma) (Eq. 14, 15, 16).
        sigma = (rnd_normal * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        condition_kwargs = {} if cond_images is None else {"cond_images": cond_images}
        denoised, logvar = net(images + unit_noise * sigma, sigma, labels, return_logvar=True, **condition_kwargs)
        # The network learns its uncertainty u(sigma) = logvar along with the denoiser (Eq. 21).
        return (weight / logvar.exp()) * (denoised - images).square() + logvar
