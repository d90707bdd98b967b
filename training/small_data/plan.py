"""From a data set to the configuration of `--preset=small`.

Shape legend: N images, C channels, H x W pixels.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.download import is_remote
from dnnlib.errors import ConfigError
from dnnlib.fields import option_name, option_text
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.run.run_data import network_shape, open_dataset
from training.small_data.rules import SHAPES, Facts, Shape, choose, remarks

# For the question whether mirrored images belong to a data set: they do among landscapes, but not among letters.
NUM_IMAGES = 2048  # examined at most, evenly spread over the data set
NUM_QUERIES = 512  # of them whose neighbors are searched, at most
SIDE = 16  # pixels; images are compared at this size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of the preset. `config.data` is left empty, as in the rows of the other presets."""

    config: TrainingConfig
    choices: dict[str, str]  # the reason by the name of the option
    facts: Facts
    dataset: ImageDataset  # as opened for the plan: see `dataset_for`

    def dataset_for(self, config: TrainingConfig) -> ImageDataset:
        """Return the data set with labels and mirrored copies as `config` needs them. Call this once."""
        if not config.uses_labels:
            self.dataset.drop_labels()
        if config.xflip:
            self.dataset.append_mirrored()
        return self.dataset


def make_plan(
    data: str,
    *,
    cond: bool | None,
    xflip: bool | None,
    balance: bool | None = None,
    vae: str | None,
    duration: int | None,
    snapshot: int | None = None,
    batch: int | None = None,
    **streaming: Any,
) -> Plan:
    """Return the plan for the data set at `data`; values other than None were given on the command line.

    `streaming`: shuffle_buffer, data_cache and data_cache_size. Raises ConfigError if the data cannot be opened, or is
    of a kind that the preset does not cover.
    """
    given = {name: value for name, value in streaming.items() if value is not None}
    config = TrainingConfig(data=data, cond=cond is not False, balance=bool(balance), vae=vae, **given)
    dataset = open_dataset(config)
    resolution, num_channels = network_shape(config, dataset)
    latents = dataset.holds_latents or vae is not None
    shape = _shape(data, resolution, latents=latents)
    examined = xflip is None and not dataset.holds_latents and not is_remote(data)
    facts = Facts(
        num_images=len(dataset),
        num_classes=0 if cond is False else dataset.label_dim,
        resolution=resolution,
        num_channels=num_channels,
        latents=latents,
        foreign=foreign_share(dataset) if examined else None,
    )
    config, choices = choose(facts, shape, duration=duration, snapshot=snapshot, batch=batch)
    return Plan(config=config, choices=choices, facts=facts, dataset=dataset)


def describe_plan(plan: Plan, config: TrainingConfig) -> str:
    """Return a line for each choice: the option in `config`, and the reason; "as given" for the user's own values."""
    facts = plan.facts
    kind = "latents" if facts.latents else "images"
    classes = f"{facts.num_classes} classes" if facts.num_classes else "without classes"
    rows = []
    for option, why in plan.choices.items():
        value = value_of(config, option)
        rows.append((f"--{option}={value}", why if value == value_of(plan.config, option) else "as given"))
    if config.rampup * 1e6 > config.duration:
        fit = config.duration / 4e6
        rows.append((f"--rampup={fit:.2g}", "would suit a run this short, in which the learning rate only rises"))
    width = max(len(option) for option, _ in rows)
    return "\n".join(
        [
            f"Chosen for {facts.num_images:,} {kind} of {facts.resolution}x{facts.resolution}, {classes}:",
            *(f"  {option:<{width}}  {why}" for option, why in rows),
            *remarks(facts),
            "",
        ]
    )


def value_of(config: TrainingConfig, option: str) -> str:
    """Return the value of an option as one writes it on the command line."""
    for part in (config, config.network):
        for item in dataclasses.fields(part):
            if item.metadata.get("help") is not None and option_name(part, item) == option:
                return option_text(item, getattr(part, item.name))
    raise KeyError(option)


def _shape(data: str, resolution: int, *, latents: bool) -> Shape:
    shape = SHAPES.get((latents, resolution))
    if shape is not None:
        return shape
    covered = "--preset=small is for images of 32x32 or 64x64, and for latents of 32x32, those of 256x256 images"
    actual = f"{data} holds {'latents' if latents else 'images'} of {resolution}x{resolution}"
    if latents:
        advice = "; --preset=edm2-img512-xs takes these" if resolution == 64 else ""
    elif resolution == 256:
        advice = "; encode these: dataset_tool.py encode"
    else:
        advice = "; dataset_tool.py convert --resolution=32x32 or 64x64 resizes them"
    raise ConfigError(f"{covered}; {actual}{advice}")


def foreign_share(dataset: ImageDataset) -> float:
    """Return how often an image has a nearer neighbor in the set than its mirror image has, from 0 to 1.

    0.5 if mirrored images are as likely as images; towards 1 if they are foreign, and also if many images have a near
    copy in the set, which the mirror image lacks. Ties, as of images that are their own mirror image, count half. The
    arithmetic is exact, so that the result is the same on every machine.
    """
    rows = _spread(len(dataset), NUM_IMAGES)
    return share_of(np.concatenate([_reduced(dataset.read_batch([int(row)])[0]) for row in rows]))


def share_of(images: np.ndarray) -> float:
    """Return the same for `images` [N, C, H, W] of whole numbers."""
    if len(images) < 2:
        return 0.5
    queries = _spread(len(images), NUM_QUERIES)
    own = _nearest(images[queries], images, queries)
    mirrored = _nearest(images[queries][..., ::-1], images, queries)
    return float(np.mean((own < mirrored) + 0.5 * (own == mirrored)))


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _nearest(queries: np.ndarray, images: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the squared distance of each query to the nearest of `images`, except for the one numbered `left_out`."""
    # Whole numbers below 2^53, which float64 adds without rounding.
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (queries, images))
    distances = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    distances[np.arange(len(a)), left_out] = np.inf
    return np.asarray(distances.min(axis=1))


def _reduced(images: np.ndarray) -> np.ndarray:
    """Return sums over squares of pixels, which leave SIDE x SIDE of them: [N, C, SIDE, SIDE], int64."""
    n, c, h, w = images.shape
    step = max(h // SIDE, 1)
    return np.asarray(images.reshape(n, c, h // step, step, w // step, step).sum(axis=(3, 5), dtype=np.int64))
