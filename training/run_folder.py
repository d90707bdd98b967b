"""The files of a training run: their names, and what they say about how far the run has come."""

import json
import os
from pathlib import Path
from typing import Any

from dnnlib.atomic import write_text
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from dnnlib.leftovers import sweep
from torch_utils.checkpoint import newest
from training.config import TrainingConfig


class RunFolder:
    """The folder of one run (--outdir). Making this object touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.options_file = self.path / "training_options.json"
        self.stats_file = self.path / "stats.jsonl"
        self.log_file = self.path / "log.txt"
        self.encoder_file = self.path / "encoder.json"  # of a run that encodes pixels with a VAE of unknown statistics

    def snapshot_path(self, nimg: int, suffix: str, extension: str) -> Path:
        """Where the network with EMA `suffix` (e.g. '-0.050') at `nimg` images belongs."""
        return self.path / f"network-snapshot-{nimg // 1000:07d}{suffix}.{extension}"

    def checkpoint_path(self, nimg: int) -> Path:
        """Where the checkpoint at `nimg` images belongs."""
        return self.path / f"training-state-{nimg // 1000:07d}.pt"

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the most images, or None."""
        return newest(self.path, "training-state-", ".pt")

    def is_complete(self, config: TrainingConfig) -> bool:
        """Whether a run without checkpoints has written its last snapshots; all that is left is to train anew."""
        kimg = [path.name.split("-")[2] for path in self.path.glob("network-snapshot-*-*.*")]
        newest_kimg = max((int(digits) for digits in kimg if digits.isdecimal()), default=0)
        return self.newest_checkpoint() is None and newest_kimg >= max(config.duration // 1000, 1)

    def check(self, config: TrainingConfig, *, allow_changes: bool) -> None:
        """Raise ConfigError where a run with other options is in the folder, or the folder cannot be made."""
        require_folder(self.path)
        if self.options_file.exists() and not allow_changes:
            changes = config.differences(self.options_file.read_text(encoding="utf-8", errors="replace"))
            if changes:
                raise ConfigError(
                    f"--outdir={self.path} holds a run with other options ({'; '.join(changes)}); repeat its options,"
                    " choose another folder, or continue with --allow-changes"
                )

    def start(self, config: TrainingConfig, *, nimg: int) -> None:
        """Make the folder, record the options, and drop statistics from beyond `nimg`, where the run goes on.

        What a killed process had half written is removed.
        """
        make_folder(self.path)
        sweep(self.path)
        try:
            write_text(self.options_file, config.to_json())
            if self.stats_file.exists():
                write_text(self.stats_file, "".join(line + "\n" for line in self._stats_lines(nimg)))
        except OSError as error:
            raise ConfigError(f"--outdir={self.path} cannot be written: {error.strerror or error}") from None

    def recorded_stats(self, nimg: int) -> list[dict[str, Any]]:
        """The records of stats.jsonl up to `nimg` images."""
        try:
            return [json.loads(line) for line in self._stats_lines(nimg)] if self.stats_file.exists() else []
        except OSError as error:
            raise ConfigError(f"{self.stats_file} cannot be read: {error.strerror or error}") from None

    def _stats_lines(self, nimg: int) -> list[str]:
        lines = self.stats_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if _nimg(line) <= nimg]


def _nimg(line: str) -> float:
    """The images that a line of stats.jsonl was written after; beyond everything where the line is damaged."""
    try:
        return round(float(json.loads(line)["Progress/kimg"]) * 1e3)
    except (ValueError, OverflowError, KeyError, TypeError):
        return float("inf")
