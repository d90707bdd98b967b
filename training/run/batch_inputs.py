"""Inputs of a step that are drawn besides noise: conditioning images, and labels that are left out.

Shape legend: N images, C channels, K channels of conditioning images, L labels, H x W pixels.
"""

import numpy as np
import torch

from training.condition.masks import NUM_DRAWS, uniform_of
from training.condition.source_images import DatasetImages
from training.condition.spec import Condition, Inpaint
from training.dataset.contract import ImageDataset
from training.run.streams import NoiseStream, Purpose

_SHOWN_SEED = 0  # for masks of sample grids and metrics: the same for every run, as their seeds are


def drop_labels(labels: torch.Tensor, noise: NoiseStream, start: int, probability: float) -> torch.Tensor:
    """Return labels [N, L] of the positions start .. start+N-1 of the run, each set to zero with `probability`."""
    kept = noise.uniform(start, len(labels), (1,), Purpose.LABELS) >= probability
    return labels * kept


def condition_images(
    condition: Condition, clean: torch.Tensor, noise: NoiseStream, start: int, sigma_data: float
) -> torch.Tensor:
    """Return conditioning images [N, K, H, W] for the images `clean` [N, C, H, W] at positions start .. start+N-1."""
    hidden = None
    if isinstance(condition, Inpaint):
        normal = noise.normal(start, len(clean), (NUM_DRAWS,), Purpose.MASKS)
        hidden = condition.draw_masks(uniform_of(normal), (clean.shape[2], clean.shape[3]))
    return condition.images(clean, hidden, sigma_data)


def shown_images(
    condition: Condition, dataset: ImageDataset, num: int, *, classes: list[int | None] | None = None
) -> DatasetImages:
    """Return `num` images of the data set to condition samples on, always the same, evenly spread over it.

    With `classes`, one for each: image i is the first of class i, if the data set has one.
    """
    indices = np.linspace(0, len(dataset) - 1, num).astype(int).tolist()
    if classes is not None and dataset.has_labels:
        missing = {each for each in classes if each is not None}
        first: dict[int, int] = {}
        for index in range(len(dataset)):
            if not missing.difference(first):
                break
            first.setdefault(int(dataset.get_label(index).argmax()), index)
        indices = [
            index if each is None else first.get(each, index) for index, each in zip(indices, classes, strict=True)
        ]
    return dataset_images(condition, dataset, indices)


def dataset_images(condition: Condition, dataset: ImageDataset, indices: list[int]) -> DatasetImages:
    """Return images of the data set to condition on; for inpainting, with masks as in training, from a fixed seed."""
    hidden = None
    if isinstance(condition, Inpaint):
        normal = NoiseStream(_SHOWN_SEED, torch.device("cpu")).normal(0, len(indices), (NUM_DRAWS,), Purpose.MASKS)
        size = (dataset.resolution, dataset.resolution)
        hidden = condition.draw_masks(uniform_of(normal), size)[:, 0].numpy()
    return DatasetImages(dataset, indices, hidden=hidden)
