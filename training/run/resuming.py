"""From which checkpoint a run goes on: the newest that is as it was written, the same one in every process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from torch_utils.checkpoints.checkpoint import DamagedCheckpoint, set_aside
from torch_utils.checkpoints.stored_checkpoint import read_checkpoint
from torch_utils.distributed import World
from torch_utils.processes.together import everywhere, on_main
from training.run.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """Where a run begins."""

    path: Path | None = None  # None = at the beginning
    data: dict[str, Any] = field(default_factory=dict)  # of the checkpoint, with our names
    notes: list[str] = field(default_factory=list)  # for the user


def find_resumption(folder: RunFolder, world: World) -> Resumption:
    """The newest sound checkpoint in the folder; damaged ones before it are set aside. For every process to call.

    Raises ConfigError where there are checkpoints but no sound one: a run of weeks is not begun anew by itself. Then
    nothing is changed.
    """
    loaded: list[dict[str, Any]] = []

    def choose() -> tuple[Path | None, int, list[str]]:
        path, data, notes = _newest_sound(folder)
        loaded.append(data)
        return path, _nimg(data), notes

    path, nimg, notes = on_main(world, choose)
    if path is None:
        return Resumption(notes=notes)

    def load() -> dict[str, Any]:
        data = loaded[0] if world.is_main else _normal(read_checkpoint(path, verify=False))
        if _nimg(data) != nimg:
            raise ConfigError(f"{path} is another file for process {world.rank}: all need the same --outdir")
        return data

    data = everywhere(world, load)
    run = data.get("run")
    was = run.get("ranks") if isinstance(run, dict) else None
    if was not in (None, world.size):
        notes.append(
            f"The checkpoint is of {was} process(es), this run has {world.size}: it goes on with the next image of the"
            " epoch, so that none is left out or seen twice. Sums over processes are rounded in another order."
        )
    return Resumption(path=path, data=data, notes=notes)


def tick_of(data: dict[str, Any], *, nimg: int, elapsed_sec: float) -> tuple[int, float]:
    """Images and seconds of training at which the status interval began that a checkpoint is in."""
    try:
        tick = data["run"]["tick"]
        return min(int(tick["cur_nimg"]), nimg), min(float(tick["total_elapsed_time"]), elapsed_sec)
    except (KeyError, TypeError, ValueError):
        return nimg, elapsed_sec


def _newest_sound(folder: RunFolder) -> tuple[Path | None, dict[str, Any], list[str]]:
    damaged: list[Path] = []
    for path in reversed(folder.checkpoints()):
        try:
            data = _normal(read_checkpoint(path))
        except DamagedCheckpoint as error:
            damaged.append(path)
            failure = error
            continue
        return path, data, [_put_away(bad, path) for bad in damaged]
    if damaged:
        others = f", and {len(damaged) - 1} older one(s) as well" if len(damaged) > 1 else ""
        raise ConfigError(f"{failure if not others else str(failure) + others}; {_ANEW}")
    if aside := folder.damaged_checkpoints():
        raise ConfigError(f"{folder.path} has no checkpoint left but {aside[-1].name}, which is damaged; {_ANEW}")
    notes = []
    if folder.has_results():
        notes.append(f"There is no checkpoint in {folder.path}: the run begins anew.")
    return None, {}, notes


_ANEW = "to train anew, remove it or choose another --outdir"


def _put_away(path: Path, instead: Path) -> str:
    try:
        name = set_aside(path).name
    except OSError as error:
        raise ConfigError(f"{path} is damaged and cannot be renamed: {reason_of(error)}") from None
    return f"{path.name} is damaged: it is called {name} now, and the run goes on from {instead.name}."


def _normal(data: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint under our names: the optimizer may be called optimizer_state, and be followed by other things."""
    if "optimizer" not in data and "optimizer_state" in data:
        data = {**data, "optimizer": data["optimizer_state"]}
    return data


def _nimg(data: dict[str, Any]) -> int:
    try:
        return int(data["state"]["cur_nimg"])
    except (KeyError, TypeError, ValueError):
        return -1  # whoever takes it up says what is missing
