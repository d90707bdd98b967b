"""The files of a reconstruction's inputs: opened, checked against each other, and read in groups."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dnnlib.background import map_in_order
from dnnlib.download import open_url
from dnnlib.errors import ConfigError
from training.networks_edm2 import Precond
from training.own.own_network import OwnNetwork
from training.posthoc.inputs import Input
from training.posthoc.sums import Float16File, Reader, StateReader
from training.snapshot import Snapshot, SnapshotHeader, header_of, load_snapshot, read_header
from training.snapshot.parts import fill_network, lay_out_network, rebuilt_parts


@dataclass(frozen=True, kw_only=True)
class Group:
    """Inputs that are open at the same time."""

    indices: list[int]  # among all inputs
    readers: list[Reader]
    last: bool  # no other group follows


class InputFiles:
    """The files of `inputs`; call `check` before anything else.

    .safetensors files stay open, so that the tensors added are those that were checked. Pickles are kept in memory if
    their files take at most `read_bytes` together; otherwise `groups` reads a few at a time.
    """

    def __init__(self, inputs: Sequence[Input], read_bytes: int, own_networks: Sequence[str] = ()) -> None:
        self._own_networks = own_networks
        self._inputs = list(inputs)
        self._paths = [open_url(file.path, return_filename=True) for file in inputs]
        self._mapped = {i: file for i, path in enumerate(self._paths) if (file := _map(path)) is not None}
        self._readers: dict[int, Reader] = {i: _file_reader(self._paths[i], file) for i, file in self._mapped.items()}
        self._sizes = {i: _size(path) for i, path in enumerate(self._paths) if i not in self._readers}
        self._keep = sum(self._sizes.values()) <= read_bytes
        self._group_bytes = read_bytes // 2  # one group is read while another is added
        # The .safetensors header read last, and its layout: most files of a run share it.
        self._known_layout: Any = None
        self._known_header: SnapshotHeader

    def check(self) -> Iterator[None]:
        """Compare every input with the first, one per step. Raises ConfigError with the file's name."""
        for index, file in enumerate(self._inputs):
            if index in self._mapped:
                header = self._read_mapped(index)
                _check_name(header, file)
            elif self._keep:
                snapshot = load_snapshot(file.path)
                header = header_of(snapshot)
                self._readers[index] = StateReader(snapshot.net.state_dict().__getitem__)
            else:
                header = read_header(file.path, own_networks=self._own_networks)
            if index == 0:
                self._expected = header
            _check_header(header, self._expected, file.path, self._inputs[0].path)
            yield

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters, by name."""
        header = self._expected
        return {name: shape for name, (_, shape) in header.tensors.items() if name not in header.buffers}

    def groups(self) -> Iterator[Group]:
        """Yield all inputs in groups; one group is read ahead."""
        plan: list[list[int]] = []
        room = 0
        for index, size in self._sizes.items():
            if index not in self._readers:
                if room < size:
                    plan.append([])
                    room = max(self._group_bytes, size)
                plan[-1].append(index)
                room -= size
        if self._readers:
            plan.append(sorted(self._readers))
        last = plan[-1]

        def read(group: list[int]) -> Group:
            return Group(indices=group, readers=[self._reader(i) for i in group], last=group is last)

        return map_in_order(ThreadPoolExecutor(1), read, plan, max_pending=2)

    def read_buffers(self, reader: Reader) -> dict[str, torch.Tensor]:
        """Return copies of the buffers in float16, as files have them."""
        return {
            name: reader.tensor(name).to(torch.float16, copy=True)
            for name in self._expected.tensors
            if name in self._expected.buffers
        }

    def lay_out(self) -> Precond | OwnNetwork:
        """Build a network like that of the inputs, to be filled."""
        return lay_out_network(self._expected.config, float("inf"), self._own_networks)

    def assemble(
        self,
        net: Precond | OwnNetwork,
        tensors: dict[str, torch.Tensor],
        *,
        nimg: int,
        std: float,
        info: dict[str, Any],
    ) -> Snapshot:
        """Return `net` with `tensors` as a snapshot; all else, and the start of `info`, is the first input's."""
        header = self._expected
        return Snapshot(
            net=fill_network(net, tensors),
            **rebuilt_parts(header.encoder, header.loss),
            dataset_kwargs=header.dataset_kwargs,
            nimg=nimg,
            ema_std=std,
            info={**header.info, **info},
        )

    def _read_mapped(self, index: int) -> SnapshotHeader:
        """Return the header of a .safetensors file, without parsing it if only time and length are new."""
        layout, recorded = _layout(self._mapped[index])
        if recorded is None or layout != self._known_layout:
            self._known_header = read_header(self._inputs[index].path, own_networks=self._own_networks)
            self._known_layout = layout
            return self._known_header
        return replace(self._known_header, nimg=recorded[0], ema_std=recorded[1])

    def _reader(self, index: int) -> Reader:
        if index in self._readers:
            return self._readers[index]
        snapshot = load_snapshot(self._inputs[index].path)
        # The file may have been replaced since the check.
        _check_header(header_of(snapshot), self._expected, self._inputs[index].path, self._inputs[0].path)
        return StateReader(snapshot.net.state_dict().__getitem__)


def _map(path: str) -> Any:
    """Open a .safetensors file, whose tensors are views of the mapped file; None for other files."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return None  # a pickle, or a file that `load_snapshot` and `read_header` refuse with a reason


def _file_reader(path: str, file: Any) -> Reader:
    """Return the fastest reader for the .safetensors file at `path`, which is open as `file`."""
    try:
        return Float16File(path, file.get_tensor)
    except (ValueError, KeyError, TypeError, OSError):
        return StateReader(file.get_tensor)


def _layout(file: Any) -> tuple[Any, tuple[int | None, float | None] | None]:
    """Return what the headers of one network's files have in common; and time and length, None if invalid."""
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


def _check_name(header: SnapshotHeader, file: Input) -> None:
    """Refuse a file whose header records another time or length than its name."""
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
    """Return in what two objects, described by class and arguments, differ; '' if they are equal."""
    one, two = ({"class": (d or {}).get("class"), **(d or {}).get("arguments", {})} for d in (ours, theirs))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name) or (name in one) != (name in two)]
    texts = []
    for name in names:
        a, b = (f"{name}={d[name]!r}" if name in d else f"no {name}" for d in (one, two))
        texts.append(f"{a} instead of {repr(two[name]) if name in one and name in two else b}")
    return ", ".join(texts)
