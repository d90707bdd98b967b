"""Measure whether a conditioned network follows its input, on images of Fashion-MNIST that it was not trained on.

For super-resolution: the distance of the samples, reduced again, from the small image that they were made from. For
inpainting: the distance of the filled pixels from the hidden ones. Both are mean absolute differences in levels of
0..255. For comparison, the distance of another image of the same class: the best that a network without the input could
reach. Writes a sheet: input, samples, original.

    python -m benchmarks.score_condition --net=NETWORK --net=NETWORK --sheet=docs/condition.png
"""

from pathlib import Path

import click
import numpy as np

from dnnlib.cli import PATH, main
from training.condition.source_images import DatasetImages, RepeatedImages
from training.condition.spec import LowRes, parse_condition
from training.dataset.image_folder import ImageFolderDataset
from training.fast.prepare import PrepareNetwork
from training.images.sheet import write_sheet
from training.run.batch_inputs import dataset_images
from training.sampling.generation import GeneratedImages, generate_images
from training.snapshot import load_snapshot

DATA = Path(__file__).parents[1] / "data" / "fashion-mnist-32-heldout.zip"
ENLARGED = 2


@click.command()
@click.option(
    "--net", "nets", multiple=True, required=True, help="Network of train_edm2.py --condition; may be repeated"
)
@click.option("--num", default=200, show_default=True, help="Images, evenly over the classes")
@click.option("--steps", default=18, show_default=True, help="Sampling steps")
@click.option("--sheet", type=PATH, help="Write a sheet here: a row for each class")
@click.option("--columns", default=4, show_default=True, help="Samples of each image on the sheet")
def score(nets: tuple[str, ...], num: int, steps: int, sheet: Path | None, columns: int) -> None:
    """Print a line for each network, and write the sheet with the networks side by side."""
    dataset = ImageFolderDataset(DATA)
    classes = np.array([int(dataset.get_label(index).argmax()) for index in range(len(dataset))])
    by_class = [np.flatnonzero(classes == chosen) for chosen in range(dataset.label_dim)]
    indices = np.stack([rows[: num // len(by_class)] for rows in by_class])  # [classes, images]
    tiles = []
    for net in nets:
        condition = parse_condition(load_snapshot(net).info["condition"])
        sources = dataset_images(condition, dataset, indices.flatten().tolist())
        made = sample(net, sources, len(sources), steps).astype(float)
        originals, other = originals_of(dataset, indices), originals_of(dataset, np.roll(indices, 1, axis=1))
        if isinstance(condition, LowRes):
            size = condition.factor
            made, originals, other = (reduced(images, size) for images in (made, originals, other))
            compared = np.ones_like(made, dtype=bool)
        else:
            compared = np.stack([hidden_of(sources, index) for index in range(len(sources))])
        distance, independent = (np.abs(images - originals)[compared].mean() for images in (made, other))
        click.echo(
            f"{condition!s:<18} images {len(sources):>4}   distance {distance:6.2f}   of another of its class"
            f" {independent:6.2f}"
        )
        if sheet is not None:
            tiles.append(rows(net, dataset_images(condition, dataset, indices[:, 0].tolist()), columns, steps))
    if sheet is not None:
        whole = np.concatenate(tiles, axis=1)  # [rows, tiles, H, W]
        enlarged = whole.reshape(-1, 1, *whole.shape[2:]).repeat(ENLARGED, 2).repeat(ENLARGED, 3)
        write_sheet(sheet, enlarged, num_columns=whole.shape[1])


def sample(net: str, sources: DatasetImages | RepeatedImages, num: int, steps: int) -> np.ndarray:
    """Return one sample [H, W] for each conditioning image."""
    batches = images_of(net, sources, num, steps)
    return np.concatenate([batch.images.cpu().numpy() for batch in batches if batch.images is not None])[:, 0]


def images_of(net: str, sources: DatasetImages | RepeatedImages, num: int, steps: int) -> GeneratedImages:
    """Return the images of `net`, to be iterated over."""
    return generate_images(
        net, seeds=range(num), source=sources, max_batch_size=50, num_steps=steps, prepare=PrepareNetwork()
    )


def rows(net: str, sources: DatasetImages, columns: int, steps: int) -> np.ndarray:
    """Return the input, samples and original of each image: uint8 [images, columns + 2, H, W]."""
    repeated = RepeatedImages(sources, columns)
    made = sample(net, repeated, len(repeated), steps)
    conditioning = images_of(net, sources, len(sources), steps).conditioning
    assert conditioning is not None
    inputs = np.stack([conditioning.shown(index)[0] for index in range(len(sources))])
    originals = np.stack([sources.read(index).pixels[0] for index in range(len(sources))])
    made = made.reshape(len(sources), columns, *made.shape[1:])
    return np.concatenate([inputs[:, None], made, originals[:, None]], axis=1)


def hidden_of(sources: DatasetImages, index: int) -> np.ndarray:
    """Return the mask of the hidden pixels: bool [H, W]."""
    hidden = sources.read(index).hidden
    assert hidden is not None
    return hidden


def originals_of(dataset: ImageFolderDataset, indices: np.ndarray) -> np.ndarray:
    """Return the pixels [N, H, W] of these images."""
    return dataset.read_batch(indices.flatten().tolist())[0][:, 0].astype(float)


def reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """Reduce images [N, H, W] to [N, H/factor, W/factor]."""
    num, height, width = images.shape
    return images.reshape(num, height // factor, factor, width // factor, factor).mean((2, 4))


if __name__ == "__main__":
    main(score)
