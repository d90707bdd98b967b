"""Network files in the published pickle layout (docs/file-formats.md)."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from dnnlib.util import EasyDict
from torch_utils.pickles.safe_pickle import StoredObject
from training.snapshot import parts
from training.snapshot.code import TrustCode, make_trusted
from training.snapshot.parts import Snapshot

_PROTOCOL = 4  # that of the published files; readable from Python 3.4 on
_KNOWN: dict[str, Collection[str]] = {"ema": ("Precond",), "encoder": tuple(parts.ENCODERS), "loss_fn": ("EDM2Loss",)}
_CALLED = {"ema": "network", "encoder": "encoder", "loss_fn": "loss"}
_MAX_NAME = 200  # characters


def snapshot_of(tree: Any, file_bytes: int, trust_code: TrustCode | None = None) -> Snapshot:
    """Build a snapshot from the inert tree of a network pickle or of a bare network.

    With `trust_code`, classes that are not ours are made by running their source (`training.snapshot.code`). Raises
    ConfigError, without the file's name.
    """
    if isinstance(tree, StoredObject):
        tree = {"ema": tree}
    if not isinstance(tree, dict) or not isinstance(tree.get("ema"), StoredObject):
        raise ConfigError("this is not a network file: there is no network under the key 'ema'")
    stored = tree["ema"]
    dataset_kwargs = tree.get("dataset_kwargs")
    foreign = {key: tree[key] for key, known in _KNOWN.items() if _is_foreign(tree.get(key), known)}
    if foreign and trust_code is None:
        key, other = next(iter(foreign.items()))
        raise ConfigError(
            f"its {_CALLED[key]} has the class {other.class_name!r}; known is {' or '.join(_KNOWN[key])}."
            " generate_images.py --trust-code runs the source code that the file has for it, if you trust who made it"
        )
    made = dict(zip(foreign, make_trusted(foreign.values(), trust_code), strict=True)) if trust_code else {}
    if "ema" not in made:
        config = {"class": "Precond", "arguments": parts.network_arguments(*_init_arguments(stored))}
        made["ema"] = parts.build_network(config, flatten(stored), file_bytes)
    return Snapshot(
        net=made["ema"],
        encoder=made["encoder"] if "encoder" in made else _rebuild(tree, "encoder", parts.build_encoder),
        loss_fn=made["loss_fn"] if "loss_fn" in made else _rebuild(tree, "loss_fn", parts.build_loss),
        dataset_kwargs=None if dataset_kwargs is None else _dictionary(dataset_kwargs, "dataset_kwargs"),
        **_provenance(tree.get("provenance")),
    )


def flatten(module: StoredObject) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a stored module and of all modules in it, by their names in a state dictionary.

    Refuses a module that occurs twice, and tensors that share their memory: no network of ours has them, and with them
    a few bytes could make an endless or huge network.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: dict[int, int] = {}  # sizes in bytes
    seen = {id(module)}
    waiting = [("", module)]
    while waiting:
        prefix, current = waiting.pop()
        for kind in ("_parameters", "_buffers"):
            for name, value in _attributes(current, kind).items():
                if isinstance(value, torch.Tensor):
                    tensors[prefix + name] = value
                    storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
                elif value is not None:
                    raise ConfigError(f"{prefix}{name} is not a tensor")
        for name, child in _attributes(current, "_modules").items():
            if child is None:
                continue
            if not isinstance(child, StoredObject) or id(child) in seen or len(prefix) > _MAX_NAME:
                raise ConfigError(f"{prefix}{name} is not a module, or occurs twice")
            seen.add(id(child))
            waiting.append((f"{prefix}{name}.", child))
    if sum(value.nbytes for value in tensors.values()) > sum(storages.values()):
        raise ConfigError("its tensors share their memory, and would take more than the file has")
    return tensors


def write_pickle(path: Path, snapshot: Snapshot, *, with_provenance: bool) -> None:
    """Write `path`. Provenance (nimg, ema_std, info) is a further entry, which the published reader skips."""
    options = None if snapshot.dataset_kwargs is None else EasyDict(snapshot.dataset_kwargs)
    content = EasyDict(encoder=snapshot.encoder, dataset_kwargs=options, loss_fn=snapshot.loss_fn, ema=snapshot.net)
    if with_provenance:
        content.provenance = {"nimg": snapshot.nimg, "ema_std": snapshot.ema_std, "info": snapshot.info}
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=_PROTOCOL)


def _is_foreign(stored: Any, known: Collection[str]) -> bool:
    return isinstance(stored, StoredObject) and stored.class_name not in known


def _attributes(module: StoredObject, kind: str) -> dict[str, Any]:
    values = module.state.get(kind)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{module.class_name} is stored without its {kind}")
    if not all(len(name) <= _MAX_NAME and name.isprintable() for name in values):
        raise ConfigError(f"{module.class_name} has {kind} with invalid names")
    return values


def _init_arguments(stored: StoredObject) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = stored.state.get("_init_args"), stored.state.get("_init_kwargs")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ConfigError(f"{stored.class_name} is stored without its constructor arguments")
    return args, kwargs


def _rebuild(tree: dict[str, Any], key: str, build: Any) -> Any:
    stored = tree.get(key)
    if stored is None:
        return None
    if not isinstance(stored, StoredObject):
        raise ConfigError(f"its {key} is a value of type {type(stored).__name__}, not a stored object")
    return build(stored.class_name, *_init_arguments(stored))


def _dictionary(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"its {key} is a value of type {type(value).__name__}, not a dictionary")
    return parts.plain(value, f"its {key}")


def _provenance(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    given = _dictionary(value, "provenance")
    nimg, ema_std, info = given.get("nimg"), given.get("ema_std"), given.get("info")
    if type(nimg) not in (int, type(None)) or type(ema_std) not in (float, type(None)) or type(info) is not dict:
        raise ConfigError("its provenance is not an image count, a length and a dictionary")
    return {"nimg": nimg, "ema_std": ema_std, "info": info}
