"""The files of a training run: their names, and the progress that they record."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dnnlib.atomic import TEMPORARY, write_text
from dnnlib.disk import make_folder, require_folder, write_error
from dnnlib.errors import ConfigError, reason_of
from dnnlib.folder_lock import FolderLock
from torch_utils.checkpoints.checkpoint import numbered
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.config import TrainingConfig

_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp[0-9A-Za-z]{6}")


class RunFolder:
    """The folder of one run (--outdir). Making this object touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.options_file = self.path / "training_options.json"
        self.stats_file = self.path / "stats.jsonl"
        self.log_file = self.path / "log.txt"
        self._lock: FolderLock | None = None
        self.encoder_file = self.path / "encoder.json"  # of a run that encodes pixels with a VAE of unknown statistics

    def snapshot_path(self, nimg: int, suffix: str, extension: str) -> Path:
        """Return the file for the network with EMA `suffix` (e.g. '-0.050') at `nimg` images."""
        return self.path / f"network-snapshot-{nimg // 1000:07d}{suffix}.{extension}"

    def checkpoint_path(self, nimg: int, *, sharded: bool = False) -> Path:
        """Return the path of the checkpoint at `nimg` images: a file, or a folder that all processes write to."""
        return self.path / f"training-state-{nimg // 1000:07d}.{'dcp' if sharded else 'pt'}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, files and folders, ordered by thousands of images, then by time."""
        found = [path for suffix in (".pt", ".dcp") for path in numbered(self.path, "training-state-", suffix)]
        return sorted(found, key=lambda path: (int(path.stem.rpartition("-")[2]), path.stat().st_mtime_ns))

    def newest_checkpoint(self) -> Path | None:
        """Return the checkpoint with the most images, or None."""
        found = self.checkpoints()
        return found[-1] if found else None

    def damaged_checkpoints(self) -> list[Path]:
        """Return the damaged checkpoints that were set aside."""
        return sorted(self.path.glob("training-state-*.damaged*"))

    def has_results(self) -> bool:
        """Return whether a run has reported or saved something here."""
        return self.stats_file.exists() or any(self.path.glob("network-snapshot-*"))

    @contextlib.contextmanager
    def held(self, world: World, say: Callable[[str], None]) -> Iterator[None]:
        """Keep processes of other runs out of the folder. Raises ConfigError if one is in it.

        Every process enters this. `say` gets a line if a stale lock is taken over. Files that a killed process left
        half-written are deleted.
        """
        lock = FolderLock(self.path, say=say)

        def enter() -> None:
            lock.acquire()
            self._lock = lock
            self._remove_half_written()

        try:
            on_main(world, enter)
            yield
        finally:
            self._lock = None
            lock.release()

    def require_held(self) -> None:
        """Raise ConfigError if the folder was held and another process has taken it over."""
        if self._lock is not None:
            self._lock.require_held()

    def _remove_half_written(self) -> None:
        for path in self.path.iterdir():
            if TEMPORARY.fullmatch(path.name) or _SAFETENSORS_TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_complete(self, config: TrainingConfig) -> bool:
        """Return whether a run without checkpoints has written its last snapshots: it could only start again."""
        kimg = [path.name.split("-")[2] for path in self.path.glob("network-snapshot-*-*.*")]
        newest_kimg = max((int(digits) for digits in kimg if digits.isdecimal()), default=0)
        return self.newest_checkpoint() is None and newest_kimg >= max(config.duration // 1000, 1)

    def check(self, config: TrainingConfig, *, allow_changes: bool) -> None:
        """Raise ConfigError if the folder holds a run with other options or cannot be made."""
        require_folder(self.path)
        if self.options_file.exists() and not allow_changes:
            changes = config.differences(self.options_file.read_text(encoding="utf-8", errors="replace"))
            if changes:
                raise ConfigError(
                    f"--outdir={self.path} holds a run with other options ({'; '.join(changes)}); repeat its options,"
                    " choose another folder, or continue with --allow-changes"
                )

    def start(self, config: TrainingConfig, *, nimg: int) -> None:
        """Make the folder, record the options, and drop statistics beyond `nimg`, where the run continues."""
        make_folder(self.path)
        try:
            write_text(self.options_file, config.to_json())
            if self.stats_file.exists():
                write_text(self.stats_file, "".join(line + "\n" for line in self._stats_lines(nimg)))
        except OSError as error:
            raise write_error(self.options_file, error) from None

    def recorded_stats(self, nimg: int) -> list[dict[str, Any]]:
        """Return the records of stats.jsonl up to `nimg` images."""
        try:
            return [json.loads(line) for line in self._stats_lines(nimg)] if self.stats_file.exists() else []
        except OSError as error:
            raise ConfigError(f"{self.stats_file} cannot be read: {reason_of(error)}") from None

    def _stats_lines(self, nimg: int) -> list[str]:
        lines = self.stats_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if _nimg(line) <= nimg]


def _nimg(line: str) -> float:
    """Return the number of images at a line of stats.jsonl; infinity for a damaged line."""
    try:
        return round(json.loads(line)["Progress/kimg"] * 1e3)
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return float("inf")
