"""An easy labelled data set: flat pictures, dark ones (class 0) and bright ones (class 1), nine times as many dark."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

MEANS = (96, 160)  # grey levels of the two classes; the pictures of a class differ by SPREAD, so that they overlap
SPREAD = 24
SIZE = 8


def write_flat_pictures(path: Path, *, num_dark: int = 180, num_bright: int = 20) -> Path:
    """A ZIP file of grey pictures, each of one level, with class indices."""
    rng = np.random.default_rng(0)
    labels = []
    with zipfile.ZipFile(path, "w") as file:
        for index in range(num_dark + num_bright):
            label = int(index >= num_dark)
            level = np.clip(rng.normal(MEANS[label], SPREAD), 0, 255)
            data = io.BytesIO()
            PIL.Image.fromarray(np.full((SIZE, SIZE), level, dtype=np.uint8)).save(data, format="PNG")
            file.writestr(f"{index:04d}.png", data.getvalue())
            labels.append([f"{index:04d}.png", label])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path
