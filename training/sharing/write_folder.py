"""Writing a network as a model folder in the layout of the diffusers library, without that library.

`training.snapshot.locate` lists the contents and reads them.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dnnlib.atomic import atomic_folder, write_text
from dnnlib.errors import ConfigError, reason_of
from dnnlib.text import installed_version
from training.encoders import StabilityVAEEncoder
from training.sampling.schedule import HeunOptions
from training.sharing.model_card import CardFacts, model_card
from training.snapshot import Snapshot, locate, save_snapshot
from training.snapshot.parts import build_encoder, described, described_snapshot

PACKAGE = "edm2.diffusers"
SCHEDULER_CLASS = "EDM2HeunScheduler"
PIPELINE_CLASS = "EDM2Pipeline"
STORED_DTYPE = "float16"  # of tensors written by save_snapshot
CARD_FILE = "README.md"

_MIN_DIFFUSERS = "0.30.0"


def save_folder(snapshot: Snapshot, folder: str | os.PathLike[str], facts: CardFacts | None = None) -> None:
    """Write `snapshot` as the model folder `folder`, whole or not at all. The folder above must exist.

    `facts` add to the model card. A VAE in a local folder is copied; of others the name is recorded. Raises ConfigError
    if `folder` exists and is not an empty folder, or cannot be written.
    """
    folder = Path(folder)
    require_free(folder)
    vae = _local_vae(snapshot)
    if vae is not None:
        entry = described(snapshot.encoder)
        encoder = build_encoder(entry["class"], (), entry["arguments"] | {"vae_name": locate.VAE_FOLDER})
        snapshot = dataclasses.replace(snapshot, encoder=encoder)
    try:
        with atomic_folder(folder) as temp:
            (temp / locate.NETWORK_FOLDER).mkdir()
            save_snapshot(snapshot, temp / locate.NETWORK_FOLDER / locate.WEIGHTS_FILE)
            (temp / locate.SCHEDULER_FILE).parent.mkdir()
            for name, content in _configurations(snapshot, with_vae=vae is not None).items():
                write_text(temp / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
            if vae is not None:
                (temp / locate.VAE_FOLDER).mkdir()
                for name in (locate.CONFIG_FILE, locate.WEIGHTS_FILE):
                    shutil.copyfile(vae / name, temp / locate.VAE_FOLDER / name)
            write_text(temp / CARD_FILE, model_card(snapshot, folder.name, facts or CardFacts()))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {reason_of(error)}") from error


def require_free(folder: Path) -> None:
    """Raise ConfigError if `folder` exists and is not an empty folder."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} exists and is not empty; remove it or choose another place")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} exists and is not a folder; remove it or choose another place")


def unet_config(snapshot: Snapshot) -> dict[str, Any]:
    """Return the constructor arguments of `edm2.diffusers.EDM2UNet` for the network of `snapshot`, as JSON values."""
    entries = described_snapshot(snapshot)
    return {
        "network": entries["network"]["arguments"],
        "snapshot": {key: entries[key] for key in locate.ENTRIES},
        "stored_dtype": str(next(snapshot.net.parameters()).dtype).removeprefix("torch."),
    }


def _configurations(snapshot: Snapshot, *, with_vae: bool) -> dict[str, dict[str, Any]]:
    heun, version = HeunOptions(), {"_diffusers_version": installed_version("diffusers") or _MIN_DIFFUSERS}
    sigmas = {name: float(getattr(heun, name)) for name in ("sigma_min", "sigma_max", "rho")}
    parts = {
        "scheduler": [PACKAGE, SCHEDULER_CLASS],
        locate.NETWORK_FOLDER: [PACKAGE, locate.NETWORK_CLASS],
        locate.VAE_FOLDER: ["diffusers", "AutoencoderKL"] if with_vae else [None, None],
    }
    network = {**unet_config(snapshot), "stored_dtype": STORED_DTYPE}
    return {
        f"{locate.NETWORK_FOLDER}/{locate.CONFIG_FILE}": {"_class_name": locate.NETWORK_CLASS, **version, **network},
        locate.SCHEDULER_FILE: {"_class_name": SCHEDULER_CLASS, **version, **sigmas},
        locate.INDEX_FILE: {"_class_name": PIPELINE_CLASS, **version, **parts},
    }


def _local_vae(snapshot: Snapshot) -> Path | None:
    """Return the folder of the snapshot's VAE if it is on this machine. Raises ConfigError if it lacks a file."""
    if not isinstance(snapshot.encoder, StabilityVAEEncoder) or not os.path.isdir(snapshot.encoder.vae_name):
        return None
    vae = Path(snapshot.encoder.vae_name)
    for name in (locate.CONFIG_FILE, locate.WEIGHTS_FILE):
        if not (vae / name).is_file():
            raise ConfigError(f"the VAE {vae} cannot be shared with its network: it has no {name}")
    return vae
