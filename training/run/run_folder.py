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
from torch_utils.checkpoints import read_checkpoint
from torch_utils.checkpoints.checkpoint import numbered, read_digest
from torch_utils.distributed import World
from torch_utils.precision_names import PRECISIONS, Precision
from torch_utils.processes.together import on_main
from training.config import TrainingConfig, is_published
from training.run.known_data import differences
from training.snapshot import KIMG, name_of_nimg, nimg_from_name


class RunFolder:
    """The folder of one run (--outdir). Making this object touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.options_file = self.path / "training_options.json"
        self.data_file = self.path / "data.json"  # see training/run/known_data.py
        self.stats_file = self.path / "stats.jsonl"
        self.log_file = self.path / "log.txt"
        self._lock: FolderLock | None = None
        self.encoder_file = self.path / "encoder.json"  # of a run that encodes pixels with a VAE of unknown statistics

    def snapshot_path(self, config: TrainingConfig, nimg: int, suffix: str, extension: str) -> Path:
        """Return the file for the network with EMA `suffix` (e.g. '-0.050') at `nimg` images."""
        return self.path / f"network-snapshot-{_time(config, nimg)}{suffix}.{extension}"

    def samples_path(self, config: TrainingConfig, nimg: int) -> Path:
        """Return the file for the sample grid at `nimg` images."""
        return self.path / f"samples-{_time(config, nimg)}.png"

    def checkpoint_path(self, config: TrainingConfig, nimg: int, *, sharded: bool = False) -> Path:
        """Return the path of the checkpoint at `nimg` images: a file, or a folder that all processes write to."""
        return self.path / f"training-state-{_time(config, nimg)}.{'dcp' if sharded else 'pt'}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, files and folders, ordered by thousands of images, then by the time of writing.

        Names do not tell the rest in every case: those of earlier versions had no more than the thousands.
        """
        found = [path for suffix in (".pt", ".dcp") for path in numbered(self.path, "training-state-", suffix)]
        return sorted(found, key=lambda path: (int(path.name.split("-")[2].split(".")[0]), path.stat().st_mtime_ns))

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
            self._clear_leftovers(say)

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

    def _clear_leftovers(self, say: Callable[[str], None]) -> None:
        """Delete what a killed process left under hidden names; a whole checkpoint that lacks only its name gets it."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.lstat().st_mtime_ns, reverse=True):
            match = TEMPORARY.fullmatch(path.name)
            if match is None:
                continue
            name = match[1]
            with contextlib.suppress(OSError):
                if name is not None and not (self.path / name).exists() and _is_whole(path, name):
                    path.rename(self.path / name)
                    say(f"{name} was complete when a process was killed, and gets its name.")
                else:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_complete(self, config: TrainingConfig) -> bool:
        """Return whether a run without checkpoints has written its last snapshots: it could only start again."""
        times = [path.name.split("-")[2] for path in self.path.glob("network-snapshot-*-*.*")]
        newest = max((nimg_from_name(time) for time in times if re.fullmatch(KIMG, time)), default=0)
        return self.newest_checkpoint() is None and newest >= config.duration

    def check(self, config: TrainingConfig, facts: dict[str, Any] | None = None, *, allow_changes: bool) -> list[str]:
        """Raise ConfigError if the folder holds a run with other options or other data, or cannot be made.

        `facts`: the result of `data_facts`. Returns notes for the user. A run that has nothing to continue from may
        begin again with any options.
        """
        require_folder(self.path)
        if not self.has_progress():
            return []
        notes = []
        options, data = (self._stored(file) for file in (self.options_file, self.data_file))
        changes: list[str] = []
        if options is not None and is_published(options):
            notes.append(
                f"{self.options_file.name} in {self.path} is of the published code, and is not compared with the"
                f" options given. Data order and noise are others here, with the same --seed as well."
            )
        elif options is not None and not allow_changes:
            changes = config.differences(options)
        if changes:
            raise ConfigError(
                f"--outdir={self.path} holds a run with other options ({'; '.join(changes)}); repeat its options,"
                " choose another folder, or continue with --allow-changes"
            )
        if facts is not None and data is None:
            notes.append(
                f"{self.path} does not tell which data its run has seen: --data={config.data} is recorded now."
            )
        elif facts is not None and data is not None and not allow_changes:
            self._require_data(config, data, facts)
        return notes

    def _require_data(self, config: TrainingConfig, stored: str, facts: dict[str, Any]) -> None:
        try:
            changes = differences(stored, facts)
        except (ValueError, RecursionError):
            raise ConfigError(f"{self.data_file} cannot be read; remove it to take the data given") from None
        if changes:
            raise ConfigError(
                f"--outdir={self.path} holds a run on other data, and --data={config.data} has changed since"
                f" ({'; '.join(changes)}); put its data back, choose another folder, or continue with --allow-changes"
            )

    def _stored(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None

    def recorded_precision(self) -> Precision | None:
        """Return the number format of the run in the folder, or None: without a run, or if it does not tell."""
        try:
            options = json.loads(self._stored(self.options_file) or "{}") if self.has_progress() else {}
            precision = options["network"]["precision"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return precision if precision in PRECISIONS else None

    def has_progress(self) -> bool:
        """Return whether a run has left more here than its options: a checkpoint or results."""
        return bool(self.checkpoints() or self.damaged_checkpoints() or self.has_results())

    def start(self, config: TrainingConfig, facts: dict[str, Any] | None = None, *, nimg: int) -> None:
        """Make the folder, record the options and data, and drop statistics beyond `nimg`, where the run continues."""
        make_folder(self.path)
        options = self._stored(self.options_file)
        try:
            if options is not None and is_published(options):
                write_text(self.path / "training_options-published.json", options)
            write_text(self.options_file, config.to_json())
            if facts is not None:
                write_text(self.data_file, json.dumps(facts, indent=2) + "\n")
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


def _is_whole(path: Path, name: str) -> bool:
    """Return whether a leftover that was to become `name` is a checkpoint with the digest that it carries."""
    if not name.startswith("training-state-") or not (path.is_dir() or read_digest(path) is not None):
        return False
    try:
        return bool(read_checkpoint(path))
    except ConfigError:
        return False


def _time(config: TrainingConfig, nimg: int) -> str:
    return name_of_nimg(nimg, is_saved=config.saves_at)


def _nimg(line: str) -> float:
    """Return the number of images at a line of stats.jsonl; infinity for a damaged line."""
    try:
        return round(json.loads(line)["Progress/kimg"] * 1e3)
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return float("inf")
