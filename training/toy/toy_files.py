"""Files of toy networks: a pickle of the network itself, as published, or .safetensors.

The .safetensors header has the keys `format` ('edm2-toy'), `format_version` (1), and, as JSON, `network`
({"class": "ToyModel", "arguments": {...}}) and `info`, the provenance.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dnnlib.atomic import atomic_path
from dnnlib.download import open_url
from dnnlib.errors import ConfigError, one_line, reason_of
from torch_utils.pickles.safe_pickle import StoredObject, file_format, read_pickle
from torch_utils.tensor_file import save_tensors
from training.snapshot.parts import arguments_of, described, plain
from training.snapshot.pickle_file import flatten
from training.toy.model import ToyModel

FORMAT = "edm2-toy"
VERSION = "1"

_PICKLE_PROTOCOL = 4
_MAX_NUMBER = 2**16  # largest argument, so that a small file cannot request huge layers
_MIN_TENSOR_BYTES = 64  # lower bound of a layer's size in a file


def load_toy_model(source: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> ToyModel:
    """Read the toy network `source`, a path or an http(s) URL, without executing anything from it.

    The file's content determines its format, not its name. Raises ConfigError with the file's name if it is missing,
    damaged, or not a toy network for points in the plane. The network is in evaluation mode, without gradients.
    """
    name = str(source)
    path = Path(open_url(name, return_filename=True))
    try:
        is_safetensors = file_format(path) == "safetensors"
        parts = _read_safetensors(path) if is_safetensors else _parts_of(read_pickle(path, name))
        return _build(*parts, file_bytes=path.stat().st_size).to(device)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {reason_of(error)}") from None
    except ConfigError as error:
        text = one_line(error)
        raise ConfigError(text if text.startswith(name) else f"{name}: {text}") from error


def save_toy_model(net: ToyModel, path: str | os.PathLike[str], *, info: Mapping[str, Any] | None = None) -> None:
    """Write the network atomically, in the format of the suffix, as float32; only .safetensors files keep `info`."""
    path = Path(path)
    if path.suffix not in (".pkl", ".safetensors"):
        raise ConfigError(f"{path} lacks the suffix of a network file; use .pkl or .safetensors")
    arguments = described(net)["arguments"]
    tensors = {name: value.detach().to("cpu", copy=True) for name, value in net.state_dict().items()}
    try:
        with atomic_path(path) as temp:
            if path.suffix == ".pkl":
                with open(temp, "wb") as file:
                    pickle.dump(_build(arguments, tensors, file_bytes=float("inf")), file, protocol=_PICKLE_PROTOCOL)
            else:
                entries = {"network": {"class": ToyModel.__name__, "arguments": arguments}, "info": dict(info or {})}
                metadata = {key: json.dumps(plain(value, key), sort_keys=True) for key, value in entries.items()}
                arrays = {name: value.numpy() for name, value in tensors.items()}
                save_tensors(temp, arrays, {"format": FORMAT, "format_version": VERSION} | metadata)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}") from error


def _parts_of(tree: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not isinstance(tree, StoredObject):
        raise ConfigError("this is not a toy network, which is pickled by itself; was a network for images given?")
    if tree.class_name != ToyModel.__name__:
        raise ConfigError(f"its network has the class {tree.class_name[:80]!r}; a {ToyModel.__name__} is needed")
    args, kwargs = tree.state.get("_init_args"), tree.state.get("_init_kwargs")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ConfigError(f"{ToyModel.__name__} is stored without its constructor arguments")
    return arguments_of(ToyModel, args, kwargs), flatten(tree)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            name, version = metadata.get("format"), metadata.get("format_version")
            if (name, version) != (FORMAT, VERSION):
                raise ConfigError(f"its format is {name!r}, version {version!r}; it must be {FORMAT!r}, {VERSION!r}")
            # Copies, not views of the mapped file: the file may be replaced while the network is in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"the file is damaged or cut short: {error}") from error
    try:
        network = json.loads(metadata.get("network", "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"its header entry 'network' is not JSON: {error}") from error
    arguments = network.get("arguments") if isinstance(network, dict) else None
    if not isinstance(arguments, dict) or network.get("class") != ToyModel.__name__:
        raise ConfigError(f"its header entry 'network' does not describe a {ToyModel.__name__}")
    return arguments_of(ToyModel, (), arguments), tensors


def _build(arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, file_bytes: float) -> ToyModel:
    """Build the network with these arguments and tensors, matched strictly by name and shape.

    A file cannot make this allocate much: arguments are bounded, and the layout is built on the meta device.
    """
    for name, value in arguments.items():
        whole = type(value) is int or name == "sigma_data"
        if type(value) not in (int, float) or not whole or not 0 <= value <= _MAX_NUMBER:
            raise ConfigError(f"argument {name!r} of the network is {str(value)[:80]!r}, which is invalid")
    if arguments.get("in_dim", 2) != 2:
        raise ConfigError(f"the network is for points of {arguments['in_dim']} dimensions; the toy example has 2")
    if arguments.get("num_layers", 0) * _MIN_TENSOR_BYTES > file_bytes:
        raise ConfigError(f"a network of {arguments['num_layers']} layers does not fit the file")
    with torch.device("meta"):
        net = ToyModel(**arguments)
    wrong = [name for name, value in tensors.items() if value.dtype not in (torch.float16, torch.float32)]
    if wrong:
        raise ConfigError(f"tensor {wrong[0]} has dtype {tensors[wrong[0]].dtype}; float32 is needed")
    try:
        net.load_state_dict({name: value.float().contiguous() for name, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ToyModel: ")
        raise ConfigError(f"its tensors do not fit its configuration: {reason[:300]}") from error
    return net.eval().requires_grad_(False)
