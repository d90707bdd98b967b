"""The files of a reconstruction's inputs: opened, and checked against each other before anything is added."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dnnlib.download import open_url
from dnnlib.errors import ConfigError
from training.networks_edm2 import Precond
from training.posthoc.inputs import Input
from training.posthoc.sums import Float16File, Reader, StateReader, read_ahead
from training.snapshot import Snapshot, SnapshotHeader, load_snapshot, read_header
from training.snapshot.parts import (
    build_encoder,
    build_loss,
    described,
    fill_network,
    lay_out_network,
    network_arguments,
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Inputs that are open at a time: their places among all inputs, and their tensors."""

    places: list[int]
    readers: list[Reader]
    last: bool  # no other group follows


class InputFiles:
    """The files of `inputs`, open and checked; call `check` first.

    .safetensors files stay open: what is added is what was checked. Pickles are kept in memory if their
    files take `read_bytes` together at most; of more, `groups` reads a few at a time.
    """

    def __init__(self, inputs: Sequence[Input], read_bytes: int) -> None:
        self._inputs = list(inputs)
        self._paths = [open_url(file.path, return_filename=True) for file in inputs]
        self._mapped = {place: file for place, path in enumerate(self._paths) if (file := _map(path)) is not None}
        self._readers: dict[int, Reader] = {
            place: _file_reader(self._paths[place], file) for place, file in self._mapped.items()
        }
        self._sizes = {i: _size(path) for i, path in enumerate(self._paths) if i not in self._readers}
        self._keep = sum(self._sizes.values()) <= read_bytes
        self._group_bytes = read_bytes // 2  # one group is read while another is added
        self._known_layout: Any = None  # of the .safetensors header read last, and that header
        self._known_header: SnapshotHeader

    def check(self) -> Iterator[None]:
        """Hold every input against the first, one a step. Raises ConfigError, with the file's name."""
        for place, file in enumerate(self._inputs):
            if place in self._mapped:
                header = self._read_mapped(place)
                _check_name(header, file)
            elif self._keep:
                snapshot = load_snapshot(file.path)
                header = _header_of(snapshot)
                self._readers[place] = StateReader(snapshot.net.state_dict().__getitem__)
            else:
                header = read_header(file.path)
            if place == 0:
                self._expected = header
            _check_header(header, self._expected, file.path, self._inputs[0].path)
            yield

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        header = self._expected
        return {name: shape for name, (_, shape) in header.tensors.items() if name not in header.buffers}

    def groups(self) -> Iterator[Group]:
        """All inputs, in groups that come one after the other; one is read ahead."""
        plan: list[list[int]] = []
        room = 0
        for place, size in self._sizes.items():
            if place not in self._readers:
                if room < size:
                    plan.append([])
                    room = max(self._group_bytes, size)
                plan[-1].append(place)
                room -= size
        if self._readers:
            plan.append(sorted(self._readers))
        last = plan[-1]
        return read_ahead(
            lambda places: Group(places=places, readers=[self._reader(i) for i in places], last=places is last), plan, 1
        )

    def read_buffers(self, reader: Reader) -> dict[str, torch.Tensor]:
        """Copies of the buffers, in float16 as files have them."""
        return {
            name: reader.tensor(name).to(torch.float16, copy=True)
            for name in self._expected.tensors
            if name in self._expected.buffers
        }

    def lay_out(self) -> Precond:
        """A network as that of the inputs, without content."""
        return lay_out_network(self._expected.config["arguments"], float("inf"))

    def assemble(
        self, net: Precond, tensors: dict[str, torch.Tensor], *, nimg: int, std: float, info: dict[str, Any]
    ) -> Snapshot:
        """A snapshot of `net` with these parameters and buffers, entries added to `info`, and all else as in the first
        input."""
        header = self._expected
        encoder, loss = header.encoder, header.loss
        return Snapshot(
            net=fill_network(net, tensors),
            encoder=None if encoder is None else build_encoder(encoder["class"], (), encoder["arguments"]),
            loss_fn=None if loss is None else build_loss(loss["class"], (), loss["arguments"]),
            dataset_kwargs=header.dataset_kwargs,
            nimg=nimg,
            ema_std=std,
            info={**header.info, **info},
        )

    def _read_mapped(self, place: int) -> SnapshotHeader:
        """The header of a .safetensors file; at once where it has the same texts and tensors as one read before."""
        layout, recorded = _layout(self._mapped[place])
        if recorded is None or layout != self._known_layout:
            self._known_header = read_header(self._inputs[place].path)
            self._known_layout = layout
            return self._known_header
        return replace(self._known_header, nimg=recorded[0], ema_std=recorded[1])

    def _reader(self, place: int) -> Reader:
        if place in self._readers:
            return self._readers[place]
        snapshot = load_snapshot(self._inputs[place].path)
        # The file may have been replaced since the check.
        _check_header(_header_of(snapshot), self._expected, self._inputs[place].path, self._inputs[0].path)
        return StateReader(snapshot.net.state_dict().__getitem__)


def _map(path: str) -> Any:
    """A .safetensors file, whose tensors are views of the mapped file; None for other files."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return None  # `load_snapshot` and `read_header` say what is wrong, if it is no pickle either


def _file_reader(path: str, file: Any) -> Reader:
    """The fastest way to the numbers of the .safetensors file at `path`, which is open as `file`."""
    try:
        return Float16File(path, file.get_tensor)
    except (ValueError, KeyError, TypeError, OSError):
        return StateReader(file.get_tensor)


def _layout(file: Any) -> tuple[Any, tuple[int | None, float | None] | None]:
    """What all files of one network have in common, as it stands in the header; and time and length, if in order."""
    metadata = file.metadata() or {}
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    layout = (
        [metadata.get(key) for key in ("format", "format_version", "network", "encoder")],
        [(name, part.get_dtype(), part.get_shape()) for name, part in parts.items()],
    )
    try:
        nimg, ema_std = (json.loads(metadata.get(key, "null")) for key in ("nimg", "ema_std"))
    except (ValueError, RecursionError):
        return layout, None
    plain = type(nimg) in (int, type(None)) and type(ema_std) in (int, float, type(None))
    return layout, (nimg, ema_std) if plain else None


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _header_of(snapshot: Snapshot) -> SnapshotHeader:
    """What `read_header` returns for the file that `snapshot` was read from."""
    net: Any = snapshot.net  # Any: the decorator adds the attributes with the constructor arguments
    return SnapshotHeader(
        nimg=snapshot.nimg,
        ema_std=snapshot.ema_std,
        config={"class": type(net).__name__, "arguments": network_arguments(net._init_args, net._init_kwargs)},
        tensors={name: (value.dtype, tuple(value.shape)) for name, value in net.state_dict().items()},
        buffers=frozenset(name for name, _ in net.named_buffers()),
        encoder=None if snapshot.encoder is None else described(snapshot.encoder),
        loss=None if snapshot.loss_fn is None else described(snapshot.loss_fn),
        dataset_kwargs=snapshot.dataset_kwargs,
        info=snapshot.info,
    )


def _check_name(header: SnapshotHeader, file: Input) -> None:
    """Refuse a file whose header tells of another time or length than its name: it is not what it is taken for."""
    nimg = file.nimg if header.nimg is None else header.nimg
    std = file.std if header.ema_std is None else header.ema_std
    if nimg // 1000 != file.nimg // 1000 or abs(std - file.std) > 0.0006:  # names have three decimals
        raise ConfigError(
            f"{file.path} holds an average of length {std} at {nimg} images, not of length {file.std} at {file.nimg};"
            " its name is wrong"
        )


def _check_header(header: SnapshotHeader, expected: SnapshotHeader, path: str, first_path: str) -> None:
    who = f"{path} does not belong with {os.path.basename(first_path)}"
    config = _difference(header.config, expected.config)
    odd = sorted(header.tensors.keys() ^ expected.tensors.keys())
    if odd:
        raise ConfigError(f"{who}: only one of them has the tensor {odd[0]} ({len(odd)} such tensors; {config})")
    for name, (_, shape) in header.tensors.items():
        wanted = expected.tensors[name][1]
        if shape != wanted:
            raise ConfigError(f"{who}: {name} has shape {shape} instead of {wanted} ({config})")
    if config:
        raise ConfigError(f"{who}: its network has {config}")
    if encoder := _difference(header.encoder, expected.encoder):
        raise ConfigError(f"{who}: its encoder has {encoder}")


def _difference(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """Where two objects, described by class and arguments, differ; '' if nowhere."""
    one, two = ({"class": (d or {}).get("class"), **(d or {}).get("arguments", {})} for d in (ours, theirs))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name) or (name in one) != (name in two)]
    texts = []
    for name in names:
        a, b = (f"{name}={d[name]!r}" if name in d else f"no {name}" for d in (one, two))
        texts.append(f"{a} instead of {repr(two[name]) if name in one and name in two else b}")
    return ", ".join(texts)
