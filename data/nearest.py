"""Show the training images nearest to generated ones, to see whether a network copies.

    python data/nearest.py --images=out/emoji --data=datasets/emoji.zip --grid=out/emoji-nearest.png

Each row of the sheet is a generated image and its nearest training images, the nearest first. Distances are root mean
squares over pixels, in gray levels of 0 to 255. A small distance proves a copy. A large one proves nothing: a copy that
is shifted by a pixel is far from its original.
"""

import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, which need not be installed

from dnnlib.cli import PATH, SOURCE, main
from dnnlib.errors import ConfigError
from training.dataset.image_folder import ImageFolderDataset
from training.images.sheet import require_sheet, write_sheet


@click.command()
@click.option("--images", metavar="DIR|ZIP", type=SOURCE, required=True, help="Generated images")
@click.option(
    "--data", metavar="DIR|ZIP", type=SOURCE, required=True, help="The data set that the network was trained on"
)
@click.option("--grid", metavar="FILE.png", type=PATH, required=True, help="Sheet to write")
@click.option("--rows", type=click.IntRange(min=1), default=12, show_default=True, help="Generated images on the sheet")
@click.option("--neighbours", type=click.IntRange(min=1), default=4, show_default=True, help="Training images for each")
@click.option(
    "--copy", type=float, default=12, show_default=True, help="Distance up to which an image counts as a copy"
)
def cmdline(images: str, data: str, grid: Path, rows: int, neighbours: int, copy: float) -> None:
    """Compare generated images with the images that the network was trained on."""
    require_sheet(grid)
    generated, real = (_pixels(path) for path in (images, data))
    if generated.shape[1:] != real.shape[1:]:
        raise ConfigError(f"{images} holds images of another size than {data}; generate them with its network")
    distances = rms_distances(generated, real)
    nearest = distances.min(axis=1)
    sample = np.linspace(0, len(real) - 1, min(len(real), 1000)).round().astype(int)
    own_distances = rms_distances(real[sample], real)
    own_distances[np.arange(len(sample)), sample] = np.inf
    own = own_distances.min(axis=1)
    for name, values in ((f"{len(generated)} generated", nearest), (f"{len(sample)} training", own)):
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        click.echo(
            f"{name} images: distance to the nearest {'other ' if values is own else ''}training image"
            f" {low:.1f} / {middle:.1f} / {high:.1f} (10 %, half, 90 %); up to {copy:g}: {(values <= copy).mean():.1%}"
        )
    shown = np.linspace(0, len(generated) - 1, min(rows, len(generated))).round().astype(int)
    order = distances.argsort(axis=1)[:, :neighbours]
    images_and_nearest = np.concatenate([np.concatenate([generated[i : i + 1], real[order[i]]]) for i in shown])
    write_sheet(grid, images_and_nearest, num_columns=1 + order.shape[1])


def rms_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distances [N, M] of `a` [N, C, H, W] to `b` [M, C, H, W], both uint8."""
    x, y = (images.reshape(len(images), -1).astype(np.float64) for images in (a, b))
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return np.asarray(np.sqrt(squares.clip(0) / x.shape[1]))


def _pixels(path: str) -> np.ndarray:
    dataset = ImageFolderDataset(path, use_labels=False)
    if dataset.holds_latents:
        raise ConfigError(f"{path} holds latents; give images, as `dataset_tool.py decode` makes them")
    pixels, _ = dataset.read_batch(range(len(dataset)))
    return pixels


if __name__ == "__main__":
    main(cmdline)
