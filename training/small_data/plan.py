"""From a data set to the configuration of `--preset=small`."""

from dataclasses import dataclass
from typing import Any

from dnnlib.errors import ConfigError
from dnnlib.parse import format_nimg
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.run.state import network_shape
from training.small_data.mirror import foreign_share
from training.small_data.rules import SHAPES, Choice, Facts, Shape, choose, remarks
from training.streaming.remote import is_remote
from training.streaming.streamed import StreamedDataset
from training.training_loop import open_dataset

PRESET = "small"

# Where an option is found in TrainingConfig.network, under the same name but for the dashes.
_OF_NETWORK = ("channels", "channel-mult", "num-blocks", "attn-resolutions", "dropout")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the preset chose. `config.data` is left empty, as in the rows of the other presets."""

    config: TrainingConfig
    choices: tuple[Choice, ...]
    facts: Facts

    def table(self, config: TrainingConfig) -> list[tuple[str, str]]:
        """For each choice `--option=value` as `config` has it, and the reason; "asked for" where the value is another.

        `config` is the plan's with the user's own options put in their places.
        """
        rows = []
        for choice in self.choices:
            value = value_of(config, choice.option)
            why = choice.why if value == value_of(self.config, choice.option) else "asked for"
            rows.append((f"--{choice.option}={value}", why))
        return rows

    @property
    def remarks(self) -> list[str]:
        """What to know before training on so many images, or so few."""
        return remarks(self.facts)


def make_plan(
    data: str, *, cond: bool | None, xflip: bool | None, vae: str | None, duration: int | None, **cache: Any
) -> Plan:
    """The plan for the data set at `data`; what is not None was asked for. `cache`: data_cache and data_cache_size.

    Raises ConfigError where the data cannot be opened, or is of a kind that the preset does not cover.
    """
    config = TrainingConfig(data=data, cond=False, vae=vae, **{k: v for k, v in cache.items() if v is not None})
    dataset = open_dataset(config)
    resolution, num_channels = network_shape(config, dataset)
    latents = dataset.holds_latents or vae is not None
    shape = _shape(data, resolution, latents=latents)
    facts = Facts(
        num_images=len(dataset),
        num_classes=0 if cond is False else _num_classes(config),
        resolution=resolution,
        num_channels=num_channels,
        latents=latents,
        foreign=foreign_share(dataset) if _can_be_mirrored(dataset, data) and xflip is None else None,
    )
    chosen, choices = choose(facts, shape, duration=duration)
    return Plan(config=chosen, choices=choices, facts=facts)


def value_of(config: TrainingConfig, option: str) -> str:
    """The option's value as it is written on the command line."""
    name = option.replace("-", "_")
    value = getattr(config.network if option in _OF_NETWORK else config, name)
    if option in ("duration", "status", "snapshot", "checkpoint"):
        return format_nimg(value)
    if isinstance(value, tuple):
        return ",".join(f"{item:g}" for item in value)
    return str(value) if isinstance(value, bool) else f"{value:g}"


def _shape(data: str, resolution: int, *, latents: bool) -> Shape:
    shape = SHAPES.get((latents, resolution))
    if shape is not None:
        return shape
    covered = "--preset=small is for pictures of 32x32 or 64x64, and for latents of 32x32, those of 256x256 pictures"
    found = f"{data} holds {'latents' if latents else 'pictures'} of {resolution}x{resolution}"
    if latents:
        fit = "; --preset=edm2-img512-xs takes these" if resolution == 64 else ""
    elif resolution == 256:
        fit = "; encode these: dataset_tool.py encode"
    else:
        fit = "; dataset_tool.py convert --resolution=32x32 or 64x64 makes such"
    raise ConfigError(f"{covered}; {found}{fit}")


def _num_classes(config: TrainingConfig) -> int:
    """Of the same data set with its labels, if it has any; open_dataset insists on them, or leaves them out."""
    if not is_remote(config.data):
        return ImageFolderDataset(config.data).label_dim
    return StreamedDataset(
        config.data,
        buffer=config.shuffle_images,
        cache_dir=config.data_cache,
        cache_bytes=config.data_cache_size,
    ).label_dim


def _can_be_mirrored(dataset: ImageFolderDataset, data: str) -> bool:
    return not dataset.holds_latents and not is_remote(data)
