"""A detector without weights, for tests: a few exact sums over the pixels, and simple functions of them."""

from pathlib import Path
from typing import Any

import torch

from training.metrics.detectors.common import DetectorOutput, to_rgb

NUM_FEATURES = 12
NUM_CLASSES = 20


class StandInDetector:
    """Features that depend on an image alone, to the last bit: whole numbers in float64, before one division."""

    published = True
    num_features = NUM_FEATURES

    def __init__(self, name: str = "inception") -> None:
        self.name = name
        self.weights_path = Path(__file__)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images).features

    def outputs(self, images: Any) -> DetectorOutput:
        if isinstance(images, list):
            each = [self.outputs(image[None]) for image in images]
            layers = [[getattr(output, layer) for output in each] for layer in ("features", "logits", "spatial")]
            return DetectorOutput(*map(torch.cat, layers))
        pixels = to_rgb(images, self.name).flatten(1).to("cpu", torch.float64)  # [N, P]
        index = torch.arange(pixels.shape[1], dtype=torch.float64)

        def sums(num: int, shift: int) -> torch.Tensor:
            weights = torch.stack([(index * (j + shift) + j * j) % 17 - 8 for j in range(num)])
            return (pixels @ weights.T / (8 * len(index))).float()

        return DetectorOutput(sums(NUM_FEATURES, 3), sums(NUM_CLASSES, 5), sums(7, 7))


def images(num: int, *, channels: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Random images uint8 [num, channels, size, size]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, channels, size, size), generator=random).to(torch.uint8)
