"""Network files as .safetensors: tensors by state-dict name, everything else as JSON in the header's metadata.

The keys are described in docs/file-formats.md.
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dnnlib.errors import ConfigError
from training.snapshot.parts import build_encoder, build_loss, build_network, described, network_arguments, plain

FORMAT = "edm2-network"
VERSION = 1


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read(
    path: Path,
    values: bool = True,
    device: torch.device | str = "cpu",
    *,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of a Snapshot from the file `path`. Raises ConfigError, without the file's name.

    The network is on `device`, to which its tensors go from the mapped file, without a copy in between. Without
    `values`, it is on the meta device and only the header is read. `metadata` takes the place of the file's own.
    """
    device = torch.device(device)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = metadata or file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"it is a safetensors file, but its header does not say that it is an {FORMAT}")
            if metadata.get("format_version") != str(VERSION):
                raise ConfigError(f"its format_version is {metadata.get('format_version')!r}; known is {VERSION}")
            # Copies, not views of the mapped file: the file may be replaced while the network is in use.
            read_tensor = (lambda name: _copied(file, name, device)) if values else lambda name: _shape(file, name)
            tensors = {name: read_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"the file is damaged or cut short: {error}") from error
    network = _class_and_arguments(metadata, "network")
    if network is None or network[0] != "Precond":
        raise ConfigError(f"its network has the class {network and network[0]!r}; known is Precond")
    encoder, loss = (_class_and_arguments(metadata, key) for key in ("encoder", "loss"))
    return {
        "net": build_network(network_arguments((), network[1]), tensors, path.stat().st_size),
        "encoder": None if encoder is None else build_encoder(encoder[0], (), encoder[1]),
        "loss_fn": None if loss is None else build_loss(loss[0], (), loss[1]),
        "dataset_kwargs": _entry(metadata, "dataset_kwargs", dict),
        "nimg": _entry(metadata, "nimg", int),
        "ema_std": _entry(metadata, "ema_std", float),
        "info": _entry(metadata, "info", dict) or {},
    }


def write(
    path: Path,
    *,
    net: Any,
    encoder: Any,
    dataset_kwargs: Mapping[str, Any] | None,
    loss_fn: Any,
    nimg: int | None,
    ema_std: float | None,
    info: Mapping[str, Any],
) -> None:
    """Write the parts to `path`. Raises OSError where that fails."""
    arguments = network_arguments(net._init_args, net._init_kwargs)
    entries = {
        "network": {"class": type(net).__name__, "arguments": arguments},
        "encoder": None if encoder is None else described(encoder),
        "loss": None if loss_fn is None else described(loss_fn),
        "dataset_kwargs": dataset_kwargs,
        "nimg": nimg,
        "ema_std": None if ema_std is None else float(ema_std),
        "info": dict(info),
        "written_by": f"edm2 {_own_version()}, torch {torch.__version__}",
    }
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}
    metadata |= {"format": FORMAT, "format_version": str(VERSION)}
    try:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path, metadata)
    except SafetensorError as error:  # which has the system's error as text only
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _copied(file: Any, name: str, device: torch.device) -> torch.Tensor:
    """The tensor called `name`, on `device`. Integers are refused with the rest, by name, and need no place there."""
    mapped: torch.Tensor = file.get_tensor(name)
    return mapped.to(device, copy=True) if mapped.is_floating_point() else mapped


def _shape(file: Any, name: str) -> torch.Tensor:
    """A tensor without values like the one called `name`."""
    part = file.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise ConfigError(f"tensor {name} has dtype {part.get_dtype()}; floating-point numbers are needed")
    return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")


def _own_version() -> str:
    try:
        return importlib.metadata.version("edm2")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "checkout"


def _entry(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """The JSON value under `key`, None or of type `kind`."""
    try:
        value = plain(json.loads(metadata.get(key, "null")), f"header entry {key!r}")
    except (ValueError, RecursionError) as error:  # damaged, too long a number, nested too deep
        raise ConfigError(f"its header entry {key!r} is no JSON: {error}") from error
    if kind is float and type(value) is int:
        value = float(value)
    if value is not None and type(value) is not kind:
        raise ConfigError(f"its header entry {key!r} is {str(value)[:80]!r}; a {kind.__name__} is needed")
    return value


def _class_and_arguments(metadata: Mapping[str, str], key: str) -> tuple[str, dict[str, Any]] | None:
    entry = _entry(metadata, key, dict)
    if entry is None:
        return None
    name, arguments = entry.get("class"), entry.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ConfigError(f"its header entry {key!r} lacks 'class' or 'arguments'")
    return name, arguments
