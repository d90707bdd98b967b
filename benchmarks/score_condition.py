"""Does a conditioned network make what it is given? Measured on pictures of Fashion-MNIST that it was not trained on.

For super-resolution: how far samples, reduced again, are from the small picture that they were made from. For
inpainting: how far the filled pixels are from those that were hidden. Both as the mean absolute difference in levels of
0..255, beside that of another picture of the same class: what a network that does not look would reach at best. Writes
a sheet to look at: input, samples, original.

    python benchmarks/score_condition.py --net=NETWORK --net=NETWORK --sheet=docs/condition.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import numpy as np

from dnnlib.cli import main
from training.condition.cond_files import DatasetPictures
from training.condition.cond_source import RepeatedPictures
from training.condition.spec import LowRes, parse_condition
from training.dataset.image_folder import ImageFolderDataset
from training.fast.prepare import PrepareNetwork
from training.images.sheet import write_sheet
from training.run.batch_condition import pictures_of
from training.sampling.generation import GeneratedImages, generate_images
from training.snapshot import load_snapshot

DATA = Path(__file__).parents[1] / "data" / "fashion-mnist-32-heldout.zip"
ENLARGED = 2


@click.command()
@click.option(
    "--net", "nets", multiple=True, required=True, help="Network of train_edm2.py --condition; may be repeated"
)
@click.option("--num", default=200, show_default=True, help="Pictures, evenly over the classes")
@click.option("--steps", default=18, show_default=True, help="Sampling steps")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a sheet here: a row for each class")
@click.option("--columns", default=4, show_default=True, help="Samples of each picture there")
def score(nets: tuple[str, ...], num: int, steps: int, sheet: Path | None, columns: int) -> None:
    """Print a line for each network, and write the sheet with the networks side by side."""
    dataset = ImageFolderDataset(DATA)
    classes = np.array([int(dataset.get_label(index).argmax()) for index in range(len(dataset))])
    by_class = [np.flatnonzero(classes == chosen) for chosen in range(dataset.label_dim)]
    indices = np.stack([found[: num // len(by_class)] for found in by_class])  # [classes, pictures]
    tiles = []
    for net in nets:
        condition = parse_condition(load_snapshot(net).info["condition"])
        pictures = pictures_of(condition, dataset, indices.flatten().tolist())
        made = sample(net, pictures, len(pictures), steps).astype(float)
        originals, other = originals_of(dataset, indices), originals_of(dataset, np.roll(indices, 1, axis=1))
        if isinstance(condition, LowRes):
            size = condition.factor
            made, originals, other = (reduced(images, size) for images in (made, originals, other))
            compared = np.ones_like(made, dtype=bool)
        else:
            compared = np.stack([hidden_of(pictures, index) for index in range(len(pictures))])
        distance, independent = (np.abs(images - originals)[compared].mean() for images in (made, other))
        click.echo(
            f"{condition!s:<18} pictures {len(pictures):>4}   distance {distance:6.2f}   of another of its class"
            f" {independent:6.2f}"
        )
        if sheet is not None:
            tiles.append(rows(net, pictures_of(condition, dataset, indices[:, 0].tolist()), columns, steps))
    if sheet is not None:
        whole = np.concatenate(tiles, axis=1)  # [rows, tiles, H, W]
        enlarged = whole.reshape(-1, 1, *whole.shape[2:]).repeat(ENLARGED, 2).repeat(ENLARGED, 3)
        write_sheet(sheet, enlarged, num_columns=whole.shape[1])


def sample(net: str, pictures: DatasetPictures | RepeatedPictures, num: int, steps: int) -> np.ndarray:
    """One image [H, W] from each picture."""
    batches = images_of(net, pictures, num, steps)
    return np.concatenate([batch.images.cpu().numpy() for batch in batches if batch.images is not None])[:, 0]


def images_of(net: str, pictures: DatasetPictures | RepeatedPictures, num: int, steps: int) -> GeneratedImages:
    """The request."""
    return generate_images(
        net, seeds=range(num), source=pictures, max_batch_size=50, num_steps=steps, prepare=PrepareNetwork()
    )


def rows(net: str, pictures: DatasetPictures, columns: int, steps: int) -> np.ndarray:
    """What the network sees, samples and original of each picture: uint8 [pictures, columns + 2, H, W]."""
    repeated = RepeatedPictures(pictures, columns)
    made = sample(net, repeated, len(repeated), steps)
    conditioning = images_of(net, pictures, len(pictures), steps).conditioning
    assert conditioning is not None
    seen = np.stack([conditioning.shown(index)[0] for index in range(len(pictures))])
    originals = np.stack([pictures.read(index).pixels[0] for index in range(len(pictures))])
    made = made.reshape(len(pictures), columns, *made.shape[1:])
    return np.concatenate([seen[:, None], made, originals[:, None]], axis=1)


def hidden_of(pictures: DatasetPictures, index: int) -> np.ndarray:
    """What is hidden of a picture: bool [H, W]."""
    hidden = pictures.read(index).hidden
    assert hidden is not None
    return hidden


def originals_of(dataset: ImageFolderDataset, indices: np.ndarray) -> np.ndarray:
    """Pixels [N, H, W] of these pictures."""
    return dataset.read_batch(indices.flatten().tolist())[0][:, 0].astype(float)


def reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """[N, H, W] to [N, H/factor, W/factor]."""
    num, height, width = images.shape
    return images.reshape(num, height // factor, factor, width // factor, factor).mean((2, 4))


if __name__ == "__main__":
    main(score)
