"""From what a network file says to our own objects: arguments checked, classes from closed lists, tensors by name.

Every value here may come from a stranger's file. Nothing is allocated and no loop runs on its word alone: the network
is laid out on the meta device, from arguments that were checked, and takes over the file's tensors.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from torch_utils.layout import WithoutValues
from training.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.loss import EDM2Loss
from training.networks_edm2 import Block, Precond, UNet

ENCODERS: dict[str, type[Encoder]] = {cls.__name__: cls for cls in (StandardRGBEncoder, StabilityVAEEncoder)}

_MAX_DEPTH = 8
_MAX_ITEMS = 10_000  # of a plain value, however it is nested
_MAX_NUMBER = 2**20  # in a network's arguments
_MAX_LEVELS = 16
_MIN_TENSOR_BYTES = 64  # what a tensor takes in a file at the least, its description included

# What a Block gets from the UNet, not from the network's arguments.
_BLOCK_OWN = {"in_channels", "out_channels", "emb_channels", "flavor", "resample_mode", "attention"}


def plain(value: Any, what: str) -> Any:
    """`value` as JSON has it: None, bool, int, finite float, str, list, dict by str. Raises ConfigError for others.

    `what` names the value in errors. NumPy numbers and small arrays become numbers and lists.
    """
    return _plain(value, what, _MAX_DEPTH, [_MAX_ITEMS])


def _plain(value: Any, what: str, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        raise ConfigError(f"{what} is nested too deep or too large")
    if isinstance(value, np.generic | np.ndarray) and value.size <= _MAX_ITEMS:
        value = value.tolist()
    if isinstance(value, str):  # long ones count more: many places may share one
        budget[0] -= len(value) // 100
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, what, depth - 1, budget) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_plain(key, what, depth, budget): _plain(item, what, depth - 1, budget) for key, item in value.items()}
    shown = value if isinstance(value, float) else f"a value of type {type(value).__name__}"
    raise ConfigError(f"{what} holds {shown}; plain numbers, text, lists and dictionaries are allowed")


def arguments_of(cls: type, args: Iterable[Any], kwargs: Mapping[str, Any], names: set[str] | None = None) -> dict:
    """Constructor arguments of `cls`, all by name and plain. `names` are those allowed (default: its parameters)."""
    parameters = list(inspect.signature(cls).parameters)
    args = list(args)
    if len(args) > len(parameters):
        raise ConfigError(f"{cls.__name__} has {len(args)} positional arguments; at most {len(parameters)} are known")
    given = dict(zip(parameters, args, strict=False))
    if unknown := sorted(set(kwargs) - (names if names is not None else set(parameters))):
        raise ConfigError(f"{cls.__name__} has an argument {unknown[0]!r}, which is not known")
    if twice := sorted(set(given) & set(kwargs)):
        raise ConfigError(f"{cls.__name__} has two values for its argument {twice[0]!r}")
    given |= kwargs
    return {name: plain(value, f"argument {name!r} of {cls.__name__}") for name, value in given.items()}


def network_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A network's constructor arguments, all by name. Raises ConfigError where one is unknown or no plain number."""
    names = set(inspect.signature(Precond).parameters) | set(inspect.signature(UNet).parameters)
    names |= set(inspect.signature(Block).parameters) - _BLOCK_OWN
    arguments = arguments_of(Precond, args, kwargs, names - {"unet_kwargs", "block_kwargs"})
    for name, value in arguments.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, str | list | dict) or abs(n or 0) > _MAX_NUMBER for n in numbers):
            raise ConfigError(f"argument {name!r} of the network has a value out of range: {str(value)[:80]}")
    return arguments


def build_network(arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], file_bytes: float) -> Precond:
    """The network with these arguments that takes over these tensors; in evaluation mode, without gradients.

    The names must be exactly those of the network, and the shapes too, or ConfigError. `file_bytes`, the size of the
    file, bounds how many layers the arguments may ask for.
    """
    return fill_network(lay_out_network(arguments, file_bytes), tensors)


def lay_out_network(arguments: Mapping[str, Any], file_bytes: float) -> Precond:
    """The network with these arguments, without content."""
    defaults = inspect.signature(UNet).parameters
    mult, num_blocks = (arguments.get(name, defaults[name].default) for name in ("channel_mult", "num_blocks"))
    if isinstance(mult, list | tuple) and isinstance(num_blocks, int):
        levels = len(mult)
        if levels > _MAX_LEVELS or levels * max(num_blocks, 0) * _MIN_TENSOR_BYTES > file_bytes:
            raise ConfigError(f"a network of {levels} levels with {num_blocks} blocks each does not fit the file")
    try:
        with WithoutValues():
            return Precond(**arguments)
    except Exception as error:  # whatever numbers can do to a constructor: division by zero, negative or huge sizes
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"its arguments do not describe a network: {reason}") from error


def fill_network(net: Precond, tensors: Mapping[str, torch.Tensor]) -> Precond:
    """Give a network that was laid out its tensors, strictly by name and shape."""
    _check_tensors(net.state_dict(), tensors)
    net.load_state_dict({name: value.contiguous() for name, value in tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _check_tensors(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for names, verdict in ((expected.keys() - tensors.keys(), "lacks"), (tensors.keys() - expected.keys(), "has")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            which = "that its configuration asks for" if verdict == "lacks" else "unknown to its configuration"
            raise ConfigError(f"the network {verdict} tensors {which}: {listed}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            raise ConfigError(f"tensor {name} has shape {list(value.shape)} where its configuration asks for {wanted}")
        if not value.is_floating_point():
            raise ConfigError(f"tensor {name} has dtype {value.dtype}; floating-point numbers are needed")


def build_encoder(class_name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Encoder:
    """The encoder called `class_name` with these constructor arguments."""
    if class_name not in ENCODERS:
        raise ConfigError(f"its encoder has the class {class_name!r}; known are {', '.join(ENCODERS)}")
    return _construct(ENCODERS[class_name], args, kwargs)


def build_loss(class_name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> EDM2Loss:
    """The training loss with these constructor arguments."""
    if class_name != EDM2Loss.__name__:
        raise ConfigError(f"its loss has the class {class_name!r}; known is {EDM2Loss.__name__}")
    return _construct(EDM2Loss, args, kwargs)


def _construct(cls: type, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    arguments = arguments_of(cls, args, kwargs)
    try:
        return cls(**arguments)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{cls.__name__} cannot be made from its arguments: {reason}") from error


def described(obj: Any) -> dict[str, Any]:
    """Class name and constructor arguments of an encoder or loss, for a header."""
    cls = type(obj)
    return {"class": cls.__name__, "arguments": arguments_of(cls, obj._init_args, obj._init_kwargs)}
