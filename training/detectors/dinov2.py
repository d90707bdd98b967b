"""DINOv2 ViT-L/14, the network behind FD_DINOv2 (Stein et al., arXiv 2306.04675)."""

from pathlib import Path
from typing import ClassVar

import torch

from training.detectors.common import Detector, DetectorOutput


class DINOv2Detector(Detector):
    """DINOv2 ViT-L/14: the class token behind the last layer norm, 1024 features."""

    name: ClassVar[str] = "dinov2"

    def __init__(self, resize_mode: str = "torch", weights: str | Path | None = None) -> None:
        raise NotImplementedError

    def _compute(self, images: torch.Tensor) -> DetectorOutput:
        raise NotImplementedError
