"""The conditioning images of a training run: what its option --condition means for its data, and each batch of them.

Shape legend: N images, C channels, K channels of conditioning images, H x W pixels.
"""

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training.condition.cond_files import DatasetPictures
from training.condition.masks import NUM_DRAWS, uniform_of
from training.condition.spec import Condition, Inpaint, parse_condition
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.run.streams import NoiseStream

MASKS = 8
"""The purpose of the run's stream of random numbers that masks are made of."""

_SEED_OF_SHOWN = 0  # masks of sample grids and metrics: the same for every run, as their seeds are


def condition_of(config: TrainingConfig, dataset: ImageFolderDataset) -> Condition | None:
    """What the run's network is conditioned on; None for a run without. Raises ConfigError where the data is unfit."""
    if config.condition is None:
        return None
    condition = parse_condition(config.condition)
    if config.vae is not None or dataset.holds_latents:
        kind = f"latents, encoded by {config.vae}" if config.vae is not None else "a data set of latents"
        raise ConfigError(
            f"--condition={condition} is for pixels, and this run trains on {kind}; give a data set of pictures"
            " without --encode-on-the-fly"
        )
    condition.check_size(dataset.resolution, dataset.resolution)
    return condition


def batch_condition(
    condition: Condition, clean: torch.Tensor, noise: NoiseStream, start: int, sigma_data: float
) -> torch.Tensor:
    """What the network sees of the images `clean` [N, C, H, W] at positions start, start + 1, ...: [N, K, H, W]."""
    hidden = None
    if isinstance(condition, Inpaint):
        normal = noise.normal(start, len(clean), (NUM_DRAWS,), MASKS)
        hidden = condition.draw_masks(uniform_of(normal), (clean.shape[2], clean.shape[3]))
    return condition.images(clean, hidden, sigma_data)


def shown_pictures(
    condition: Condition, dataset: ImageFolderDataset, num: int, *, classes: list[int | None] | None = None
) -> DatasetPictures:
    """`num` images of the data set to sample from while training, always the same, evenly spread over it.

    With `classes`, one each: the i-th is the first of that class, as far as there is one.
    """
    indices = np.linspace(0, len(dataset) - 1, num).astype(int).tolist()
    if classes is not None and dataset.has_labels:
        wanted = {chosen for chosen in classes if chosen is not None}
        first: dict[int, int] = {}
        for index in range(len(dataset)):
            if not wanted.difference(first):
                break
            first.setdefault(int(dataset.get_label(index).argmax()), index)
        indices = [
            index if chosen is None else first.get(chosen, index)
            for index, chosen in zip(indices, classes, strict=True)
        ]
    return pictures_of(condition, dataset, indices)


def pictures_of(condition: Condition, dataset: ImageFolderDataset, indices: list[int]) -> DatasetPictures:
    """These images of the data set; for inpainting, with masks as in training, from a fixed seed."""
    hidden = None
    if isinstance(condition, Inpaint):
        normal = NoiseStream(_SEED_OF_SHOWN, torch.device("cpu")).normal(0, len(indices), (NUM_DRAWS,), MASKS)
        size = (dataset.resolution, dataset.resolution)
        hidden = condition.draw_masks(uniform_of(normal), size)[:, 0].numpy()
    return DatasetPictures(dataset, indices, hidden=hidden)


def recorded_condition(config: TrainingConfig) -> dict[str, str]:
    """What a network file says of it, in its info."""
    return {} if config.condition is None else {"condition": str(parse_condition(config.condition))}
