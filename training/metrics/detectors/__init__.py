"""Networks that turn images into features, in which sets of images are compared."""

from pathlib import Path

import torch

from dnnlib.errors import ConfigError
from training.metrics.detectors.common import Detector, DetectorOutput
from training.metrics.detectors.dinov2 import DINOv2Detector
from training.metrics.detectors.efflite0 import EfficientNetLite0Detector
from training.metrics.detectors.inception import InceptionV3Detector

__all__ = [
    "DETECTORS",
    "DINOv2Detector",
    "Detector",
    "DetectorOutput",
    "EfficientNetLite0Detector",
    "InceptionV3Detector",
    "make_detector",
]

DETECTORS: dict[str, type[InceptionV3Detector | DINOv2Detector | EfficientNetLite0Detector]] = {
    cls.name: cls for cls in (InceptionV3Detector, DINOv2Detector, EfficientNetLite0Detector)
}


def make_detector(name: str, device: torch.device | str, weights: str | Path | None = None) -> Detector:
    """The detector called `name` on `device`, with the published weights or those at the path `weights`.

    Raises ConfigError for an unknown name and for weights that are missing or are no such network's.
    """
    if name not in DETECTORS:
        raise ConfigError(f"no detector is called {name!r}; there are {', '.join(DETECTORS)}")
    return DETECTORS[name](weights=weights).to(device)
