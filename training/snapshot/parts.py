"""The parts of a network file, built from what the file says: checked arguments, known classes, tensors by name.

Every value here may come from a stranger's file. Nothing is allocated and no loop runs on its word alone: the network
is laid out on the meta device, from checked arguments, and takes over the file's tensors.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dnnlib.errors import ConfigError, one_line
from training.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.loss import EDM2Loss
from training.networks_edm2 import Block, Precond, UNet, image_size
from training.own.own_network import OwnNetwork, StoredOwnNetwork, build_own_network, chosen_class

ENCODERS: dict[str, type[Encoder]] = {cls.__name__: cls for cls in (StandardRGBEncoder, StabilityVAEEncoder)}

_MAX_DEPTH = 8
_MAX_ITEMS = 10_000  # of a plain value, however it is nested
_MAX_NUMBER = 2**20  # in a network's arguments
_MAX_LEVELS = 16
_MIN_TENSOR_BYTES = 64  # what a tensor takes in a file at the least, its description included

# Arguments that a Block gets from the UNet, not from the network's arguments.
_BLOCK_OWN = {"in_channels", "out_channels", "emb_channels", "flavor", "resample_mode", "attention"}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The contents of a network file: what its three readers return and `save_snapshot` writes."""

    net: Precond | OwnNetwork  # evaluation mode; parameters in the dtype of the file, float16 in published files
    encoder: Encoder | None = None
    dataset_kwargs: dict[str, Any] | None = None
    loss_fn: EDM2Loss | None = None
    nimg: int | None = None  # images seen in training
    ema_std: float | None = None  # relative EMA length, Eq. 123 of arXiv 2312.02696
    info: dict[str, Any] = field(default_factory=dict)  # provenance, as JSON values

    def __repr__(self) -> str:
        """Return one line, with the network's shape in place of its modules."""
        net = self.net
        shape = "x".join(map(str, (net.img_channels, *image_size(net))))
        num_params = sum(parameter.numel() for parameter in net.parameters())
        encoder, loss = (None if part is None else type(part).__name__ for part in (self.encoder, self.loss_fn))
        return (
            f"Snapshot(net={type(net).__name__} of {shape} with {net.label_dim} classes and {num_params:,} parameters,"
            f" {encoder=!s}, loss_fn={loss}, nimg={self.nimg}, ema_std={self.ema_std}, info of {list(self.info)})"
        )


def plain(value: Any, what: str) -> Any:
    """Return `value` as JSON values: None, bool, int, finite float, str, list, dict by str.

    NumPy numbers and small arrays become numbers and lists. Raises ConfigError for others; `what` names the value.
    """
    return _plain(value, what, _MAX_DEPTH, [_MAX_ITEMS])


def _plain(value: Any, what: str, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        raise ConfigError(f"{what} is nested too deep or too large")
    if isinstance(value, np.generic | np.ndarray) and value.size <= _MAX_ITEMS:
        value = value.tolist()
    if isinstance(value, str):  # long texts count more: a pickle may refer to one many times
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
    """Return constructor arguments of `cls` by name, plain. `names` are allowed (default: its parameters)."""
    parameters = list(inspect.signature(cls).parameters)
    args = list(args)
    if len(args) > len(parameters):
        raise ConfigError(f"{cls.__name__} has {len(args)} positional arguments; at most {len(parameters)} are known")
    given = dict(zip(parameters, args, strict=False))
    if unknown := sorted(set(kwargs) - (names if names is not None else set(parameters))):
        raise ConfigError(f"{cls.__name__} has an unknown argument {unknown[0]!r}")
    if twice := sorted(set(given) & set(kwargs)):
        raise ConfigError(f"{cls.__name__} has two values for its argument {twice[0]!r}")
    given |= kwargs
    return {name: plain(value, f"argument {name!r} of {cls.__name__}") for name, value in given.items()}


def network_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's constructor arguments by name. Raises ConfigError for unknown ones and values out of range."""
    names = set(inspect.signature(Precond).parameters) | set(inspect.signature(UNet).parameters)
    names |= set(inspect.signature(Block).parameters) - _BLOCK_OWN
    arguments = arguments_of(Precond, args, kwargs, names - {"unet_kwargs", "block_kwargs"})
    for name, value in arguments.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, str | list | dict) or abs(n or 0) > _MAX_NUMBER for n in numbers):
            raise ConfigError(f"argument {name!r} of the network has a value out of range: {str(value)[:80]}")
    return arguments


def build_network(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    file_bytes: float,
    own_networks: Sequence[str] = (),
) -> Precond | OwnNetwork:
    """Build the network of this class and these arguments, and let it take over these tensors.

    It is in evaluation mode, without gradients. Raises ConfigError unless names and shapes are exactly the network's.
    `file_bytes`, the size of the file, bounds how many layers the arguments may ask for. `own_networks`: classes that
    the user named, which are imported if the network is of one of them.
    """
    return fill_network(lay_out_network(config, file_bytes, own_networks), tensors)


def lay_out_network(
    config: Mapping[str, Any], file_bytes: float, own_networks: Sequence[str] = ()
) -> Precond | OwnNetwork:
    """Build the network of this class and these arguments; on the meta device, unless it is the user's own."""
    if config["class"] != Precond.__name__:
        arguments = plain(config["arguments"], "its network's arguments")
        with torch.random.fork_rng(devices=[]):
            return build_own_network(chosen_class(config["class"], own_networks), arguments)
    arguments = network_arguments((), config["arguments"])
    defaults = inspect.signature(UNet).parameters
    mult, num_blocks = (arguments.get(name, defaults[name].default) for name in ("channel_mult", "num_blocks"))
    if isinstance(mult, list | tuple) and isinstance(num_blocks, int):
        levels = len(mult)
        if levels > _MAX_LEVELS or levels * max(num_blocks, 0) * _MIN_TENSOR_BYTES > file_bytes:
            raise ConfigError(f"a network of {levels} levels with {num_blocks} blocks each does not fit the file")
    try:
        with WithoutValues():
            return Precond(**arguments)
    except Exception as error:  # numbers may divide by zero, or be negative or huge as sizes
        raise ConfigError(f"its arguments do not describe a network: {one_line(error)}") from error


def fill_network(net: Precond | OwnNetwork, tensors: Mapping[str, torch.Tensor]) -> Precond | OwnNetwork:
    """Give a network from `lay_out_network` its tensors, strictly by name and shape."""
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
    """Build the encoder of class `class_name` from its constructor arguments."""
    if class_name not in ENCODERS:
        raise ConfigError(f"its encoder has the class {class_name!r}; known are {', '.join(ENCODERS)}")
    return _construct(ENCODERS[class_name], args, kwargs)


def build_loss(class_name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> EDM2Loss:
    """Build the training loss from its constructor arguments."""
    if class_name != EDM2Loss.__name__:
        raise ConfigError(f"its loss has the class {class_name!r}; known is {EDM2Loss.__name__}")
    return _construct(EDM2Loss, args, kwargs)


def _construct(cls: type, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    arguments = arguments_of(cls, args, kwargs)
    try:
        return cls(**arguments)
    except Exception as error:
        raise ConfigError(f"{cls.__name__} cannot be built from its arguments: {one_line(error)}") from error


def rebuilt_parts(encoder: Mapping[str, Any] | None, loss: Mapping[str, Any] | None) -> dict[str, Any]:
    """Build encoder and loss from their entries in a header, as arguments of Snapshot."""
    return {
        "encoder": None if encoder is None else build_encoder(encoder["class"], (), encoder["arguments"]),
        "loss_fn": None if loss is None else build_loss(loss["class"], (), loss["arguments"]),
    }


def described(obj: Any) -> dict[str, Any]:
    """Return class name and constructor arguments of an encoder or loss, as a header has them."""
    return {"class": type(obj).__name__, "arguments": arguments_of(type(obj), obj._init_args, obj._init_kwargs)}


def described_network(net: Any) -> dict[str, Any]:
    """Return class name and constructor arguments of a network, as a header has them."""
    if isinstance(net, OwnNetwork | StoredOwnNetwork):
        return {"class": net.name, "arguments": plain(net.arguments, f"arguments of {net.name}")}
    return {"class": type(net).__name__, "arguments": network_arguments(net._init_args, net._init_kwargs)}


def described_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return everything in a snapshot but its tensors as JSON values, under the keys of a file's header."""
    encoder, loss, options = snapshot.encoder, snapshot.loss_fn, snapshot.dataset_kwargs
    return {
        "network": described_network(snapshot.net),
        "encoder": None if encoder is None else described(encoder),
        "loss": None if loss is None else described(loss),
        "dataset_kwargs": None if options is None else plain(with_text_paths(options), "dataset_kwargs"),
        "nimg": snapshot.nimg,
        "ema_std": None if snapshot.ema_std is None else float(snapshot.ema_std),
        "info": plain(dict(snapshot.info), "info"),
    }


def with_text_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with paths as text."""
    return {key: str(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_SCALINGS = ("mul", "__mul__", "__rmul__")


class WithoutValues(TorchFunctionMode):
    """A context in which new tensors are on the meta device: a shape and a type, no memory.

    `torch.device("meta")` means the same. But there the first random tensor, or product with a number, makes PyTorch
    load its compiler, which takes more than a second; here the few operations of constructors are done by allocating.
    Whatever else a constructor does goes the ordinary way.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by PyTorch in place of its functions."""
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs.pop("generator", None)
            return torch.empty(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__name__", "") in _SCALINGS and len(args) == 2 and not kwargs:
            tensor, factor = args
            if tensor.is_meta and tensor.is_floating_point() and isinstance(factor, int | float):
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        with torch.device("meta"):
            return func(*args, **kwargs)
