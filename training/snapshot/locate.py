"""Where a network is: a path, a URL, a model folder, or a repository on the hub, and which of its files to take.

Files of networks are .safetensors or pickles (`training.snapshot`), model folders are as diffusers has them
(`training.snapshot.model_folder`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dnnlib import hub
from dnnlib.download import is_url, open_url
from dnnlib.errors import ConfigError

SUFFIXES = (".pkl", ".safetensors")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model_index.json"
NETWORK_FOLDER = "unet"  # in the folder of a pipeline; the network alone has its files at the top
VAE_FOLDER = "vae"
SCHEDULER_FILE = "scheduler/scheduler_config.json"


def locate_network(source: str) -> Path:
    """The local file or model folder of `source`, after a download where one is needed. Raises ConfigError.

    `source`: a path, an http(s) URL, hf://user/name[@revision][/file], or plain user/name[@revision] where no such
    path exists. Of a repository a model folder is taken, else its only network file.
    """
    if hub.is_hub_url(source):
        name = hub.parse_hub_url(source)
        return hub.fetch_file(name) if name.file is not None else _fetch_repository(name)
    path = Path(source)
    if is_url(source) or path.is_file():
        return Path(open_url(source, return_filename=True))
    if path.is_dir():
        return path
    repository = None if path.suffix in SUFFIXES else hub.parse_repository(source)
    if repository is None:
        return Path(open_url(source, return_filename=True))  # says what is wrong
    try:
        return _fetch_repository(repository)
    except ConfigError as error:
        raise ConfigError(f"'{source}' does not exist here; taken as a name on the hub: {error}") from None


def network_files(folder: PurePosixPath, names: Sequence[str]) -> list[str]:
    """Which of the files `names`, below `folder`, are a network in the diffusers layout, or []: its configuration,
    its weights, and the index of its pipeline where there is one.
    """
    for place in (folder / NETWORK_FOLDER, folder):
        files = [str(place / CONFIG_FILE), str(place / WEIGHTS_FILE)]
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
    # The others from the same commit, should the branch move meanwhile.
    commit = hub.pinned(first, path)
    vae = [f"{VAE_FOLDER}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE)]
    for file in [*files[1:], *(file for file in [*vae, SCHEDULER_FILE] if file in names)]:
        hub.fetch_file(replace(commit, file=file))
    return path.parents[len(files[0].split("/")) - 1]


def _only_network(name: hub.HubName, names: Sequence[str]) -> str:
    """The one network file of a repository: .safetensors before a pickle of the same name."""
    preferred = [file for file in names if file.endswith(".safetensors")]
    stems = {file.removesuffix(".safetensors") for file in preferred}
    files = preferred + [file for file in names if file.endswith(".pkl") and file.removesuffix(".pkl") not in stems]
    if not files:
        raise ConfigError(f"{name} has neither a model folder of this kind nor a {' or '.join(SUFFIXES)} file")
    if len(files) > 1:
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise ConfigError(f"{name} has {len(files)} network files ({shown}); name one, as in {name}/{files[0]}")
    return files[0]
