"""Heun's method over EDM's noise levels, as a scheduler of the diffusers library.

Source: Karras et al., arXiv 2206.00364, Algorithm 2 without churn, and Eq. 5. The arithmetic is that of
`training.sampling.solvers.heun`, to the bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from training.sampling.schedule import HeunOptions


@dataclass
class EDM2HeunSchedulerOutput(BaseOutput):
    """The next state for the model, and its last prediction of the images."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class EDM2HeunScheduler(SchedulerMixin, ConfigMixin):
    """Second order: two evaluations per step and one in the last, an Euler step to zero; 2 * steps - 1 in all.

    Timesteps are noise levels sigma, and the model predicts the denoised image, as EDM2UNet does. The first evaluation
    of a step is at the level where it starts, the second at the one where it ends, so that levels in between appear
    twice in `timesteps`.
    """

    order = 2

    @register_to_config
    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        HeunOptions(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)  # raises ConfigError for invalid values
        self.set_timesteps(32)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """Factor for noise of unit variance at the beginning."""
        return self._levels[0]

    @property
    def evaluated(self) -> list[float]:
        """`timesteps` as Python numbers: exact, and without a copy from the device."""
        first, *others = self._levels[:-1]
        return [first, *(level for level in others for _ in range(2))]

    @property
    def step_index(self) -> int | None:
        """Number of evaluations so far; None before the first."""
        return self._step_index

    @property
    def step_sigma(self) -> float:
        """Noise level at which the current step started, the same for both of its evaluations."""
        return self._levels[(self._step_index or 0) // 2]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the noise levels of `num_inference_steps` steps. Raises ConfigError for an invalid number."""
        options = HeunOptions(
            num_steps=num_inference_steps,
            sigma_min=self.config.sigma_min,
            sigma_max=self.config.sigma_max,
            rho=self.config.rho,
        )
        self.num_inference_steps = num_inference_steps
        self._levels = options.sigmas()  # Python numbers: float32 would round them before the step is computed
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32)
        self.timesteps = torch.tensor(self.evaluated, dtype=torch.float32, device=device)
        self._step_index: int | None = None
        # Level, state and slope at the beginning of the step, until its second evaluation.
        self._start: Any = None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the state unchanged: the network scales its own input."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor, return_dict: bool = True
    ) -> EDM2HeunSchedulerOutput | tuple[torch.Tensor]:
        """Return the next state, from the denoised images `model_output` at `sample` and `timestep`.

        Evaluations come in the order of `timesteps`; the first may be any that begins a step.
        """
        if self._step_index is None:
            self._step_index = self._index_of(float(timestep))
        level_index = (self._step_index + 1) // 2
        sigma = self._levels[level_index]
        denoised = model_output.to(sample.dtype)
        slope = (sample - denoised) / sigma
        if self._start is None:
            sigma_next = self._levels[level_index + 1]
            result = sample + (sigma_next - sigma) * slope
            self._start = (sigma, sample, slope) if sigma_next > 0 else None
        else:
            start, x, first_slope = self._start
            result = x + (sigma - start) * (first_slope + slope) / 2
            self._start = None
        self._step_index += 1
        if not return_dict:
            return (result,)
        return EDM2HeunSchedulerOutput(prev_sample=result, pred_original_sample=denoised)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return images with noise of standard deviation `timesteps` [N], which are noise levels."""
        sigma = timesteps.to(original_samples.device, original_samples.dtype)
        return original_samples + noise * sigma.reshape(-1, *[1] * (original_samples.ndim - 1))

    def _index_of(self, timestep: float) -> int:
        begins = [0, *range(2, len(self.timesteps), 2)]
        levels = self.timesteps.tolist()
        matches = [index for index in begins if levels[index] == timestep]
        if not matches:
            raise ValueError(f"no step begins at noise level {timestep:g}; take those of `timesteps`")
        return matches[0]
