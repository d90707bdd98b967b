"""Files of detector weights: where they come from, whether they are the right ones, and reading them as data."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from dnnlib.errors import ConfigError, reason_of

Net = TypeVar("Net", bound=nn.Module)


def file_sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal. Raises ConfigError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None


def is_published(path: Path, digest: str) -> bool:
    """Whether the file's SHA-256 digest begins with `digest`.

    Raises ConfigError where it doesn't although the name says so, as in `net-0123abcd.pth`: that file is damaged.
    """
    actual = file_sha256(path)
    if digest[:8] in path.name and not actual.startswith(digest):
        raise ConfigError(
            f"{path} is damaged or not what its name says: its SHA-256 digest begins with {actual[:8]} in place of"
            f" {digest[:8]}; delete it and fetch it again"
        )
    return actual.startswith(digest)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of a state dict from torch.save, by name; nothing is executed."""
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged or no .safetensors file: {error}") from None
    except Exception:
        # A dozen kinds, with texts that advise to run what is in the file.
        raise ConfigError(
            f"{path} is damaged, or holds more than tensors; a state dict from torch.save is needed"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConfigError(f"{path} holds no tensors by name; a state dict from torch.save is needed")
    return dict(tensors)


def filled(network: Callable[[], Net], tensors: Mapping[str, torch.Tensor], source: Path, what: str) -> Net:
    """The network that `network` makes with `tensors` in it, all of them and nothing else.

    Draws no random numbers. Raises ConfigError where names or shapes differ.
    """
    with torch.device("meta"):
        net = network()
    own = net.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    for name, value in own.items():
        if name in tensors and tensors[name].shape != value.shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(value.shape)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(f"{source} holds no weights of {what}: {problems[0]}{more}")
    net.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()}, assign=True)
    return net
