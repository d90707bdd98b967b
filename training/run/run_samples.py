"""Sample grids of a run while it trains: the same seeds at every snapshot, a row for each class.

Shape legend: N images, C channels, H x W pixels.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.random_state import unchanged_random_state
from training.condition.cond_source import RepeatedPictures
from training.condition.conditioning import Conditioning, conditioning_of
from training.condition.spec import Condition
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.encoders import Encoder
from training.images.sheet import SHEET_GAP, write_sheet
from training.presets import GENERATION
from training.run.batch_condition import shown_pictures
from training.run.run_folder import RunFolder
from training.run.samples_config import SamplesConfig
from training.sampling.generation import generate_images

FORMAT = "edm2-samples"
VERSION = 1
TEXT_KEY = "edm2"  # of the PNG text chunk that holds the record

MAX_ROWS = 10  # of a grid whose classes were not chosen

# Where a training preset has no generation preset that names a length.
_SHIPPED_STDS = {"fashion": 0.100}  # models/README.md


def preferred_std(preset: str, tracked: Sequence[float]) -> float:
    """The tracked EMA length that is nearest to the best known one of a training preset; the first where none is known.

    Known are the lengths of the networks with the best published FID, by the name of the generation preset's file.
    """
    row = GENERATION.get(f"{preset}-fid")
    known = _SHIPPED_STDS.get(preset)
    if row is not None:
        known = float(row.net.rpartition("-")[2].removesuffix(".pkl"))
    return tracked[0] if known is None else min(tracked, key=lambda std: abs(std - known))


def check_samples(config: TrainingConfig, dataset: ImageFolderDataset) -> None:
    """Raise ConfigError where no grid can be drawn of this data. Reads nothing but what is in memory."""
    if config.samples is None:
        return
    decoded = config.vae is not None or dataset.holds_latents
    if not decoded and dataset.num_channels not in (1, 3):
        raise ConfigError(
            f"--samples writes images of 1 or 3 channels; {config.data} has {dataset.num_channels}; leave it out"
        )
    grid_rows(config.samples, dataset.label_dim if config.cond else 0)


def grid_rows(config: SamplesConfig, label_dim: int) -> list[int | None]:
    """The class of each row; None for rows of an unconditional network, of which there are as many as columns.

    Raises ConfigError for classes that the network does not know.
    """
    if label_dim == 0:
        if config.classes is not None:
            raise ConfigError("--samples-classes has no meaning for an unconditional network; leave it out")
        return [None] * min(config.num, MAX_ROWS)
    if config.classes is None:
        return [int(index) for index in np.linspace(0, label_dim - 1, min(label_dim, MAX_ROWS)).round()]
    if max(config.classes) >= label_dim:
        raise ConfigError(f"--samples-classes has {max(config.classes)}; the classes are 0 to {label_dim - 1}")
    return list(config.classes)


class RunSamples:
    """What draws a run's grids. It leaves no trace in the run: neither in weights nor in any global random state."""

    def __init__(self, config: SamplesConfig, *, ema_stds: Sequence[float], folder: RunFolder, world: World) -> None:
        config.check_tracked(ema_stds)
        self._config = config
        self._std = ema_stds[0] if config.std is None else config.std
        self._folder = folder
        self._world = world
        self._condition: Condition | None = None
        self._dataset: ImageFolderDataset | None = None

    def condition_on(self, condition: Condition | None, dataset: ImageFolderDataset) -> None:
        """Let networks that see an image see those of the data set: one a row, shown on the left, and the original on
        the right."""
        self._condition, self._dataset = condition, dataset

    def prepare(self, encoder: Encoder) -> None:
        """Load what `encoder` decodes with. Raises ConfigError where that cannot be had."""
        try:
            with unchanged_random_state(self._world.device):
                encoder.init(self._world.device)
        except ConfigError as error:
            raise ConfigError(f"{error}; --samples needs it to decode latents, training goes without") from None

    def draw(self, emas: Iterable[tuple[Any, str]], encoder: Encoder, nimg: int) -> Path:
        """Write the grid of the averages at `nimg` images, given with their suffixes ('-0.050'); the file's path.

        To be called by every process, which takes all of `emas`: the images are dealt to all. The average is taken as
        its snapshot has it, in float16, so that `generate_images.py --net=SNAPSHOT` gives the same images. Raises
        ConfigError where the file cannot be written.
        """
        net = None
        for ema, suffix in emas:  # to its end: the processes may be gathering them
            if suffix == f"-{self._std:.3f}":
                net = copy.deepcopy(ema).half()
        assert net is not None
        rows = grid_rows(self._config, net.label_dim)
        conditioning = self._conditioning(net, rows)
        images = self._images(net, encoder, rows, conditioning)
        path = self._folder.path / f"samples-{nimg // 1000:07d}.png"
        if self._world.is_main:
            about = {**self._record(rows, images.shape, nimg), "label_dim": net.label_dim}
            columns = self._config.num
            if conditioning is not None:
                images, columns = _with_pictures(images, conditioning, len(rows)), columns + 2
                about |= {"condition": str(self._condition), "pictures": ["input", "original"]}
            write_sheet(path, images, num_columns=columns, texts={TEXT_KEY: json.dumps(about)})
        return path

    def _conditioning(self, net: torch.nn.Module, rows: list[int | None]) -> Conditioning | None:
        """What the network sees, a picture for each row; None for one that sees none."""
        if self._condition is None:
            return None
        assert self._dataset is not None
        pictures = shown_pictures(self._condition, self._dataset, len(rows), classes=rows)
        return conditioning_of(net, str(self._condition), pictures, None, num_images=len(rows))

    def _images(
        self, net: torch.nn.Module, encoder: Encoder, rows: list[int | None], conditioning: Conditioning | None
    ) -> np.ndarray:
        """All images, row by row, in every process: uint8 [N, C, H, W]."""
        seen: dict[str, Any] = {}
        if conditioning is not None:
            repeated = RepeatedPictures(conditioning.pictures, self._config.num)
            seen = {"source": repeated, "condition": str(self._condition)}
        classes = [row for row in rows if row is not None for _ in range(self._config.num)]
        own: list[tuple[np.ndarray, np.ndarray]] = []
        with unchanged_random_state(self._world.device), numerics(cudnn_benchmark=False):
            for batch in generate_images(
                net=net,
                encoder=encoder,
                seeds=range(len(rows) * self._config.num),
                class_idx=classes or None,
                max_batch_size=self._config.batch,
                world=self._world,
                num_steps=self._config.steps,
                **seen,
            ):
                if batch.images is not None:
                    own.append((batch.indices, batch.images.cpu().numpy()))
        found = [part for parts in self._world.all_gather_objects(own) for part in parts]
        order = np.argsort(np.concatenate([indices for indices, _ in found]))
        return np.asarray(np.concatenate([images for _, images in found])[order])

    def _record(self, rows: list[int | None], shape: tuple[int, ...], nimg: int) -> dict[str, object]:
        """What the PNG's text chunk says."""
        columns = self._config.num
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "nimg": nimg,
            "ema_std": self._std,
            "classes": rows,
            "seeds": [list(range(start, start + columns)) for start in range(0, len(rows) * columns, columns)],
            "steps": self._config.steps,
            "solver": "heun",
            "image": list(shape[1:]),  # channels, height, width
            "gap": SHEET_GAP,
        }


def _with_pictures(images: np.ndarray, conditioning: Conditioning, num_rows: int) -> np.ndarray:
    """The images [N, C, H, W] of a grid with what the network saw in front of each row, and the original behind."""
    rows = images.reshape(num_rows, -1, *images.shape[1:])
    inputs = np.stack([conditioning.shown(row) for row in range(num_rows)])[:, None]
    originals = np.stack([conditioning.pictures.read(row).pixels for row in range(num_rows)])[:, None]
    return np.concatenate([inputs, rows, originals], axis=1).reshape(-1, *images.shape[1:])
