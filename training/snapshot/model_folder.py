"""Networks as folders in the layout of the diffusers library, read without that library.

    model_index.json                          which classes of which package the parts are (edm2.diffusers)
    README.md                                 the model card
    unet/config.json                          the network's arguments, and all else that a network file holds
    unet/diffusion_pytorch_model.safetensors  the weights; a network file of its own, too (docs/file-formats.md)
    scheduler/scheduler_config.json           the noise levels to sample with
    vae/                                      the VAE of latents, where it is none that the hub has

`training.sharing.write_folder` writes them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dnnlib.errors import ConfigError, reason_of
from training.encoders import Encoder, StabilityVAEEncoder
from training.snapshot import safetensors_file
from training.snapshot.locate import CONFIG_FILE, NETWORK_FOLDER, VAE_FOLDER, WEIGHTS_FILE, network_files

NETWORK_CLASS = "EDM2UNet"  # of edm2.diffusers
ENTRIES = ("encoder", "loss", "dataset_kwargs", "nimg", "ema_std", "info")
"""What config.json keeps under "snapshot", by the names that the header of a network file has for it."""

_MAX_CONFIG_BYTES = 1 << 24


def read(folder: Path, values: bool = True) -> dict[str, Any]:
    """The fields of a Snapshot from a model folder, of a pipeline or of the network alone.

    Without `values`, the network is on the meta device. Raises ConfigError, without the folder's name.
    """
    present = [path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")]]
    files = network_files(PurePosixPath(), present)
    if not files:
        parts = next((name for name in present if name.endswith(f"{WEIGHTS_FILE}.index.json")), None)
        hint = f"; {parts} says that its weights are in parts, which is not supported" if parts else ""
        raise ConfigError(
            f"it is a folder, no file, without a network in it ({NETWORK_FOLDER}/{CONFIG_FILE} and"
            f" {NETWORK_FOLDER}/{WEIGHTS_FILE}, or both at its top){hint}; to use a file in it, name the file"
        )
    config = _read_json(folder / files[0])
    if config.get("_class_name") != NETWORK_CLASS:
        raise ConfigError(f"its network has the class {config.get('_class_name')!r}; known is {NETWORK_CLASS}")
    fields = safetensors_file.read(folder / files[1], values, metadata=_metadata(config, folder))
    _use_own_vae(fields["encoder"], folder)
    return fields


def _metadata(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The header's metadata of a network file with this configuration."""
    entries = config.get("snapshot", {})
    if not isinstance(entries, dict):
        raise ConfigError(f"the entry 'snapshot' of its {CONFIG_FILE} is no object")
    found: dict[str, Any] = {key: entries.get(key) for key in ENTRIES}
    encoder = found["encoder"]
    arguments = encoder.get("arguments") if isinstance(encoder, dict) else None
    if isinstance(arguments, dict) and arguments.get("vae_name") == VAE_FOLDER:
        own = arguments | {"vae_name": os.path.abspath(folder / VAE_FOLDER)}
        found["encoder"] = {**encoder, "arguments": own}
    found["network"] = {"class": "Precond", "arguments": config.get("network")}
    texts = {key: json.dumps(value) for key, value in found.items()}
    return texts | {"format": safetensors_file.FORMAT, "format_version": str(safetensors_file.VERSION)}


def _use_own_vae(encoder: Encoder | None, folder: Path) -> None:
    """Let `encoder` load the VAE that the folder has, whatever name the encoder is recorded with."""
    if isinstance(encoder, StabilityVAEEncoder) and (folder / VAE_FOLDER / CONFIG_FILE).is_file():
        encoder.vae_name = os.path.abspath(folder / VAE_FOLDER)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path.name} is larger than a configuration can be")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} holds no JSON object")
    return value
