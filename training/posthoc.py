"""Networks with any EMA length, after training, from the snapshots of a run (arXiv 2312.02696, Section 3.2).

A reconstruction is a weighted sum of the stored averages; `training.phema` has the weights. Inputs are streamed: one
of them and a batch of outputs are in memory at a time.
"""

import copy
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from training import phema
from training.snapshot import Snapshot, load_snapshot, nimg_from_kimg, save_snapshot

_FORMATS = {"pkl": (".pkl",), "safetensors": (".safetensors",), "both": (".pkl", ".safetensors")}
_NAME = re.compile(r"(?P<prefix>.*)-(?P<kimg>\d+)-(?P<std>\d+\.\d+)(?P<suffix>\.pkl|\.safetensors)")


@dataclass(frozen=True, kw_only=True)
class Input:
    """A stored average: its file, the images seen when it was taken, and its relative EMA length."""

    path: str
    nimg: int
    std: float


@dataclass(frozen=True, kw_only=True)
class Output:
    """A reconstructed network and how near its averaging profile comes to the wanted one."""

    snapshot: Snapshot
    nimg: int
    std: float
    paths: tuple[Path, ...]  # files written; none where no folder was given
    fit: float  # relative L2 error of the achieved response, see phema.posthoc_fit
    gain: float  # how much the rounding errors of stored parameters grow: root of the sum of squared coefficients


@dataclass(frozen=True, kw_only=True)
class Step:
    """One input has been read: checked in pass 0, added to a batch of outputs in each pass from 1 on."""

    input: Input
    pass_idx: int
    outputs: tuple[Output, ...] = ()  # what this step has completed


def list_input_pickles(
    in_dir: str | os.PathLike[str], in_prefix: str | None = None, in_std: float | Iterable[float] | None = None
) -> list[Input]:
    """The snapshots {prefix}-{kimg}-{std}.pkl or .safetensors in `in_dir`, sorted by (nimg, std).

    `in_prefix` and `in_std` leave out those with another prefix or length. Of two formats of one snapshot, the
    safetensors file counts. Raises ConfigError where the folder cannot be read.
    """
    stds = None if in_std is None else [float(std) for std in np.atleast_1d(np.asarray(in_std, dtype=np.float64))]
    try:
        names = sorted(entry.name for entry in os.scandir(in_dir) if entry.is_file())
    except OSError as error:
        raise ConfigError(f"cannot read the input folder {in_dir}: {error.strerror}") from None
    found: dict[str, Input] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or (in_prefix is not None and match["prefix"] != in_prefix):
            continue
        std = float(match["std"])
        if stds is None or any(math.isclose(std, wanted, abs_tol=1e-6) for wanted in stds):
            # The suffixes sort in the order in which the later one wins.
            path = os.path.join(in_dir, name)
            found[name.removesuffix(match["suffix"])] = Input(
                path=path, nimg=nimg_from_kimg(int(match["kimg"])), std=std
            )
    return sorted(found.values(), key=lambda file: (file.nimg, file.std, file.path))


def reconstruct_phema(
    in_pkls: Iterable[Any],
    out_std: float | Iterable[float],
    out_nimg: int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    out_prefix: str = "phema",
    skip_existing: bool = False,
    max_batch_size: int = 8,
    out_format: str = "pkl",
) -> "Reconstruction":
    """Plan the networks of lengths `out_std` at `out_nimg` images (None = the newest input); iterating builds them.

    `in_pkls` are what `list_input_pickles` returns, or anything with path, nimg and std. `max_batch_size` outputs are
    in memory at a time; each such batch reads all inputs once. With `out_dir`, outputs are written there as
    {out_prefix}-{kimg}-{std} in `out_format` (pkl, safetensors, both); `skip_existing` leaves alone what is there.
    Nothing is read or written before the iteration. Raises ConfigError for what cannot be done.
    """
    inputs = [Input(path=str(file.path), nimg=int(file.nimg), std=float(file.std)) for file in in_pkls]
    stds = sorted({float(std) for std in np.atleast_1d(np.asarray(out_std, dtype=np.float64))})
    _check_stds(stds)
    if max_batch_size < 1:
        raise ConfigError(f"a batch of {max_batch_size} outputs builds nothing; give 1 or more")
    if out_format not in _FORMATS:
        raise ConfigError(f"'{out_format}' is no file format; choose from {', '.join(_FORMATS)}")
    nimg, inputs = _choose_inputs(inputs, out_nimg)
    plans = [_Plan(nimg=nimg, std=std, paths=()) for std in stds]
    if out_dir is not None:
        stems = [Path(out_dir) / f"{out_prefix}-{nimg // 1000:07d}-{std:.3f}" for std in stds]
        files = [tuple(stem.with_name(stem.name + suffix) for suffix in _FORMATS[out_format]) for stem in stems]
        _check_files(files, inputs, Path(out_dir))
        plans = [replace(plan, paths=paths) for plan, paths in zip(plans, files, strict=True)]
    skipped = [p for p in plans if skip_existing and p.paths and all(path.is_file() for path in p.paths)]
    return Reconstruction(inputs, [plan for plan in plans if plan not in skipped], skipped, max_batch_size)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    nimg: int
    std: float
    paths: tuple[Path, ...]


class Reconstruction:
    """The work of `reconstruct_phema`: an iterable of `Step` with a length; every iteration does all of it.

    `inputs` take part, `out_nimg` and `out_stds` will be built, `skipped` are the files that were there already.
    """

    def __init__(
        self, inputs: Sequence[Input], plans: Sequence[_Plan], skipped: Sequence[_Plan], max_batch_size: int
    ) -> None:
        self.inputs = list(inputs)
        self.out_nimg = inputs[-1].nimg
        self.out_stds = [plan.std for plan in plans]
        self.skipped = [path for plan in skipped for path in plan.paths]
        self._batches = [list(plans[i : i + max_batch_size]) for i in range(0, len(plans), max_batch_size)]

    def __len__(self) -> int:
        """Number of steps: inputs times (one checking pass and a pass for each batch of outputs)."""
        return len(self.inputs) * (1 + len(self._batches)) if self._batches else 0

    def __iter__(self) -> Iterator[Step]:
        """Check all inputs against each other, then build and write the outputs batch by batch."""
        if not self._batches:
            return
        first = load_snapshot(self.inputs[0].path)
        expected = _layout(first)
        for index, file in enumerate(self.inputs):
            if index:
                _check_layout(_layout(load_snapshot(file.path)), expected, file.path, self.inputs[0].path)
            yield Step(input=file, pass_idx=0)
        for index, batch in enumerate(self._batches):
            yield from self._run_pass(index + 1, batch, first, expected)

    def _run_pass(self, pass_idx: int, batch: list[_Plan], first: Snapshot, expected: dict[str, Any]) -> Iterator[Step]:
        profiles = ([file.nimg for file in self.inputs], [file.std for file in self.inputs])
        wanted = ([plan.nimg for plan in batch], [plan.std for plan in batch])
        coefficients = phema.solve_posthoc_coefficients(*profiles, *wanted)
        fits = phema.posthoc_fit(*profiles, *wanted, coefficients)
        sums = [[torch.zeros(p.shape) for p in first.net.parameters()] for _ in batch]
        last = first
        for file, weights in zip(self.inputs, coefficients, strict=True):
            if file is not self.inputs[0]:
                last = load_snapshot(file.path)
                # The file may have been replaced since the check.
                _check_layout(_layout(last), expected, file.path, self.inputs[0].path)
            tensors = [p.detach().to(torch.float32) for p in last.net.parameters()]
            for total, weight in zip(sums, weights, strict=True):
                torch._foreach_add_(total, tensors, alpha=float(weight))
            if file is not self.inputs[-1]:
                yield Step(input=file, pass_idx=pass_idx)
        names = [os.path.basename(file.path) for file in self.inputs]
        outputs = []
        for index, (plan, total) in enumerate(zip(batch, sums, strict=True)):
            info = {**first.info, "posthoc_inputs": names, "posthoc_fit": float(fits[index])}
            snapshot = _assemble(first, last, total, plan, info)
            fit, gain = float(fits[index]), float(np.linalg.norm(coefficients[:, index]))
            output = Output(snapshot=snapshot, nimg=plan.nimg, std=plan.std, paths=plan.paths, fit=fit, gain=gain)
            _write(output)
            outputs.append(output)
            sums[index] = []
        yield Step(input=self.inputs[-1], pass_idx=pass_idx, outputs=tuple(outputs))


def _check_stds(stds: Sequence[float]) -> None:
    if not stds:
        raise ConfigError("no EMA length to reconstruct; give at least one, e.g. 0.100")
    for std in stds:
        if not 0 < std < 0.289:
            raise ConfigError(f"{std} is no EMA length; each must lie above 0 and below 0.289")


def _choose_inputs(inputs: list[Input], out_nimg: int | None) -> tuple[int, list[Input]]:
    """The output time and the inputs up to it, sorted by time and length."""
    inputs = sorted((file for file in inputs if file.nimg > 0), key=lambda file: (file.nimg, file.std))
    if not inputs:
        raise ConfigError(
            "no input snapshots to reconstruct from; they are named {prefix}-{kimg}-{std}.pkl, kimg above 0"
        )
    times = sorted({file.nimg for file in inputs})
    nimg = times[-1] if out_nimg is None else out_nimg
    if nimg not in times:
        near = min(times, key=lambda time: abs(time - nimg))
        raise ConfigError(
            f"no input snapshot at {nimg // 1000} kimg ({nimg} images); there are {len(times)} times from"
            f" {times[0] // 1000} to {times[-1] // 1000} kimg, the nearest is {near // 1000}"
        )
    inputs = [file for file in inputs if file.nimg <= nimg]
    for one, two in pairwise(inputs):
        if (one.nimg, one.std) == (two.nimg, two.std):
            raise ConfigError(
                f"two inputs have the same time and EMA length: {os.path.basename(one.path)} and"
                f" {os.path.basename(two.path)}; choose one kind by its prefix"
            )
    for file in inputs:
        if not 0 < file.std < 0.289:
            raise ConfigError(f"{file.path}: {file.std} is no EMA length; it must lie above 0 and below 0.289")
    return nimg, inputs


def _check_files(files: Sequence[tuple[Path, ...]], inputs: Sequence[Input], out_dir: Path) -> None:
    """Refuse a folder that cannot be made, two outputs in one file, and an output over an input."""
    parent = out_dir.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"the output folder {out_dir} cannot be made: {parent} is no folder that can be written to")
    for one, two in pairwise(files):
        if one == two:
            raise ConfigError(
                f"two EMA lengths would both be {one[0].name}; give lengths that differ in three decimals"
            )
    taken = {os.path.realpath(file.path) for file in inputs}
    for path in (path for paths in files for path in paths):
        if os.path.realpath(path) in taken:
            raise ConfigError(f"the output {path} would replace an input; give another folder or prefix")


def _layout(snapshot: Snapshot) -> dict[str, Any]:
    """What all inputs must have in common: the constructor's arguments, and all tensors' names and shapes."""
    net: Any = snapshot.net
    arguments = {"args": getattr(net, "_init_args", ()), "kwargs": getattr(net, "_init_kwargs", {})}
    # Through JSON, so that a list and a tuple, which the file formats don't tell apart, are the same.
    layout: dict[str, Any] = {"arguments": json.dumps(arguments, sort_keys=True, default=str)}
    layout["parameters"] = {name: tuple(p.shape) for name, p in net.named_parameters()}
    layout["buffers"] = {name: tuple(b.shape) for name, b in net.named_buffers()}
    return layout


def _check_layout(layout: dict[str, Any], expected: dict[str, Any], path: str, first_path: str) -> None:
    who = f"{path} does not belong with {os.path.basename(first_path)}"
    for kind in ("parameters", "buffers"):
        ours, theirs = layout[kind], expected[kind]
        odd = sorted(ours.keys() ^ theirs.keys())
        if odd:
            raise ConfigError(f"{who}: only one of them has the tensor {odd[0]} ({len(odd)} such tensors)")
        for name, shape in ours.items():
            if shape != theirs[name]:
                raise ConfigError(f"{who}: {name} has shape {shape} instead of {theirs[name]}")
    if layout != expected:
        raise ConfigError(f"{who}: network arguments {layout['arguments']} instead of {expected['arguments']}")
    if list(layout["parameters"]) != list(expected["parameters"]):
        raise ConfigError(f"{who}: its tensors come in another order")


@torch.no_grad()
def _assemble(
    first: Snapshot, last: Snapshot, total: list[torch.Tensor], plan: _Plan, info: dict[str, Any]
) -> Snapshot:
    """A snapshot with the summed parameters in float16, the last input's buffers, and all else from the first."""
    net = copy.deepcopy(first.net)
    for (name, parameter), value in zip(net.named_parameters(), total, strict=True):
        parameter.data = value.to(torch.float16)
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"{name} is not finite in float16 for EMA length {plan.std:.3f}; an input is damaged, or the inputs"
                " cannot give this length"
            )
    for ours, theirs in zip(net.buffers(), last.net.buffers(), strict=True):
        ours.copy_(theirs)
    return replace(first, net=net, nimg=plan.nimg, ema_std=plan.std, info=info)


def _write(output: Output) -> None:
    for path in output.paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_snapshot(output.snapshot, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
