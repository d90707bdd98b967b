"""What the processes of a run must have in common before it starts, and the refusal where they do not."""

import dataclasses
import json
import zlib
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.config import TrainingConfig
from training.dataset.image_folder import ImageFolderDataset
from training.streaming.streamed import StreamedDataset

# Where a machine keeps its copy of the data is its own affair; what is in it is compared.
_MAY_DIFFER = ("data", "data_cache")


def require_same(world: World, config: TrainingConfig, dataset: ImageFolderDataset, *, resumed_from: str) -> None:
    """Raise ConfigError in every process where options, data set or starting point are not the same in all of them.

    `resumed_from` names the checkpoint that this process found, '' for none. Takes no time to speak of: of the images,
    names and stored checksums are compared, as far as the data set has such.
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


def _facts(config: TrainingConfig, dataset: ImageFolderDataset, resumed_from: str) -> dict[str, Any]:
    """What is compared, by the name that the user is told."""
    options = json.loads(config.to_json())
    facts = {f"option {name}": value for name, value in options.items() if name not in {*_MAY_DIFFER, "network"}}
    facts |= {f"option {name}": value for name, value in dataclasses.asdict(config.network).items()}
    facts["number of images"] = len(dataset)
    facts["resolution"] = dataset.resolution
    facts["channels"] = dataset.num_channels
    facts["length of labels"] = dataset.label_dim
    facts["labels"] = dataset.labels_fingerprint()
    facts["files of the data set"] = (
        zlib.crc32(json.dumps([(file.name, file.size, file.version) for file in dataset.shards]).encode())
        if isinstance(dataset, StreamedDataset)
        else dataset.fingerprint()
    )
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
