"""Scores of a run's averaged networks while it trains, and which of its snapshots is the best so far."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.precision import numerics, unchanged_random_state
from training.config import MetricsConfig
from training.dataset.contract import ImageDataset
from training.fast.prepare import PrepareNetwork
from training.metrics.available import plan_metrics
from training.metrics.evaluate import evaluate_images
from training.metrics.metric_table import best_of
from training.metrics.reference import load_stats
from training.metrics.results import notes
from training.run.batch_inputs import shown_images
from training.run.run_folder import RunFolder
from training.run.state import TrainingState
from training.sampling.generation import generate_images

_PREFIX = "Metrics/"
_SETTINGS = f"{_PREFIX}settings"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The scores at one point of the run, as in stats.jsonl."""

    stats: dict[str, float]  # Metrics/{metric}{suffix}, e.g. Metrics/fd_efflite0-0.050: every metric, every EMA length
    texts: dict[str, str]  # Metrics/settings, and Metrics/best_{metric}: the best snapshot's file; main process only


class TrainingMetrics:
    """Measures the run of `state`, and remembers the scores recorded so far.

    Loads the reference, the detectors and what the encoder decodes with; raises ConfigError if that fails. Neither that
    nor `measure` changes any global random state, so that the result of the run is the same without.

    Networks that take a conditioning image see those of the data set, as many as images are generated.
    """

    def __init__(self, config: MetricsConfig, state: TrainingState, dataset: ImageDataset, folder: RunFolder) -> None:
        # Images between measurements.
        self.every = state.config.snapshot if config.every is None else config.every
        self._config, self._run_config = config, state.config
        self._folder = folder
        self._world, self._encoder = state.world, state.encoder
        with unchanged_random_state(self._world.device):
            self._reference = None if config.ref is None else load_stats(config.ref)
            self._plan = plan_metrics(config.names, self._reference, device=self._world.device, weights=config.weights)
            self._encoder.init(self._world.device)
        self.notes = notes(self._plan.skipped, self._plan.detectors)  # for the user
        self._scores: dict[str, dict[str, float]] = {name: {} for name in self._plan.metrics}  # by snapshot's file
        self._conditioning: dict[str, Any] = {}
        if state.condition is not None:
            source = shown_images(state.condition, dataset, min(config.num, len(dataset)))
            self._conditioning = {"source": source, "condition": str(state.condition)}
        for line in folder.recorded_stats(state.nimg) if self._world.is_main else ():
            if line.get(_SETTINGS) == self._settings:
                self._remember(line, round(line["Progress/kimg"] * 1e3))

    def measure(self, emas: Iterable[tuple[torch.nn.Module, str]], nimg: int) -> Measured:
        """Score the averages at `nimg` images, given with their suffixes; their snapshots must exist already.

        Every process calls this. Each average is rounded to float16 as in its snapshot, so that
        `calculate_metrics.py gen --net=SNAPSHOT` gives the same number.
        """
        stats: dict[str, float] = {}
        with unchanged_random_state(self._world.device), numerics(cudnn_benchmark=False):
            for ema, suffix in emas:
                scores = evaluate_images(
                    self._images(copy.deepcopy(ema).half()),
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
        """Return the file of the snapshot with the best finite score so far, by metric."""
        found = {}
        for name, scores in self._scores.items():
            file = best_of(name, scores, scores.__getitem__)
            if file is not None:
                found[name] = file
        return found

    def _images(self, net: torch.nn.Module) -> Any:
        c = self._config
        return generate_images(
            net=net,
            encoder=self._encoder,
            seeds=range(c.num),
            max_batch_size=c.batch,
            world=self._world,
            prepare=PrepareNetwork(),
            num_steps=c.steps,
            **self._conditioning,
        )

    @property
    def _settings(self) -> str:
        """Everything besides the network that scores depend on; scores with different settings are not compared."""
        c = self._config
        weights = "".join(f", {name} by {path}" for name, path in sorted(c.weights.items()))
        return f"{c.num} images, {c.steps} steps, reference {c.ref}{weights}"

    def _remember(self, stats: dict[str, Any], nimg: int) -> None:
        """Remember the scores in `stats` of snapshots that exist."""
        for key, value in stats.items():
            name, _, std = key.removeprefix(_PREFIX).rpartition("-")
            if key.startswith(_PREFIX) and name in self._scores and isinstance(value, float):
                files = (
                    self._folder.snapshot_path(self._run_config, nimg, f"-{std}", kind)
                    for kind in ("safetensors", "pkl")
                )
                file = next((path for path in files if path.is_file()), None)
                if file is not None:
                    self._scores[name][file.name] = value
