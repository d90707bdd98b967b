"""The images inside the sample grids of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


def cells(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The images of a grid, uint8 [rows, columns, H, W, C], cut out as its record says, and the record."""
    with PIL.Image.open(path) as image:
        about, pixels = json.loads(image.info["edm2"]), np.asarray(image)
    channels, height, width = about["image"]
    pixels, gap = pixels.reshape(*pixels.shape[:2], channels), about["gap"]
    rows, columns = len(about["classes"]), len(about["seeds"][0])
    assert pixels.shape[:2] == (gap + rows * (height + gap), gap + columns * (width + gap))
    tops = [gap + row * (height + gap) for row in range(rows)]
    lefts = [gap + column * (width + gap) for column in range(columns)]
    return np.stack([[pixels[t : t + height, x : x + width] for x in lefts] for t in tops]), about
