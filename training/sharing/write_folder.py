"""Writing a network as a folder in the layout of the diffusers library, without that library.

`training.snapshot.model_folder` says what is in it, and reads it.
"""

import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnnlib.atomic import atomic_folder, write_text
from dnnlib.errors import ConfigError, reason_of
from training.encoders import StabilityVAEEncoder
from training.sampling.sampler import HeunOptions
from training.sharing.model_card import CardFacts, model_card
from training.snapshot import Snapshot, save_snapshot
from training.snapshot.locate import (
    CONFIG_FILE,
    INDEX_FILE,
    NETWORK_FOLDER,
    SCHEDULER_FILE,
    VAE_FOLDER,
    WEIGHTS_FILE,
)
from training.snapshot.model_folder import ENTRIES, NETWORK_CLASS
from training.snapshot.parts import build_encoder, described, network_arguments, plain

PACKAGE = "edm2.diffusers"
SCHEDULER_CLASS = "EDM2HeunScheduler"
PIPELINE_CLASS = "EDM2Pipeline"
STORED_DTYPE = "float16"  # of the tensors that save_snapshot writes
CARD_FILE = "README.md"

_LEAST_DIFFUSERS = "0.30.0"


def save_folder(snapshot: Snapshot, folder: str | os.PathLike[str], facts: CardFacts | None = None) -> None:
    """Write `snapshot` as a model folder, whole or not at all. Its folder must exist, it itself not, or be empty.

    `facts` are for the model card, beside what the snapshot says. A VAE that is a local folder comes along; of others
    the name is noted. Raises ConfigError where there is something at `folder`, or it cannot be written.
    """
    folder = Path(folder)
    require_free(folder)
    vae = _local_vae(snapshot)
    if vae is not None:
        entry = described(snapshot.encoder)
        encoder = build_encoder(entry["class"], (), entry["arguments"] | {"vae_name": VAE_FOLDER})
        snapshot = dataclasses.replace(snapshot, encoder=encoder)
    try:
        with atomic_folder(folder) as temp:
            weights = temp / NETWORK_FOLDER / WEIGHTS_FILE
            weights.parent.mkdir()
            save_snapshot(snapshot, weights)
            _write_json(weights.with_name(CONFIG_FILE), _network_config(snapshot))
            (temp / SCHEDULER_FILE).parent.mkdir()
            _write_json(temp / SCHEDULER_FILE, _scheduler_config())
            if vae is not None:
                _copy_vae(vae, temp / VAE_FOLDER)
            _write_json(temp / INDEX_FILE, _index(vae is not None))
            write_text(temp / CARD_FILE, model_card(snapshot, folder.name, facts or CardFacts()))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {reason_of(error)}") from error


def require_free(folder: Path) -> None:
    """Raise ConfigError where there is anything at `folder` but an empty folder."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} exists and is not empty; remove it or choose another place")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} exists and is no folder; remove it or choose another place")


def described_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """The constructor's arguments of `edm2.diffusers.EDM2UNet` for the network of `snapshot`, as JSON has them."""
    net: Any = snapshot.net  # Any: the decorator adds the attributes with the constructor arguments
    entries = {
        "encoder": None if snapshot.encoder is None else described(snapshot.encoder),
        "loss": None if snapshot.loss_fn is None else described(snapshot.loss_fn),
        "dataset_kwargs": None if snapshot.dataset_kwargs is None else plain(snapshot.dataset_kwargs, "dataset_kwargs"),
        "nimg": snapshot.nimg,
        "ema_std": snapshot.ema_std,
        "info": plain(dict(snapshot.info), "info"),
    }
    assert tuple(entries) == ENTRIES
    return {
        "network": network_arguments(net._init_args, net._init_kwargs),
        "snapshot": entries,
        "stored_dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
    }


def _network_config(snapshot: Snapshot) -> dict[str, Any]:
    names = {"_class_name": NETWORK_CLASS, "_diffusers_version": _diffusers_version()}
    return names | described_snapshot(snapshot) | {"stored_dtype": STORED_DTYPE}


def _scheduler_config() -> dict[str, Any]:
    defaults = HeunOptions()
    return {
        "_class_name": SCHEDULER_CLASS,
        "_diffusers_version": _diffusers_version(),
        "sigma_min": float(defaults.sigma_min),
        "sigma_max": float(defaults.sigma_max),
        "rho": float(defaults.rho),
    }


def _index(with_vae: bool) -> dict[str, Any]:
    return {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": _diffusers_version(),
        "scheduler": [PACKAGE, SCHEDULER_CLASS],
        NETWORK_FOLDER: [PACKAGE, NETWORK_CLASS],
        VAE_FOLDER: ["diffusers", "AutoencoderKL"] if with_vae else [None, None],
    }


def _local_vae(snapshot: Snapshot) -> Path | None:
    """The folder of the snapshot's VAE, where it is one of this machine. Raises ConfigError if it lacks a file."""
    if not isinstance(snapshot.encoder, StabilityVAEEncoder) or not os.path.isdir(snapshot.encoder.vae_name):
        return None
    vae = Path(snapshot.encoder.vae_name)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (vae / name).is_file():
            raise ConfigError(f"the VAE {vae} cannot be shared with its network: it has no {name}")
    return vae


def _copy_vae(source: Path, dest: Path) -> None:
    dest.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, dest / name)


def _diffusers_version() -> str:
    try:
        return importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        return _LEAST_DIFFUSERS


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
