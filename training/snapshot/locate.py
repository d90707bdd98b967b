"""Finding a network by path, URL or hub name, and reading model folders in the layout of the diffusers library.

    model_index.json                          classes of the parts, in the package edm2.diffusers
    README.md                                 the model card
    unet/config.json                          the network's arguments, and everything else in a network file
    unet/diffusion_pytorch_model.safetensors  the weights; also a network file of its own (docs/file-formats.md)
    scheduler/scheduler_config.json           the noise levels to sample with
    vae/                                      the VAE of latents, if the hub does not have it

`training.sharing.write_folder` writes such folders; neither needs that library.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from dnnlib import hub
from dnnlib.download import is_url, open_url
from dnnlib.errors import ConfigError, reason_of
from dnnlib.parse import require_possible
from training.encoders import StabilityVAEEncoder
from training.snapshot.parts import Snapshot
from training.snapshot.safetensors_file import FORMAT, VERSION, read_safetensors

SUFFIXES = (".pkl", ".safetensors")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model_index.json"
NETWORK_FOLDER = "unet"  # in the folder of a pipeline; the network alone has its files at the top
VAE_FOLDER = "vae"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
NETWORK_CLASS = "EDM2UNet"  # of edm2.diffusers
ENTRIES = ("encoder", "loss", "dataset_kwargs", "nimg", "ema_std", "info")
"""Keys of the entry "snapshot" in config.json; the same as in the header of a network file."""

_MAX_CONFIG_BYTES = 1 << 24


def locate_network(source: str) -> Path:
    """Return the local file or model folder of `source`, after a download if needed. Raises ConfigError.

    `source` is a path, an http(s) URL, hf://user/name[@revision][/file], or plain user/name[@revision] if no such path
    exists. From a repository, its model folder is taken, else its only network file.
    """
    if hub.is_hub_url(source):
        name = hub.parse_hub_url(source)
        return hub.fetch_file(name) if name.file is not None else _fetch_repository(name)
    path = Path(source) if is_url(source) else require_possible(source)
    if is_url(source) or path.is_file():
        return Path(open_url(source, return_filename=True))
    if path.is_dir():
        return path
    repository = None if path.suffix in SUFFIXES else hub.parse_repository(source)
    if repository is None:
        return Path(open_url(source, return_filename=True))  # raises with the reason
    try:
        return _fetch_repository(repository)
    except ConfigError as error:
        raise ConfigError(f"'{source}' does not exist here; as a name on the hub: {error}") from None


def network_files(folder: PurePosixPath, names: Sequence[str]) -> list[str]:
    """Return the files, among `names` in `folder`, of a network in the diffusers layout, or []."""
    for parent in (folder / NETWORK_FOLDER, folder):
        files = [str(parent / CONFIG_FILE), str(parent / WEIGHTS_FILE)]
        if all(file in names for file in files):
            index = str(folder / INDEX_FILE)
            return [*files, index] if index in names else files
    return []


def _fetch_repository(name: hub.HubName) -> Path:
    names = hub.list_files(name)
    files = network_files(PurePosixPath(), names)
    if not files:
        return hub.fetch_file(replace(name, file=_only_network(name, names)))
    first = replace(name, file=files[0])
    path = hub.fetch_file(first)
    # Take the others from the same commit: the branch may move meanwhile.
    commit = hub.pinned(first, path)
    vae = [f"{VAE_FOLDER}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE)]
    for file in [*files[1:], *(file for file in [*vae, SCHEDULER_FILE] if file in names)]:
        hub.fetch_file(replace(commit, file=file))
    return path.parents[len(files[0].split("/")) - 1]


def _only_network(name: hub.HubName, names: Sequence[str]) -> str:
    """Return the only network file of a repository; .safetensors replaces a pickle of the same name."""
    preferred = [file for file in names if file.endswith(".safetensors")]
    stems = {file.removesuffix(".safetensors") for file in preferred}
    files = preferred + [file for file in names if file.endswith(".pkl") and file.removesuffix(".pkl") not in stems]
    if not files:
        raise ConfigError(f"{name} has neither a model folder of this kind nor a {' or '.join(SUFFIXES)} file")
    if len(files) > 1:
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise ConfigError(f"{name} has {len(files)} network files ({shown}); name one, as in {name}/{files[0]}")
    return files[0]


def read_folder(folder: Path, values: bool = True) -> Snapshot:
    """Read a model folder, of a pipeline or network alone; on the meta device without `values`. Raises ConfigError."""
    present = [
        path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file()
    ]
    files = network_files(PurePosixPath(), present)
    if not files:
        parts = next((name for name in present if name.endswith(f"{WEIGHTS_FILE}.index.json")), None)
        hint = f"; {parts} says that its weights are in parts, which is not supported" if parts else ""
        raise ConfigError(
            f"it is a folder without a network in it ({NETWORK_FOLDER}/{CONFIG_FILE} and"
            f" {NETWORK_FOLDER}/{WEIGHTS_FILE}, or both at its top){hint}; to use a file in it, name the file"
        )
    config = _read_json(folder / files[0])
    if config.get("_class_name") != NETWORK_CLASS:
        raise ConfigError(f"its network has the class {config.get('_class_name')!r}; known is {NETWORK_CLASS}")
    snapshot = read_safetensors(folder / files[1], values, metadata=_metadata(config, folder))
    if isinstance(snapshot.encoder, StabilityVAEEncoder) and (folder / VAE_FOLDER / CONFIG_FILE).is_file():
        # The folder's VAE counts, whatever name the encoder is recorded with.
        snapshot.encoder.vae_name = os.path.abspath(folder / VAE_FOLDER)
    return snapshot


def _metadata(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    entries = config.get("snapshot", {})
    if not isinstance(entries, dict):
        raise ConfigError(f"the entry 'snapshot' of its {CONFIG_FILE} is not an object")
    found: dict[str, Any] = {key: entries.get(key) for key in ENTRIES}
    encoder = found["encoder"]
    arguments = encoder.get("arguments") if isinstance(encoder, dict) else None
    if isinstance(arguments, dict) and arguments.get("vae_name") == VAE_FOLDER:
        own = arguments | {"vae_name": os.path.abspath(folder / VAE_FOLDER)}
        found["encoder"] = {**encoder, "arguments": own}
    found["network"] = {"class": "Precond", "arguments": config.get("network")}
    texts = {key: json.dumps(value) for key, value in found.items()}
    return texts | {"format": FORMAT, "format_version": str(VERSION)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path.name} is larger than a configuration can be")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} does not hold a JSON object")
    return value
