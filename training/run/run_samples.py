"""Sample grids of a run while it trains: the same seeds at every snapshot, a row for each class.

Shape legend: N images, C channels, H x W pixels.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.precision import numerics, unchanged_random_state
from training.condition.conditioning import Conditioning, conditioning_of
from training.condition.source_images import RepeatedImages
from training.config import SamplesConfig, TrainingConfig
from training.dataset.contract import ImageDataset
from training.fast.prepare import PrepareNetwork
from training.images.sheet import SHEET_GAP, write_sheet
from training.presets import GENERATION
from training.run.batch_inputs import shown_images
from training.run.run_folder import RunFolder
from training.run.state import TrainingState
from training.sampling.generation import class_index, generate_images

FORMAT = "edm2-samples"
VERSION = 1
TEXT_KEY = "edm2"  # of the PNG text chunk that holds the record

MAX_ROWS = 10  # of a grid whose classes were not chosen

# For training presets without a generation preset.
_SHIPPED_STDS = {"fashion": 0.100}  # models/README.md


def preferred_std(preset: str, tracked: Sequence[float]) -> float:
    """Return the tracked EMA length nearest to the best one of a training preset; the first if that is unknown.

    The best length is that of the network with the best published FID, from its file name in the generation preset.
    """
    row = GENERATION.get(f"{preset}-fid")
    best = _SHIPPED_STDS.get(preset)
    if row is not None:
        best = float(row.net.rpartition("-")[2].removesuffix(".pkl"))
    return tracked[0] if best is None else min(tracked, key=lambda std: abs(std - best))


def check_samples(config: TrainingConfig, dataset: ImageDataset) -> None:
    """Raise ConfigError if no grid can be drawn for this data. Reads no file."""
    if config.samples is not None:
        grid_rows(config.samples, dataset.label_dim if config.cond else 0)


def with_class_numbers(config: TrainingConfig, dataset: ImageDataset) -> TrainingConfig:
    """Return the configuration with numbers for names in --samples-classes. Raises ConfigError for unknown names."""
    if config.samples is None or config.samples.classes is None or not config.cond:
        return config
    names, owner = dataset.class_names or [], f"--data={config.data}"
    numbers = tuple(class_index(name, names, dataset.label_dim, owner) for name in config.samples.classes)
    return dataclasses.replace(config, samples=dataclasses.replace(config.samples, classes=numbers))


def grid_rows(config: SamplesConfig, label_dim: int) -> list[int | None]:
    """Return the class of each row. An unconditional network has as many rows as columns, each None.

    Raises ConfigError for classes that the network does not know.
    """
    if label_dim == 0:
        if config.classes is not None:
            raise ConfigError("--samples-classes is unused by an unconditional network; leave it out")
        return [None] * min(config.num, MAX_ROWS)
    if config.classes is None:
        return [int(index) for index in np.linspace(0, label_dim - 1, min(label_dim, MAX_ROWS)).round()]
    unknown = [index for index in config.classes if isinstance(index, str) or index >= label_dim]
    if unknown:
        raise ConfigError(f"--samples-classes has {unknown[-1]}; the classes are 0 to {label_dim - 1}")
    return [int(index) for index in config.classes]


class RunSamples:
    """Draws the grids of the run of `state`, without any effect on its weights or on a global random state.

    Loads what the encoder decodes with; raises ConfigError if that fails. Networks that take a conditioning image see
    one of the data set per row, shown on the left, with the original on the right.
    """

    def __init__(self, config: SamplesConfig, state: TrainingState, dataset: ImageDataset, folder: RunFolder) -> None:
        self._config, self._run_config = config, state.config
        self._std = state.config.ema_stds[0] if config.std is None else config.std
        self._folder = folder
        self._world, self._encoder = state.world, state.encoder
        self._condition = state.condition
        self._dataset = dataset
        try:
            with unchanged_random_state(self._world.device):
                self._encoder.init(self._world.device)
        except ConfigError as error:
            raise ConfigError(f"{error}; --samples decodes latents with it, training does not need it") from None

    def draw(self, emas: Iterable[tuple[Any, str]], nimg: int) -> Path:
        """Write the grid of the averages at `nimg` images, given with their suffixes ('-0.050'); return the file.

        Every process calls this and takes all of `emas`: the images are dealt to all. The average is rounded to float16
        as in its snapshot, so that `generate_images.py --net=SNAPSHOT` gives the same images. Raises ConfigError if the
        file cannot be written.
        """
        net = None
        for ema, suffix in emas:  # all of them: the processes may be gathering them
            if suffix == f"-{self._std:.3f}":
                net = copy.deepcopy(ema).half()
        assert net is not None
        rows = grid_rows(self._config, net.label_dim)
        conditioning = self._conditioning(net, rows)
        images = self._images(net, rows, conditioning)
        path = self._folder.samples_path(self._run_config, nimg)
        if self._world.is_main:
            record = {**self._record(rows, images.shape, nimg), "label_dim": net.label_dim}
            names = self._dataset.class_names if net.label_dim else None
            if names is not None:
                record["class_names"] = [names[row] if row is not None and row < len(names) else None for row in rows]
            columns = self._config.num
            if conditioning is not None:
                images, columns = _with_conditioning(images, conditioning, len(rows)), columns + 2
                record |= {"condition": str(self._condition), "pictures": ["input", "original"]}
            write_sheet(path, images, num_columns=columns, texts={TEXT_KEY: json.dumps(record)})
        return path

    def _conditioning(self, net: torch.nn.Module, rows: list[int | None]) -> Conditioning | None:
        """Return what the network sees, one image per row; None if it takes no conditioning image."""
        if self._condition is None:
            return None
        sources = shown_images(self._condition, self._dataset, len(rows), classes=rows)
        return conditioning_of(net, str(self._condition), sources, None, num_images=len(rows))

    def _images(self, net: torch.nn.Module, rows: list[int | None], conditioning: Conditioning | None) -> np.ndarray:
        """Return all images, row by row, in every process: uint8 [N, C, H, W]."""
        condition_kwargs: dict[str, Any] = {}
        if conditioning is not None:
            repeated = RepeatedImages(conditioning.sources, self._config.num)
            condition_kwargs = {"source": repeated, "condition": str(self._condition)}
        classes = [row for row in rows if row is not None for _ in range(self._config.num)]
        own: list[tuple[np.ndarray, np.ndarray]] = []
        with unchanged_random_state(self._world.device), numerics(cudnn_benchmark=False):
            for batch in generate_images(
                net=net,
                encoder=self._encoder,
                seeds=range(len(rows) * self._config.num),
                class_idx=classes or None,
                max_batch_size=self._config.batch,
                world=self._world,
                prepare=PrepareNetwork(),
                num_steps=self._config.steps,
                **condition_kwargs,
            ):
                if batch.images is not None:
                    own.append((batch.indices, batch.images.cpu().numpy()))
        every = [batch for batches in self._world.all_gather_objects(own) for batch in batches]
        order = np.argsort(np.concatenate([indices for indices, _ in every]))
        return np.asarray(np.concatenate([images for _, images in every])[order])

    def _record(self, rows: list[int | None], shape: tuple[int, ...], nimg: int) -> dict[str, object]:
        """Return the content of the PNG's text chunk."""
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


def _with_conditioning(images: np.ndarray, conditioning: Conditioning, num_rows: int) -> np.ndarray:
    """Return the images [N, C, H, W] of a grid with what the network saw before each row, and the original after it."""
    rows = images.reshape(num_rows, -1, *images.shape[1:])
    inputs = np.stack([conditioning.shown(row) for row in range(num_rows)])[:, None]
    originals = np.stack([conditioning.sources.read(row).pixels for row in range(num_rows)])[:, None]
    return np.concatenate([inputs, rows, originals], axis=1).reshape(-1, *images.shape[1:])
