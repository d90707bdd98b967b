"""Scalars, sample grids and options of a run for TensorBoard and Weights & Biases; steps are images.

Both packages are optional and imported only on request.
"""

import importlib.util
import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import write_text
from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import format_kimg
from torch_utils.precision import unchanged_random_state
from training.config import TrainingConfig
from training.images.decode import on_background, open_image

WANDB_PROJECT = "edm2"  # unless WANDB_PROJECT names another

_PACKAGES = ("tensorboard", "wandb")  # the extras have the same names


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package behind one of `names` is not installed. Imports none of them."""
    for name in names:
        assert name in _PACKAGES
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # missing, or just a folder of that name, such as W&B's own
            raise ConfigError(f'--log={name} needs the {name} package, which is missing; pip install "edm2[{name}]"')


def log_in(names: Sequence[str]) -> None:
    """Raise ConfigError if a run could not be logged for want of a login. Writes nothing."""
    if "wandb" in names:
        import wandb

        try:
            with _without_random_effects():
                wandb.login()
        except (wandb.Error, OSError) as error:
            raise _wandb_error(error) from None


def _wandb_error(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300].rstrip(".;")
    advice = "or " if "wandb login" in reason else "log in with `wandb login`, or "
    return ConfigError(f"--log=wandb: {reason}; {advice}set WANDB_MODE=offline to log to a folder")


class TensorBoardLogger:
    """Event files in the run folder's `tensorboard`. Events of an earlier session beyond `nimg` are withdrawn."""

    def __init__(self, folder: Path, config: TrainingConfig, *, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg + 1)
        except OSError as error:
            raise ConfigError(f"--log=tensorboard cannot write to {folder}: {reason_of(error)}") from None
        self._writer.add_text("options", "    " + config.to_json().replace("\n", "\n    "), nimg)

    def scalars(self, stats: Mapping[str, float], texts: Mapping[str, str], nimg: int) -> None:
        """Log numbers under their names in stats.jsonl, and texts."""
        for key, value in stats.items():
            self._writer.add_scalar(key, value, nimg)
        for key, text in texts.items():
            self._writer.add_text(key, text, nimg)
        self._writer.flush()

    def image(self, path: Path, nimg: int) -> None:
        """Log a sample grid."""
        with open_image(path.read_bytes()) as image:
            pixels = np.asarray(on_background(image))
        self._writer.add_image("samples", pixels, nimg, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Write what is left; nothing follows."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases, with the environment's settings (WANDB_MODE=offline, WANDB_PROJECT, ...).

    Files go to the run folder's `wandb`. All sessions of a run share one id, kept in wandb.json. Steps that a session
    repeats after an interruption keep their first report.
    """

    def __init__(self, folder: Path, config: TrainingConfig, *, nimg: int) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                id=_wandb_id(folder / "wandb.json"),
                name=os.environ.get("WANDB_NAME", folder.absolute().name),
                resume="allow",
                dir=str(folder),
                config=json.loads(config.to_json()),
                settings=wandb.Settings(console="off", save_code=False, silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise _wandb_error(error) from None

    def scalars(self, stats: Mapping[str, float], texts: Mapping[str, str], nimg: int) -> None:
        """Log numbers under their names in stats.jsonl; texts go to the summary."""
        self._log(dict(stats), nimg)
        self._run.summary.update(dict(texts))

    def image(self, path: Path, nimg: int) -> None:
        """Log a sample grid."""
        self._log({"samples": self._wandb.Image(str(path), caption=f"{format_kimg(nimg)} kimg")}, nimg)

    def close(self, *, failed: bool) -> None:
        """Wait until all is written or sent."""
        self._run.finish(exit_code=1 if failed else 0)

    def _log(self, data: dict[str, Any], nimg: int) -> None:
        if nimg >= self._run.step:  # the service accepts nothing for steps before its last
            self._run.log(data, step=nimg)


_LOGGERS: dict[str, type[TensorBoardLogger] | type[WandbLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


class RunLoggers:
    """The loggers of a run's main process, as a context manager. A failing logger does not stop the training.

    `names`: some of 'tensorboard' and 'wandb'. A logger that fails after `begin` is dropped, and `notes` gets a line
    about it for the user.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: TrainingConfig) -> None:
        self.notes: list[str] = []
        self._names, self._folder, self._config = names, folder, config
        self._loggers: dict[str, TensorBoardLogger | WandbLogger] = {}

    def begin(self, *, nimg: int) -> None:
        """Open the logs of a session that continues from `nimg` images. Raises ConfigError if one cannot be opened."""
        for name in dict.fromkeys(self._names):
            with _without_random_effects():
                self._loggers[name] = _LOGGERS[name](self._folder, self._config, nimg=nimg)

    def scalars(self, stats: Mapping[str, float], texts: Mapping[str, str], nimg: int) -> None:
        """Log a line of stats.jsonl."""
        self._call("scalars", stats, texts, nimg)

    def image(self, path: Path, nimg: int) -> None:
        """Log a sample grid."""
        self._call("image", path, nimg)

    def __enter__(self) -> "RunLoggers":
        self._previous_hook = threading.excepthook
        threading.excepthook = self._on_failed_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("close", failed=kind is not None)
        threading.excepthook = self._previous_hook

    def _on_failed_thread(self, args: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: the next call of the logger raises the same."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._previous_hook(args)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        for name in list(self._loggers):
            try:
                with _without_random_effects():
                    getattr(self._loggers[name], method)(*args, **kwargs)
            except Exception as error:  # a full disk, a lost service: not worth hours of training
                del self._loggers[name]
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self.notes.append(f"--log={name} failed and is dropped: {reason}")


def _without_random_effects() -> Any:
    return unchanged_random_state(torch.device("cpu"))


def _wandb_id(path: Path) -> str:
    """Return the run's id at Weights & Biases: from the file, or a new one, written to the file."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        name = uuid.uuid4().hex[:12]
        write_text(path, json.dumps({"id": name}) + "\n")
        return name
