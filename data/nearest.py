"""Show the training pictures that are nearest to generated ones, to see whether a network draws or copies.

    python data/nearest.py --images=out/emoji --data=datasets/emoji.zip --grid=out/emoji-nearest.png

Each row of the sheet is a generated picture and its nearest training pictures, the nearest first. Distances are root
mean squares over pixels, in grey levels of 0 to 255. A small one proves a copy; a large one does not prove that there
is none, since a copy that is shifted by a pixel is far from its original.
"""

import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, where it is not installed

from dnnlib.cli import main
from dnnlib.errors import ConfigError
from training.dataset.image_folder import ImageFolderDataset
from training.images.sheet import require_sheet, write_sheet


@click.command()
@click.option("--images", metavar="DIR|ZIP", required=True, help="Generated pictures")
@click.option("--data", metavar="DIR|ZIP", required=True, help="The data set that the network was trained on")
@click.option("--grid", metavar="FILE.png", type=click.Path(path_type=Path), required=True, help="Sheet to write")
@click.option("--rows", type=click.IntRange(min=1), default=12, show_default=True, help="Pictures on it, evenly spread")
@click.option("--neighbours", type=click.IntRange(min=1), default=4, show_default=True, help="Of each of them")
@click.option(
    "--copy", type=float, default=12, show_default=True, help="Distance up to which a picture counts as a copy"
)
def cmdline(images: str, data: str, grid: Path, rows: int, neighbours: int, copy: float) -> None:
    """Compare generated pictures with the pictures that the network was trained on."""
    require_sheet(grid)
    generated, real = (_pixels(path) for path in (images, data))
    if generated.shape[1:] != real.shape[1:]:
        raise ConfigError(f"{images} holds pictures of another size than {data}; generate them with its network")
    distances = rms_distances(generated, real)
    nearest = distances.min(axis=1)
    asked = np.linspace(0, len(real) - 1, min(len(real), 1000)).round().astype(int)
    among = rms_distances(real[asked], real)
    among[np.arange(len(asked)), asked] = np.inf
    own = among.min(axis=1)
    for name, values in ((f"{len(generated)} generated", nearest), (f"{len(asked)} training", own)):
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        click.echo(
            f"{name} pictures: distance to the nearest {'other ' if values is own else ''}training picture"
            f" {low:.1f} / {middle:.1f} / {high:.1f} (10 %, half, 90 %); up to {copy:g}: {(values <= copy).mean():.1%}"
        )
    shown = np.linspace(0, len(generated) - 1, min(rows, len(generated))).round().astype(int)
    order = distances.argsort(axis=1)[:, :neighbours]
    pictures = np.concatenate([np.concatenate([generated[i : i + 1], real[order[i]]]) for i in shown])
    write_sheet(grid, pictures, num_columns=1 + order.shape[1])


def rms_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, M], of `a` [N, C, H, W] to `b` [M, C, H, W], both uint8."""
    x, y = (pictures.reshape(len(pictures), -1).astype(np.float64) for pictures in (a, b))
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return np.asarray(np.sqrt(squares.clip(0) / x.shape[1]))


def _pixels(path: str) -> np.ndarray:
    dataset = ImageFolderDataset(path, use_labels=False)
    if dataset.holds_latents:
        raise ConfigError(f"{path} holds latents; give pictures, as `dataset_tool.py decode` makes them")
    pixels, _ = dataset.read_batch(range(len(dataset)))
    return pixels


if __name__ == "__main__":
    main(cmdline)
