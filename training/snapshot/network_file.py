"""Network files: one trained network with what is needed to use it, as published pickle or as .safetensors."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import atomic_path
from dnnlib.disk import write_error
from dnnlib.errors import ConfigError, reason_of
from torch_utils.pickles.safe_pickle import printable, read_pickle
from training.encoders import Encoder
from training.loss import EDM2Loss
from training.networks_edm2 import Precond
from training.snapshot import model_folder, pickle_file, safetensors_file
from training.snapshot.code import TrustCode
from training.snapshot.locate import SUFFIXES, locate_network
from training.snapshot.parts import build_encoder, build_loss, build_network, described, network_arguments, plain


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The contents of a network file."""

    net: Precond  # evaluation mode; parameters in the dtype that the file has, float16 in published files
    encoder: Encoder | None = None
    dataset_kwargs: dict[str, Any] | None = None
    loss_fn: EDM2Loss | None = None
    nimg: int | None = None  # images seen in training
    ema_std: float | None = None  # relative length of the average, Eq. 123 of arXiv 2312.02696
    info: dict[str, Any] = field(default_factory=dict)  # provenance, as JSON has it


@dataclass(frozen=True, kw_only=True)
class SnapshotHeader:
    """What a network file says of itself, without the numbers in its tensors."""

    nimg: int | None
    ema_std: float | None
    config: dict[str, Any]  # {"class": "Precond", "arguments": {...}}, the constructor's, by name, as JSON has them
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name, in the network's order
    buffers: frozenset[str]  # which of the tensors are no parameters
    encoder: dict[str, Any] | None  # like `config`
    loss: dict[str, Any] | None  # like `config`
    dataset_kwargs: dict[str, Any] | None
    info: dict[str, Any]


def load_snapshot(
    source: str | os.PathLike[str], trust_code: TrustCode | None = None, *, device: torch.device | str = "cpu"
) -> Snapshot:
    """Read the network `source`, without running anything from it.

    That is a file, an http(s) URL, a model folder or a name on the hub: see `locate_network` in
    `training.snapshot.locate`.

    Files with other classes than ours are refused, unless the caller gives `trust_code`: then the source text that the
    file has for them is run, as if it were a program that was downloaded. `trust_code` is told of it before.

    The file's content, not its name, tells which format it has. Where it does not record image count and EMA length,
    they are taken from its name. Raises ConfigError, naming the file, where it is missing, foreign or damaged.
    """
    fields = _read_fields(str(source), values=True, trust_code=trust_code, device=device)
    fields["net"].to(device)
    return Snapshot(**fields)


def read_header(source: str | os.PathLike[str]) -> SnapshotHeader:
    """What the network `source`, named as for `load_snapshot`, says of itself, without the numbers in its tensors.

    Of a .safetensors file only the header is read; a pickle is read through, but no tensor is kept. The same files
    are refused, with the same errors, as by `load_snapshot`, save for damage inside the numbers.
    """
    fields = _read_fields(str(source), values=False)
    net = fields.pop("net")
    return SnapshotHeader(
        nimg=fields["nimg"],
        ema_std=fields["ema_std"],
        config={"class": type(net).__name__, "arguments": network_arguments(net._init_args, net._init_kwargs)},
        tensors={name: (value.dtype, tuple(value.shape)) for name, value in net.state_dict().items()},
        buffers=frozenset(name for name, _ in net.named_buffers()),
        encoder=None if fields["encoder"] is None else described(fields["encoder"]),
        loss=None if fields["loss_fn"] is None else described(fields["loss_fn"]),
        dataset_kwargs=fields["dataset_kwargs"],
        info=fields["info"],
    )


def _read_fields(
    name: str, values: bool, trust_code: TrustCode | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The fields of a Snapshot from the file called `name`; without `values` the network is on the meta device.

    With `values` it may be on `device`, or still on the CPU.
    """
    path = locate_network(name)
    try:
        format_name = "folder" if path.is_dir() else _format_of(path)
        tree = read_pickle(path, name, values=values) if format_name == "pickle" else None
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {reason_of(error)}") from None
    try:
        if format_name == "pickle":
            fields = pickle_file.parts_of(tree, path.stat().st_size, trust_code)
        elif format_name == "folder":
            fields = model_folder.read(path, values)
        elif format_name == "safetensors":
            fields = safetensors_file.read(path, values, device)
        else:
            raise ConfigError("it is neither a pickle nor a safetensors file")
    except ConfigError as error:
        raise ConfigError(f"{name}: {printable(error)}") from error
    fields = {"nimg": None, "ema_std": None, "info": {}} | fields
    nimg, ema_std = parse_name(name) or parse_name(path.name) or (None, None)
    fields["nimg"] = nimg if fields["nimg"] is None else fields["nimg"]
    fields["ema_std"] = ema_std if fields["ema_std"] is None else fields["ema_std"]
    return fields


def save_snapshot(
    snapshot: Snapshot, path: str | os.PathLike[str], *, tensors: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `snapshot` to `path`, in the format that its suffix names, .pkl or .safetensors; whole or not at all.

    Parameters and buffers are stored as float16. The network, encoder and loss are written as if newly made from
    their constructor arguments: no hooks, compiled code or loaded VAE come along. The published code can read the
    pickle, which has an entry more than published ones where there is `info`, or its name does not tell the image
    count and the EMA length. `tensors`, the state dictionary of the network at another time, takes the place of its
    own.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} has none of the suffixes {' and '.join(SUFFIXES)} of network files")
    net: Any = snapshot.net  # Any: the decorator adds the attributes with the constructor arguments
    options = snapshot.dataset_kwargs
    stored = net.state_dict() if tensors is None else tensors
    tensors = {name: value.detach().to("cpu", torch.float16) for name, value in stored.items()}
    parts: dict[str, Any] = {
        "net": build_network(network_arguments(net._init_args, net._init_kwargs), tensors, float("inf")),
        "encoder": None if snapshot.encoder is None else _fresh(snapshot.encoder, build_encoder),
        "loss_fn": None if snapshot.loss_fn is None else _fresh(snapshot.loss_fn, build_loss),
        "dataset_kwargs": None if options is None else plain(_with_text_paths(options), "dataset_kwargs"),
    }
    info = plain(dict(snapshot.info), "info")
    nimg, ema_std = snapshot.nimg, None if snapshot.ema_std is None else float(snapshot.ema_std)
    try:
        with atomic_path(path) as temp:
            if path.suffix == ".pkl":
                told = bool(info) or (nimg, ema_std) not in (parse_name(path), (None, None))
                extra = {"nimg": nimg, "ema_std": ema_std, "info": info} if told else None
                pickle_file.write(temp, **parts, provenance=extra)
            else:
                safetensors_file.write(temp, **parts, nimg=nimg, ema_std=ema_std, info=info)
    except OSError as error:
        raise write_error(path, error) from error


def label_dropout(info: Mapping[str, Any]) -> float:
    """With which probability a network learned images without labels, by the `info` of its file; 0 where it says none.

    Such a network also works unconditionally, given zeros for labels.
    """
    said = info.get("label_dropout")
    return said if isinstance(said, float) and 0 < said < 1 else 0.0


def parse_name(name: str | os.PathLike[str]) -> tuple[int, float] | None:
    """Image count and EMA length from a file name such as network-snapshot-0008388-0.050.pkl; None for other names."""
    match = re.search(r"-(\d{7,12})-(\d\.\d{3})\.(?:pkl|safetensors)$", str(name))
    return None if match is None else (nimg_from_kimg(int(match[1])), float(match[2]))


def nimg_from_kimg(kimg: int) -> int:
    """The image count of which a file name keeps the thousands: the smallest multiple of 1024 with these thousands.

    A few numbers have none (no training in batches of 1024 or more gets there); their count is kimg thousands.
    """
    nimg = -(-kimg * 1000 // 1024) * 1024
    return nimg if nimg // 1000 == kimg else kimg * 1000


def _format_of(path: Path) -> str:
    """'safetensors', 'pickle' or 'unknown', from the first bytes of the file."""
    with open(path, "rb") as file:
        head = file.read(9)
    # A header length that fits the file, then JSON: in a pickle that byte is part of a frame's length, and zero.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" else "unknown"


def _fresh(obj: Any, build: Any) -> Any:
    entry = described(obj)
    return build(entry["class"], (), entry["arguments"])


def _with_text_paths(options: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}
