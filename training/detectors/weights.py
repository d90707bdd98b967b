"""Files of detector weights: where they come from, whether they are the right ones, and reading them as data."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from dnnlib.errors import ConfigError


def file_sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256(path: Path) -> str:
    """The file's digest. Raises ConfigError where the name carries another one, as in `net-0123abcd.pth`."""
    digest = file_sha256(path)
    named = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", path.name)
    if named and not digest.startswith(named[1]):
        raise ConfigError(
            f"{path} is damaged or not what its name says: its SHA-256 digest begins with {digest[:8]}, not with"
            f" {named[1][:8]}; delete it and fetch it again"
        )
    return digest


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of a state dict from torch.save, by name; nothing is executed."""
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
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


def fill(net: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path, what: str) -> None:
    """Put `tensors` into `net`, all of them and nothing else. Raises ConfigError where names or shapes differ."""
    own = net.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(own[name].shape)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(f"{source} holds no weights of {what}: {problems[0]}{more}")
    net.load_state_dict(dict(tensors))


def existing_file(weights: str | Path, option: str, advice: str) -> Path:
    """The path `weights` that a user gave by `option`. Raises ConfigError, with `advice`, where there is no file."""
    path = Path(weights)
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise ConfigError(f"{option}={path} {problem}; {advice}")
    return path
