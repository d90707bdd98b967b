"""Scores of a run's averaged networks while it trains, and which of its snapshots is the best so far."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.precision import numerics
from torch_utils.random_state import unchanged_random_state
from training.condition.cond_files import DatasetPictures
from training.condition.spec import Condition
from training.config import MetricsConfig, TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.encoders import Encoder
from training.metrics import results as report
from training.metrics.available import plan_metrics
from training.metrics.evaluate import evaluate_images
from training.metrics.metric_table import METRICS
from training.metrics.reference import load_stats
from training.run.batch_condition import shown_pictures
from training.run.run_folder import RunFolder
from training.sampling.generation import generate_images

_PREFIX = "Metrics/"
_SETTINGS = f"{_PREFIX}settings"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The scores at one point of the run, as stats.jsonl has them."""

    stats: dict[str, float]  # Metrics/{metric}{suffix}, e.g. Metrics/fd_efflite0-0.050: every metric, every EMA length
    texts: dict[str, str]  # Metrics/settings, and Metrics/best_{metric}: the best snapshot's file; main process only


def check_metrics(config: TrainingConfig, dataset: ImageFolderDataset) -> None:
    """Raise ConfigError where the run's images cannot be measured. Reads nothing but what is in memory."""
    decoded = config.vae is not None or dataset.holds_latents
    if config.metrics is not None and not decoded and dataset.num_channels not in (1, 3):
        raise ConfigError(
            f"--metrics={','.join(config.metrics.names)} takes images of 1 or 3 channels; {config.data} has"
            f" {dataset.num_channels}"
        )


class TrainingMetrics:
    """What measures a run. Making it loads the reference and the detectors: ConfigError where that cannot be.

    Neither that nor `measure` leaves a trace in any global random state, so that the run's result is the same without.
    """

    def __init__(self, config: MetricsConfig, *, snapshot: int, folder: RunFolder, world: World) -> None:
        self.every = snapshot if config.every is None else config.every  # images between measurements
        self._config = config
        self._folder = folder
        self._world = world
        with unchanged_random_state(world.device):
            self._reference = None if config.ref is None else load_stats(config.ref)
            self._plan = plan_metrics(config.names, self._reference, device=world.device, weights=config.weights)
        self.notes = report.notes(self._plan.skipped, self._plan.detectors)  # for the user
        self._scores: dict[str, dict[str, float]] = {name: {} for name in self._plan.metrics}  # by snapshot's file
        self._condition: str | None = None
        self._pictures: DatasetPictures | None = None

    def condition_on(self, condition: Condition | None, dataset: ImageFolderDataset) -> None:
        """Let networks that see an image see those of the data set, as many as are generated, of its classes."""
        if condition is not None:
            self._condition = str(condition)
            self._pictures = shown_pictures(condition, dataset, min(self._config.num, len(dataset)))

    def prepare(self, encoder: Encoder, nimg: int) -> None:
        """Load what `encoder` decodes with, and take up the scores that were recorded until `nimg` images."""
        with unchanged_random_state(self._world.device):
            encoder.init(self._world.device)
        if not self._world.is_main:
            return
        for line in self._folder.recorded_stats(nimg):
            if line.get(_SETTINGS) == self._settings:
                self._remember(line, round(line["Progress/kimg"] * 1e3))

    def measure(self, emas: Iterable[tuple[torch.nn.Module, str]], encoder: Encoder, nimg: int) -> Measured:
        """Score the averages at `nimg` images, given with their suffixes; their snapshots must be there already.

        To be called by every process. Each average is taken as its snapshot has it, in float16, so that
        `calculate_metrics.py gen --net=SNAPSHOT` gives the same number.
        """
        stats: dict[str, float] = {}
        with unchanged_random_state(self._world.device), numerics(cudnn_benchmark=False):
            for ema, suffix in emas:
                scores = evaluate_images(
                    self._images(copy.deepcopy(ema).half(), encoder),
                    metrics=self._plan.metrics,
                    detectors=self._plan.detectors,
                    reference=self._reference,
                    world=self._world,
                )
                stats |= {f"{_PREFIX}{name}{suffix}": score.value for name, score in scores.items()}
        if not self._world.is_main:
            return Measured(stats=stats, texts={})
        self._remember(stats, nimg)
        best = {f"{_PREFIX}best_{name}": file for name, file in self.best().items()}
        return Measured(stats=stats, texts={**best, _SETTINGS: self._settings})

    def best(self) -> dict[str, str]:
        """The name of the snapshot with the best score so far, by metric; none where there is no finite score."""
        found = {}
        for name, scores in self._scores.items():
            finite = {file: value for file, value in scores.items() if math.isfinite(value)}
            if finite:
                found[name] = (min if METRICS[name].lower_is_better else max)(finite, key=finite.__getitem__)
        return found

    def _images(self, net: torch.nn.Module, encoder: Encoder) -> Any:
        c = self._config
        return generate_images(
            net=net,
            encoder=encoder,
            seeds=range(c.num),
            max_batch_size=c.batch,
            world=self._world,
            source=self._pictures,
            condition=self._condition,
            num_steps=c.steps,
        )

    @property
    def _settings(self) -> str:
        """What the scores depend on beside the network: only those with the same may be compared."""
        c = self._config
        weights = "".join(f", {name} by {path}" for name, path in sorted(c.weights.items()))
        return f"{c.num} images, {c.steps} steps, reference {c.ref}{weights}"

    def _remember(self, stats: dict[str, Any], nimg: int) -> None:
        """Note the scores in `stats` of snapshots that are there."""
        for key, value in stats.items():
            name, _, std = key.removeprefix(_PREFIX).rpartition("-")
            if key.startswith(_PREFIX) and name in self._scores and isinstance(value, float):
                files = (self._folder.snapshot_path(nimg, f"-{std}", kind) for kind in ("safetensors", "pkl"))
                file = next((path for path in files if path.is_file()), None)
                if file is not None:
                    self._scores[name][file.name] = value
