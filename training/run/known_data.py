"""The data of a run as its folder knows it, so that the run does not continue on other data under the same name."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from training.config import TrainingConfig
from training.dataset.contract import ImageDataset

_VAE_FILES = (".json", ".safetensors", ".bin")  # of a VAE's folder


def data_facts(config: TrainingConfig, dataset: ImageDataset) -> dict[str, Any]:
    """Return what tells the run's data from other data, by its name in messages."""
    return {
        "number of images": len(dataset) // (2 if config.xflip else 1),
        "resolution": dataset.resolution,
        "channels": dataset.num_channels,
        "length of labels": dataset.label_dim,
        "labels": f"{dataset.labels_fingerprint():08x}",
        "content of the images": f"{dataset.items_fingerprint():08x}",
        "encoder of the latents": dataset.encoder_entry if dataset.holds_latents else None,
        "weights of the VAE": _folder_digest(config.vae),
    }


def differences(stored: str, facts: dict[str, Any]) -> list[str]:
    """Return what differs from the facts in the text `stored`, in words. Raises ValueError if it is damaged."""
    known = json.loads(stored)
    if not isinstance(known, dict):
        raise ValueError("not an object")
    changed = [name for name in facts if name in known and known[name] != facts[name]]
    return [
        f"{name}: {known[name]} in the run, {facts[name]} now" if type(facts[name]) is int else f"other {name}"
        for name in changed
    ]


def _folder_digest(vae: str | None) -> str | None:
    """Return a digest of a VAE's local folder; None for none, and for a name on the hub."""
    if vae is None or not Path(vae).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(vae).iterdir() if path.suffix in _VAE_FILES):
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    return digest.hexdigest()
