"""Networks that turn images into the features by which sets of images are compared."""

from pathlib import Path

import torch

from dnnlib.errors import ConfigError
from dnnlib.text import unknown
from torch_utils.distributed import World
from training.metrics.detectors.common import Detector
from training.metrics.detectors.dinov2 import DINOv2Detector
from training.metrics.detectors.efflite0 import EfficientNetLite0Detector
from training.metrics.detectors.inception import InceptionV3Detector
from training.metrics.metric_table import METRICS, parse_metrics

DETECTORS: dict[str, type[InceptionV3Detector | DINOv2Detector | EfficientNetLite0Detector]] = {
    cls.name: cls for cls in (InceptionV3Detector, DINOv2Detector, EfficientNetLite0Detector)
}


def make_detector(name: str, device: torch.device | str, weights: str | Path | None = None) -> Detector:
    """Make a detector on `device`, with the published weights or those at the path `weights`. Raises ConfigError."""
    if name not in DETECTORS:
        raise ConfigError(unknown("detector", name, DETECTORS))
    return DETECTORS[name](weights=weights).to(device)


def get_detector(metric: str, verbose: bool = True) -> Detector:
    """Make the detector of a metric with its published weights. `verbose` is accepted and prints nothing."""
    (name,) = parse_metrics(metric)
    return make_detector(METRICS[name].detector, World().device)
