"""Solvers of the probability flow: a denoiser and noise levels in, images out. They know nothing of guidance.

Sources: Karras et al., arXiv 2206.00364, Algorithm 2 (Heun, Euler, churn); Lu et al., "DPM-Solver++", arXiv 2211.01095,
Algorithm 2.

A solver is a generator of its evaluations that returns the images, so that a caller can show every state and stop
between two of them. Called as a function, it returns the images alone.

Noise levels are Python numbers, so that nothing here waits for the device.
"""

import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from training.sampling.schedule import SOLVER_NAMES

# What solvers call: D = denoise(x, sigma, step_sigma) for a state x [N, ...] with noise of standard deviation sigma.
# step_sigma is the level of the schedule at which the current step started: the same for all evaluations of a step, and
# without churn, so that a wrapper such as guidance can decide for whole steps.
Denoiser = Callable[[torch.Tensor, float, float], torch.Tensor]

# Adds a little noise to a state at noise level sigma: (x, sigma) -> (x, new sigma).
Churn = Callable[[torch.Tensor, float], tuple[torch.Tensor, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One call of the denoiser, with its result."""

    step_idx: int
    is_trial: bool = False  # of a state that the step then corrects: Heun's second evaluation
    sigma: float  # noise level of the state; churn included
    x: torch.Tensor  # the state [N, ...]
    denoised: torch.Tensor  # D(x, sigma) [N, ...]


Evaluations = Generator[Evaluation, None, torch.Tensor]  # returns the images


def result_of(evaluations: Evaluations) -> torch.Tensor:
    """Run `evaluations` to their end and return the images."""
    while True:
        try:
            next(evaluations)
        except StopIteration as end:
            images: torch.Tensor = end.value
            return images


class Solver:
    """images = solver(denoise, sigmas, noise).

    `sigmas` fall to 0, `noise` [N, ...] has unit variance, and images have its type. Solvers that accept fresh noise
    between steps have a keyword `churn`.
    """

    def __init__(self, evaluations: Callable[..., Evaluations]) -> None:
        functools.update_wrapper(self, evaluations)
        self.evaluations = evaluations  # called with the same arguments

    def __call__(self, denoise: Denoiser, sigmas: Sequence[float], noise: torch.Tensor, **churn: Any) -> torch.Tensor:
        """Return the images."""
        return result_of(self.evaluations(denoise, sigmas, noise, **churn))


@Solver
def euler(
    denoise: Denoiser, sigmas: Sequence[float], noise: torch.Tensor, *, churn: Churn | None = None
) -> Evaluations:
    """Euler's method for dx/dsigma = (x - D) / sigma: first order, one evaluation per step."""
    x = noise * sigmas[0]
    for step_idx, (step_sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma = (x, step_sigma) if churn is None else churn(x, step_sigma)
        denoised = denoise(x, sigma, step_sigma)
        yield Evaluation(step_idx=step_idx, sigma=sigma, x=x, denoised=denoised)
        x = x + (sigma_next - sigma) * ((x - denoised) / sigma)
    return x


@Solver
def heun(denoise: Denoiser, sigmas: Sequence[float], noise: torch.Tensor, *, churn: Churn | None = None) -> Evaluations:
    """Heun's method for dx/dsigma = (x - D) / sigma (Algorithm 2): second order.

    Two evaluations per step, except one in the last, which is an Euler step to zero.
    """
    x = noise * sigmas[0]
    for step_idx, (step_sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma = (x, step_sigma) if churn is None else churn(x, step_sigma)
        denoised = denoise(x, sigma, step_sigma)
        yield Evaluation(step_idx=step_idx, sigma=sigma, x=x, denoised=denoised)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            denoised = denoise(x_next, sigma_next, step_sigma)
            yield Evaluation(step_idx=step_idx, is_trial=True, sigma=sigma_next, x=x_next, denoised=denoised)
            slope_next = (x_next - denoised) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


@Solver
def dpmpp2m(denoise: Denoiser, sigmas: Sequence[float], noise: torch.Tensor) -> Evaluations:
    """DPM-Solver++ 2M: second order with one evaluation per step, by extrapolating from the step before.

    It solves the linear part exactly and takes D to be linear in lambda = -log sigma, the half log-SNR of an unscaled
    signal. The first step and the last one, to zero, take D to be constant.
    """
    x = noise * sigmas[0]
    previous: torch.Tensor | None = None  # D of the step before ...
    width = 0.0  # ... and that step's width in lambda
    for step_idx, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        current = denoise(x, sigma, sigma)
        yield Evaluation(step_idx=step_idx, sigma=sigma, x=x, denoised=current)
        if sigma_next == 0:
            return current
        previous_width, width = width, math.log(sigma / sigma_next)
        target = current
        if previous is not None and previous_width > 0:
            target = torch.lerp(previous, current, 1 + width / (2 * previous_width))
        x = torch.lerp(target, x, sigma_next / sigma)
        previous = current
    return x  # for noise levels that end above zero


SOLVERS: Mapping[str, Solver] = dict(zip(SOLVER_NAMES, (heun, euler, dpmpp2m), strict=True))
CHURNING: frozenset[Any] = frozenset({heun, euler})  # those with a keyword `churn`
