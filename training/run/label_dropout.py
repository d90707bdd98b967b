"""What a run does with labels beside learning them: classes seen equally often, labels left out now and then."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training.run.streams import NoiseStream

if TYPE_CHECKING:
    from training.config import TrainingConfig
    from training.dataset.image_folder import ImageFolderDataset

# Of the run's streams of random numbers; training/run/state.py has the others.
_PURPOSE = 16


def check_options(config: "TrainingConfig", *, is_remote: bool) -> None:
    """Raise ConfigError where --balance and --label-dropout cannot work, whatever the data set is."""
    probability = config.label_dropout
    if not (0 <= probability < 1 and math.isfinite(probability)):
        raise ConfigError(
            f"--label-dropout={probability} is no probability below 1; 0.1 is usual, and --cond=False trains without"
            " labels"
        )
    if probability and not config.cond:
        raise ConfigError(f"--label-dropout={probability} is for conditional networks; leave it or --cond=False out")
    if config.balance and is_remote:
        raise ConfigError(
            f"--balance needs all images at hand, and of --data={config.data} a part is at a time; copy the data set to"
            " a local disk, or leave --balance out"
        )


def uses_labels(config: "TrainingConfig") -> bool:
    """Whether the labels of the data set are to be read."""
    return config.cond or config.balance


def check_labels(config: "TrainingConfig", dataset: "ImageFolderDataset") -> None:
    """Raise ConfigError where the data set's labels do not allow what the options ask for."""
    if config.balance and not dataset.has_labels:
        raise ConfigError(f"{config.data} has no labels, and so no classes to --balance; add labels, or leave it out")
    if config.balance and not dataset.has_onehot_labels:
        raise ConfigError(
            f"--balance needs class indices as labels, and those of {config.data} are vectors of {dataset.label_dim};"
            " leave it out"
        )
    if config.label_dropout and not dataset.has_labels:
        raise ConfigError(
            f"{config.data} has no labels that --label-dropout={config.label_dropout} could leave out; add labels, or"
            " train with --cond=False alone"
        )
    if config.cond and not dataset.has_labels:
        raise ConfigError(
            f"{config.data} has no labels, which a conditional network needs; add them, or use --cond=False"
        )


def describe_labels(config: "TrainingConfig", dataset: "ImageFolderDataset") -> str:
    """How the run uses the classes, on a line."""
    text = f"{dataset.label_dim}" if config.cond else "not used"
    if config.balance:
        counts = np.bincount(dataset.item_labels())
        filled = counts[counts > 0]
        empty = f", {len(counts) - len(filled)} without any" if len(filled) < len(counts) else ""
        text += f", seen equally often ({filled.min()} to {filled.max()} images each{empty})"
    if config.label_dropout:
        text += f"; labels are left out with probability {config.label_dropout:g}"
    return text


def recorded_labels(config: "TrainingConfig") -> dict[str, Any]:
    """What a snapshot says of it, by which tools know that a network also works without labels."""
    options = {"balance": config.balance, "label_dropout": config.label_dropout}
    return {name: value for name, value in options.items() if value}


def dropped(labels: torch.Tensor, noise: NoiseStream, start: int, probability: float) -> torch.Tensor:
    """`labels` [N, L] of the positions start .. start+N-1 of the run, with `probability` those of one zeroed."""
    kept = noise.uniform(start, len(labels), (1,), _PURPOSE) >= probability
    return labels * kept
