"""Contact sheets: many images laid out in one.

Shape legend: N images, C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha), H x W pixels.
"""

from pathlib import Path

import numpy as np

from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError
from training.images.png import SMALL
from training.images.png_files import write_png

SHEET_GAP = 2  # white pixels between and around the images


def contact_sheet(images: np.ndarray, *, num_columns: int, gap: int = SHEET_GAP) -> np.ndarray:
    """Lay `images` (uint8 [N, C, H, W]) out row by row with `gap` white pixels between and around them.

    Returns uint8 [C, rows * (H + gap) + gap, num_columns * (W + gap) + gap]; unused cells stay white.
    """
    num_images, num_channels, height, width = images.shape
    num_rows = -(-num_images // num_columns)
    size = (num_channels, num_rows * (height + gap) + gap, num_columns * (width + gap) + gap)
    sheet = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def require_sheet(path: Path) -> None:
    """Raise ConfigError unless a contact sheet can be written to `path`."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"--grid={path} cannot be written; name a file that ends in .png")
    require_folder(path.parent)


def write_sheet(path: Path, images: np.ndarray, *, num_columns: int, texts: dict[str, str] | None = None) -> None:
    """Write a contact sheet of `images` (uint8 [N, C, H, W]) with `texts` to `path`; makes its folder."""
    make_folder(path.parent)
    write_png(path, contact_sheet(images, num_columns=num_columns), compression=SMALL, texts=texts)
