"""Network files: one trained network with everything needed to use it, as pickle, .safetensors or model folder."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dnnlib.atomic import atomic_path
from dnnlib.disk import write_error
from dnnlib.errors import ConfigError, one_line, reason_of
from torch_utils.pickles.safe_pickle import file_format, read_pickle
from training.own.own_network import OwnNetwork, StoredOwnNetwork
from training.snapshot.code import TrustCode
from training.snapshot.locate import SUFFIXES, locate_network, read_folder
from training.snapshot.parts import (
    Snapshot,
    build_network,
    described,
    described_network,
    described_snapshot,
    rebuilt_parts,
)
from training.snapshot.pickle_file import snapshot_of, write_pickle
from training.snapshot.safetensors_file import read_safetensors, write_safetensors

KIMG = r"\d+(?:\.\d{3})?"  # an image count in a file's name, see `name_of_nimg`


@dataclass(frozen=True, kw_only=True)
class SnapshotHeader:
    """Everything in a network file but the values of its tensors."""

    nimg: int | None
    ema_std: float | None
    config: dict[str, Any]  # {"class": "Precond", "arguments": {...}}: the constructor's, by name, as JSON values
    # Dtype and shape by name, in the network's order.
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False)
    buffers: frozenset[str] = field(repr=False)  # names of the tensors that are not parameters
    encoder: dict[str, Any] | None  # like `config`
    loss: dict[str, Any] | None  # like `config`
    dataset_kwargs: dict[str, Any] | None
    info: dict[str, Any]


def load_snapshot(
    source: str | os.PathLike[str],
    trust_code: TrustCode | None = None,
    *,
    device: torch.device | str = "cpu",
    own_networks: Sequence[str] = (),
) -> Snapshot:
    """Read the network `source` without running anything from it.

    `source` is a file, an http(s) URL, a model folder or a name on the hub (`training.snapshot.locate`). The content
    of a file, not its name, tells its format; the name only fills in image count and EMA length that the content lacks.

    Files with classes other than ours are refused unless the caller gives `trust_code`. It is called with each source
    text that the file has for them before the text is run, like a program that was downloaded. Networks of the user's
    own (docs/extending.md) are refused unless `own_networks` has their class, as module:Class, which is then imported.

    Raises ConfigError, naming the file, if it is missing, foreign or damaged.
    """
    snapshot = _read(str(source), values=True, trust_code=trust_code, device=device, own_networks=own_networks)
    snapshot.net.to(device)
    return snapshot


def read_header(source: str | os.PathLike[str], *, own_networks: Sequence[str] = ()) -> SnapshotHeader:
    """Read the network `source`, named as for `load_snapshot`, without the values of its tensors.

    Only the header of a .safetensors file is read; a pickle is read through, but no tensor is kept. The same files are
    refused, with the same errors, as by `load_snapshot`, except for damage in the values.
    """
    return header_of(_read(str(source), values=False, own_networks=own_networks))


def header_of(snapshot: Snapshot) -> SnapshotHeader:
    """Return what `read_header` returns for the file that `snapshot` was read from."""
    net = snapshot.net
    return SnapshotHeader(
        nimg=snapshot.nimg,
        ema_std=snapshot.ema_std,
        config=described_network(net),
        tensors={name: (value.dtype, tuple(value.shape)) for name, value in net.state_dict().items()},
        buffers=frozenset(name for name, _ in net.named_buffers()),
        encoder=None if snapshot.encoder is None else described(snapshot.encoder),
        loss=None if snapshot.loss_fn is None else described(snapshot.loss_fn),
        dataset_kwargs=snapshot.dataset_kwargs,
        info=snapshot.info,
    )


def _read(
    name: str,
    values: bool,
    trust_code: TrustCode | None = None,
    device: torch.device | str = "cpu",
    own_networks: Sequence[str] = (),
) -> Snapshot:
    """Read the network `name`. Without `values` it is on the meta device, else on `device` or still on the CPU."""
    path = locate_network(name)
    try:
        kind = "folder" if path.is_dir() else file_format(path)
        tree = read_pickle(path, name, values=values) if kind == "pickle" else None
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {reason_of(error)}") from None
    try:
        if kind == "pickle":
            snapshot = snapshot_of(tree, path.stat().st_size, trust_code)
        elif kind == "folder":
            snapshot = read_folder(path, values)
        elif kind == "safetensors":
            snapshot = read_safetensors(path, values, device, own_networks=own_networks)
        else:
            raise ConfigError("it is neither a pickle nor a safetensors file")
    except ConfigError as error:
        raise ConfigError(f"{name}: {one_line(error)}") from error
    nimg, ema_std = parse_name(name) or parse_name(path.name) or (None, None)
    return replace(
        snapshot,
        nimg=nimg if snapshot.nimg is None else snapshot.nimg,
        ema_std=ema_std if snapshot.ema_std is None else snapshot.ema_std,
    )


def save_snapshot(
    snapshot: Snapshot,
    path: str | os.PathLike[str],
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    as_is: bool = False,
) -> None:
    """Write `snapshot` to `path`, whole or not at all, in the format of its suffix: .pkl or .safetensors.

    Parameters and buffers are stored as float16. Network, encoder and loss are rebuilt from their constructor arguments
    first, so that no hooks, compiled code or loaded VAE reach the file. `as_is` skips that, for parts that are new and
    in float16 already. `tensors`, a state dictionary of the network, replaces its own.

    Pickles stay readable by the published code; they have one more entry if `info` is set, or if the name does not tell
    image count and EMA length. Networks of the user's own are written as .safetensors only.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} has none of the suffixes {' and '.join(SUFFIXES)} of network files")
    if path.suffix == ".pkl" and isinstance(snapshot.net, OwnNetwork | StoredOwnNetwork):
        raise ConfigError(f"{path} cannot hold an own network, {snapshot.net.name}; use .safetensors")
    if not as_is:
        snapshot = _rebuilt(snapshot, tensors)
    try:
        with atomic_path(path) as temp:
            if path.suffix == ".pkl":
                is_named = (snapshot.nimg, snapshot.ema_std) in (parse_name(path), (None, None))
                write_pickle(temp, snapshot, with_provenance=bool(snapshot.info) or not is_named)
            else:
                write_safetensors(temp, snapshot)
    except OSError as error:
        raise write_error(path, error) from error


def label_dropout(info: Mapping[str, Any]) -> float:
    """Return the probability with which a network learned images without labels, from the `info` of its file, or 0.

    Such a network also works unconditionally: its labels are zeros then.
    """
    recorded = info.get("label_dropout")
    return recorded if isinstance(recorded, float) and 0 < recorded < 1 else 0.0


def parse_name(name: str | os.PathLike[str]) -> tuple[int, float] | None:
    """Return image count and EMA length of a name like network-snapshot-0008388-0.050.pkl; None for other names."""
    match = re.search(r"-(\d{7,12}(?:\.\d{3})?)-(\d\.\d{3})\.(?:pkl|safetensors)$", str(name))
    return None if match is None else (nimg_from_name(match[1]), float(match[2]))


def name_of_nimg(nimg: int, *, is_saved: Callable[[int], bool] = lambda nimg: False) -> str:
    """Return an image count as file names have it: 0008388 for 8,388,608 images, 0000001.536 for 1,536.

    The published form has the thousands alone. It is used if they tell the count: for multiples of 1024, and for those
    of 1000 unless `is_saved` is true for the multiple of 1024 with the same thousands, whose files have that name.
    """
    kimg, rest = divmod(nimg, 1000)
    same = nimg_from_kimg(kimg)
    if nimg == same or (rest == 0 and not is_saved(same)):
        return f"{kimg:07d}"
    return f"{kimg:07d}.{rest:03d}"


def nimg_from_name(text: str) -> int:
    """Invert `name_of_nimg`; thousands alone count as by `nimg_from_kimg`."""
    kimg, point, rest = text.partition(".")
    return int(kimg) * 1000 + int(rest) if point else nimg_from_kimg(int(kimg))


def nimg_from_kimg(kimg: int) -> int:
    """Return the image count whose thousands a file name keeps: the smallest multiple of 1024 with these thousands.

    A few numbers have none (no training in batches of 1024 or more gets there); their count is kimg thousands.
    """
    nimg = -(-kimg * 1000 // 1024) * 1024
    return nimg if nimg // 1000 == kimg else kimg * 1000


def _rebuilt(snapshot: Snapshot, tensors: Mapping[str, torch.Tensor] | None) -> Snapshot:
    """Return `snapshot` with newly built parts, values in float16 on the CPU, and plain dictionaries."""
    state = snapshot.net.state_dict() if tensors is None else tensors
    entries = described_snapshot(snapshot)
    rounded = {name: value.detach().to("cpu", torch.float16) for name, value in state.items()}
    net: Any
    if isinstance(snapshot.net, OwnNetwork):
        net = StoredOwnNetwork(name=snapshot.net.name, arguments=snapshot.net.arguments, tensors=rounded)
    else:
        net = build_network(entries["network"], rounded, float("inf"))
    return Snapshot(
        net=net,
        **rebuilt_parts(entries["encoder"], entries["loss"]),
        dataset_kwargs=entries["dataset_kwargs"],
        nimg=entries["nimg"],
        ema_std=entries["ema_std"],
        info=entries["info"],
    )
