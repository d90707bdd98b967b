"""Network files as .safetensors: tensors by state-dict name, everything else as JSON in the header's metadata.

docs/file-formats.md describes the keys.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dnnlib.errors import ConfigError
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from dnnlib.text import installed_version
from torch_utils.tensor_file import save_tensors
from training.snapshot import parts
from training.snapshot.parts import Snapshot

FORMAT = "edm2-network"
VERSION = 1

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read_safetensors(
    path: Path,
    values: bool = True,
    device: torch.device | str = "cpu",
    *,
    metadata: Mapping[str, str] | None = None,
    own_networks: Sequence[str] = (),
) -> Snapshot:
    """Read the file `path`. Raises ConfigError, without the file's name.

    Tensors go from the mapped file to `device` without a copy in between. Without `values`, only the header is read and
    the network is on the meta device. `metadata` replaces that of the file. For `own_networks` see `build_network`.
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
        reason = POINTER_HINT if is_lfs_pointer(Path(path)) else f"the file is damaged or cut short: {error}"
        raise ConfigError(reason) from error
    network = _class_and_arguments(metadata, "network")
    if network is None:
        raise ConfigError("its header has no network")
    encoder, loss = (_class_and_arguments(metadata, key) for key in ("encoder", "loss"))
    return Snapshot(
        net=parts.build_network(network, tensors, path.stat().st_size, own_networks),
        **parts.rebuilt_parts(encoder, loss),
        dataset_kwargs=_entry(metadata, "dataset_kwargs", dict),
        nimg=_entry(metadata, "nimg", int),
        ema_std=_entry(metadata, "ema_std", float),
        info=_entry(metadata, "info", dict) or {},
    )


def write_safetensors(path: Path, snapshot: Snapshot) -> None:
    """Write the parts to `path`. Raises OSError."""
    written_by = f"edm2 {installed_version('edm2') or 'checkout'}, torch {torch.__version__}"
    entries = parts.described_snapshot(snapshot) | {"written_by": written_by}
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}
    metadata |= {"format": FORMAT, "format_version": str(VERSION)}
    save_tensors(path, {name: value.numpy() for name, value in snapshot.net.state_dict().items()}, metadata)


def _copied(file: Any, name: str, device: torch.device) -> torch.Tensor:
    """Return the tensor `name` on `device`. Integers stay on the CPU: `build_network` refuses them, by name."""
    mapped: torch.Tensor = file.get_tensor(name)
    return mapped.to(device, copy=True) if mapped.is_floating_point() else mapped


def _shape(file: Any, name: str) -> torch.Tensor:
    part = file.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise ConfigError(f"tensor {name} has dtype {part.get_dtype()}; floating-point numbers are needed")
    return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")


def _entry(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """Return the JSON value under `key`, None or of type `kind`."""
    try:
        value = parts.plain(json.loads(metadata.get(key, "null")), f"header entry {key!r}")
    except (ValueError, RecursionError) as error:  # damaged, a number too long, nesting too deep
        raise ConfigError(f"its header entry {key!r} is not JSON: {error}") from error
    if kind is float and type(value) is int and abs(value) < 1 << 63:
        value = float(value)
    if value is not None and type(value) is not kind:
        raise ConfigError(f"its header entry {key!r} is {str(value)[:80]!r}; a {kind.__name__} is needed")
    return value


def _class_and_arguments(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    entry: dict[str, Any] | None = _entry(metadata, key, dict)
    if entry is not None and not (isinstance(entry.get("class"), str) and isinstance(entry.get("arguments"), dict)):
        raise ConfigError(f"its header entry {key!r} lacks 'class' or 'arguments'")
    return entry
