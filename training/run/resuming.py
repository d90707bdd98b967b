"""The start of a session: at the newest sound checkpoint, with the same options and data in every process."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError, reason_of
from torch_utils.checkpoints import read_checkpoint
from torch_utils.checkpoints.checkpoint import DamagedCheckpoint, set_aside
from torch_utils.distributed import World
from torch_utils.processes.together import everywhere, on_main
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset
from training.run.known_data import data_facts
from training.run.run_folder import RunFolder

# Each machine may keep its copy of the data in another place; the content is compared.
_MAY_DIFFER = ("data", "data_cache")

_TRAIN_AGAIN = "to train from the beginning, remove it or choose another --outdir"


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """The start of a session."""

    path: Path | None = None  # None = at the beginning
    data: dict[str, Any] = field(default_factory=dict)  # of the checkpoint, with our names
    notes: list[str] = field(default_factory=list)  # for the user


def find_resumption(folder: RunFolder, world: World) -> Resumption:
    """Return the newest sound checkpoint in the folder, and set damaged newer ones aside. Every process calls this.

    Raises ConfigError, and changes nothing, if there are checkpoints but no sound one: a run of weeks does not silently
    start again.
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
        data = loaded[0] if world.is_main else _with_our_names(read_checkpoint(path, verify=False))
        if _nimg(data) != nimg:
            raise ConfigError(f"{path} is another file in process {world.rank}; all need the same --outdir")
        return data

    data = everywhere(world, load)
    run = data.get("run")
    ranks = run.get("ranks") if isinstance(run, dict) else None
    if ranks not in (None, world.size):
        notes.append(
            f"The checkpoint is of {ranks} process(es), this run has {world.size}: it continues with the next image of"
            " the epoch and neither skips nor repeats one. Sums over processes are rounded in another order."
        )
    return Resumption(path=path, data=data, notes=notes)


def tick_of(data: dict[str, Any], *, nimg: int, elapsed_sec: float) -> tuple[int, float]:
    """Return images and seconds of training at the start of the status interval that a checkpoint is in."""
    try:
        tick = data["run"]["tick"]
        return min(int(tick["cur_nimg"]), nimg), min(float(tick["total_elapsed_time"]), elapsed_sec)
    except (KeyError, TypeError, ValueError):
        return nimg, elapsed_sec


def _newest_sound(folder: RunFolder) -> tuple[Path | None, dict[str, Any], list[str]]:
    damaged: list[Path] = []
    for path in reversed(folder.checkpoints()):
        try:
            data = _with_our_names(read_checkpoint(path))
        except DamagedCheckpoint as error:
            damaged.append(path)
            failure = error
            continue
        return path, data, [_put_away(bad, path) for bad in damaged]
    if damaged:
        others = f", and {len(damaged) - 1} older one(s) as well" if len(damaged) > 1 else ""
        raise ConfigError(f"{failure if not others else str(failure) + others}; {_TRAIN_AGAIN}")
    if aside := folder.damaged_checkpoints():
        raise ConfigError(
            f"{folder.path} has no checkpoint left but {aside[-1].name}, which is damaged; {_TRAIN_AGAIN}"
        )
    notes = []
    if folder.has_results():
        notes.append(f"{folder.path} has no checkpoint: the run starts from the beginning.")
    return None, {}, notes


def _put_away(path: Path, instead: Path) -> str:
    try:
        name = set_aside(path).name
    except OSError as error:
        raise ConfigError(f"{path} is damaged and cannot be renamed: {reason_of(error)}") from None
    return f"{path.name} is damaged and was renamed to {name}; the run continues from {instead.name}."


def _with_our_names(data: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint under our names: others call the optimizer optimizer_state and add more entries."""
    if "optimizer" not in data and "optimizer_state" in data:
        data = {**data, "optimizer": data["optimizer_state"]}
    return data


def _nimg(data: dict[str, Any]) -> int:
    try:
        return int(data["state"]["cur_nimg"])
    except (KeyError, TypeError, ValueError):
        return -1  # TrainingState.load_state_dict reports what is missing


def require_same(world: World, config: TrainingConfig, dataset: ImageDataset, *, resumed_from: str) -> None:
    """Raise ConfigError in every process if options, data set or starting point are not the same in all of them.

    `resumed_from` names the checkpoint that this process found, '' for none. Reads no image: it compares the names and
    stored checksums, as far as the data set has them.
    """
    if world.size == 1:
        return
    everyone = world.all_gather_objects(_facts(config, dataset, resumed_from))
    for name, value in everyone[0].items():
        others = [rank for rank, facts in enumerate(everyone) if facts.get(name) != value]
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise ConfigError(
                f"the processes of this run differ in {name}: {value} in process 0, {everyone[others[0]].get(name)} in"
                f" process {others[0]}{more}; {_advice(name)}"
            )


def _facts(config: TrainingConfig, dataset: ImageDataset, resumed_from: str) -> dict[str, Any]:
    """Return what is compared, by its name in the message."""
    options = json.loads(config.to_json())
    facts = {f"option {name}": value for name, value in options.items() if name not in {*_MAY_DIFFER, "network"}}
    facts |= {f"option {name}": value for name, value in dataclasses.asdict(config.network).items()}
    facts |= data_facts(config, dataset)
    facts["files of the data set"] = dataset.fingerprint()
    facts["checkpoint to continue from"] = resumed_from or "none"
    facts["version of PyTorch"] = torch.__version__
    return facts


def _advice(name: str) -> str:
    if name.startswith("option"):
        return "give all of them the same command"
    if name.startswith("checkpoint"):
        return "--outdir must be on a file system that all machines share"
    if name.startswith("version"):
        return "install the same one on all machines"
    return "give all of them the same data (checksums of names and contents are compared)"
