"""Networks with any EMA length, after training, from the snapshots of a run (arXiv 2312.02696, Section 3.2).

A reconstruction is a weighted sum of stored averages. `training.phema` computes the weights, `training.posthoc.sums`
adds; `inputs` lists the stored averages and `stored_averages` reads them.
"""

import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import remove_leftovers
from dnnlib.disk import make_folder, require_folder
from dnnlib.errors import ConfigError
from dnnlib.text import unknown
from training import phema
from training.posthoc.inputs import Input, choose_inputs, list_input_pickles, require_std
from training.posthoc.stored_averages import InputFiles
from training.posthoc.sums import NotFinite, WeightedSums
from training.snapshot import Snapshot, name_of_nimg, read_header, save_snapshot

__all__ = [
    "Input",
    "Output",
    "Reconstruction",
    "Step",
    "list_input_pickles",
    "reconstruct_networks",
    "reconstruct_phema",
]

_FORMATS = {"pkl": (".pkl",), "safetensors": (".safetensors",), "both": (".pkl", ".safetensors")}
_WRITERS = 2  # threads; most of the time is spent on copying to the disk and waiting for it


@dataclass(frozen=True, kw_only=True)
class Output:
    """A reconstructed network and how well its averaging profile fits the wanted one."""

    snapshot: Snapshot
    nimg: int
    std: float
    paths: tuple[Path, ...]  # files written; empty without an output folder
    fit: float  # relative L2 error of the achieved response, see phema.posthoc_fit
    gain: float  # amplification of the stored parameters' rounding errors: root of the sum of squared coefficients


@dataclass(frozen=True, kw_only=True)
class Step:
    """One input of one pass: pass 0 checks the inputs, each later pass adds them up to a batch of outputs."""

    pass_idx: int
    outputs: tuple[Output, ...] = ()  # with the last step of a pass


def reconstruct_phema(
    in_pkls: Iterable[Any],
    out_std: float | Iterable[float],
    out_nimg: int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    out_prefix: str = "phema",
    skip_existing: bool = False,
    max_batch_size: int = 8,
    out_format: str = "pkl",
    read_bytes: int = 2 << 30,
    own_networks: Sequence[str] = (),
) -> "Reconstruction":
    """Plan the networks of lengths `out_std` at `out_nimg` images (None = the newest input); iterating builds them.

    `in_pkls` are those of `list_input_pickles`, or any objects with path, nimg and std. `max_batch_size` outputs are
    built at a time, in one pass over the inputs. With `out_dir`, they are written there as {out_prefix}-{kimg}-{std} in
    `out_format` (pkl, safetensors, both). `skip_existing` keeps outputs that exist, are whole and were made of the same
    snapshots; it refuses others, and removes temporary files of these names that a killed process left.

    `own_networks`: see `load_snapshot`. Their files are .safetensors.

    Raises ConfigError. Until the iteration begins, nothing else is read or written; until all inputs have been checked
    against each other, nothing is added or written.

    Memory: the outputs of a batch in float16 and about 20 MB. Inputs in .safetensors files are read from the file block
    by block. Inputs in pickles take up to `read_bytes`, or two files if these are larger. If all of them are larger
    together, each batch also needs its outputs in float32, and each pass reads the pickles again.
    """
    inputs = [Input(path=str(file.path), nimg=int(file.nimg), std=float(file.std)) for file in in_pkls]
    stds = _sorted_stds(out_std)
    if max_batch_size < 1:
        raise ConfigError(f"max_batch_size={max_batch_size} must be at least 1")
    if out_format not in _FORMATS:
        raise ConfigError(unknown("file format", out_format, _FORMATS))
    nimg, inputs = choose_inputs(inputs, out_nimg)
    skipped: list[Path] = []
    if out_dir is None:
        plans = [_Plan(nimg=nimg, std=std, paths=()) for std in stds]
    else:
        require_folder(Path(out_dir))
        stems = [Path(out_dir) / output_name(out_prefix, nimg, std) for std in stds]
        files = [tuple(stem.with_name(stem.name + suffix) for suffix in _FORMATS[out_format]) for stem in stems]
        _check_files(files, inputs)
        plans = [_Plan(nimg=nimg, std=std, paths=paths) for std, paths in zip(stds, files, strict=True)]
        if skip_existing:
            plans, skipped = _without_finished(plans, inputs, own_networks)
    return Reconstruction(inputs, nimg, plans, skipped, max_batch_size, read_bytes, own_networks)


def _sorted_stds(out_std: float | Iterable[float]) -> list[float]:
    stds = sorted({float(std) for std in np.atleast_1d(np.asarray(out_std, dtype=np.float64))})
    if not stds:
        raise ConfigError("no EMA length to reconstruct; give at least one, e.g. 0.100")
    for std in stds:
        require_std(std, f"{std}")
    return stds


def _without_finished(
    plans: list["_Plan"], inputs: list[Input], own_networks: Sequence[str]
) -> tuple[list["_Plan"], list[Path]]:
    """Return what is left to build, and the files that are finished. Leftovers of killed processes are removed."""
    finished = [path for plan in plans for path in plan.paths if _is_finished(path, plan, inputs, own_networks)]
    for plan in plans:
        for path in plan.paths:
            remove_leftovers(path)
    left = [replace(plan, paths=tuple(path for path in plan.paths if path not in finished)) for plan in plans]
    return [plan for plan in left if plan.paths], finished


def output_name(prefix: str, nimg: int, std: float) -> str:
    """Return the name of a snapshot's file, without its suffix."""
    return f"{prefix}-{name_of_nimg(nimg)}-{std:.3f}"


def reconstruct_networks(
    in_pkls: Iterable[Any],
    out_std: float | Iterable[float],
    out_nimg: int | None = None,
    max_batch_size: int = 8,
    own_networks: Sequence[str] = (),
) -> Iterator[tuple[float, Snapshot]]:
    """Return the networks that `reconstruct_phema` would write, as pairs (length, snapshot) sorted by length.

    Nothing is written. `max_batch_size` networks are in memory at a time; they share it until the last is released.
    Raises ConfigError: at once for wrong arguments, for wrong files during the iteration.
    """
    work = reconstruct_phema(in_pkls, out_std, out_nimg, max_batch_size=max_batch_size, own_networks=own_networks)
    return ((output.std, output.snapshot) for step in work for output in step.outputs)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    nimg: int
    std: float
    paths: tuple[Path, ...]


class Reconstruction:
    """The work of `reconstruct_phema`: an iterable of `Step` with a length; every iteration does all of it.

    `inputs` take part, `out_nimg` and `out_stds` will be built, `skipped` are existing outputs that are kept.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        out_nimg: int,
        plans: Sequence[_Plan],
        skipped: Sequence[Path],
        max_batch_size: int,
        read_bytes: int,
        own_networks: Sequence[str] = (),
    ) -> None:
        self.inputs = list(inputs)
        self.out_nimg = out_nimg
        self.out_stds = [plan.std for plan in plans]
        self.skipped = list(skipped)
        self._batches = [list(plans[i : i + max_batch_size]) for i in range(0, len(plans), max_batch_size)]
        self._read_bytes = read_bytes
        self._own_networks = own_networks

    def __len__(self) -> int:
        """Number of steps: inputs times passes, of which one checks and the others build a batch each."""
        return len(self.inputs) * (1 + len(self._batches)) if self._batches else 0

    def __iter__(self) -> Iterator[Step]:
        """Check all inputs against each other, then build and write the outputs batch by batch."""
        if not self._batches:
            return
        files = InputFiles(self.inputs, self._read_bytes, self._own_networks)
        for _ in files.check():
            yield Step(pass_idx=0)
        for index, batch in enumerate(self._batches, start=1):
            yield from self._run_pass(index, batch, files)

    def _run_pass(self, pass_idx: int, batch: list[_Plan], files: InputFiles) -> Iterator[Step]:
        profiles = ([file.nimg for file in self.inputs], [file.std for file in self.inputs])
        # One at a time: the rounding of a matrix product depends on the number of columns.
        columns = [phema.solve_posthoc_coefficients(*profiles, plan.nimg, plan.std) for plan in batch]
        weights = np.concatenate(columns, axis=1)
        fits = [
            phema.posthoc_fit(*profiles, plan.nimg, plan.std, column).item()
            for plan, column in zip(batch, columns, strict=True)
        ]
        sums = WeightedSums(files.shapes(), weights)
        with ThreadPoolExecutor(_WRITERS) as pool:
            # Build the modules while the sums are computed: those run outside Python most of the time.
            laid_out = pool.submit(lambda: [files.lay_out() for _ in batch])
            buffers = yield from self._add_up(pass_idx, batch, files, sums)
            names, nets = [os.path.basename(file.path) for file in self.inputs], laid_out.result()

            def finish(index: int) -> Output:
                plan, fit, gain = batch[index], fits[index], float(np.linalg.norm(weights[:, index]))
                info = {"posthoc_inputs": names, "posthoc_fit": fit}
                tensors = sums.outputs[index] | buffers
                snapshot = files.assemble(nets[index], tensors, nimg=plan.nimg, std=plan.std, info=info)
                for path in plan.paths:
                    make_folder(path.parent)
                    save_snapshot(_as_published(snapshot) if path.suffix == ".pkl" else snapshot, path, as_is=True)
                return Output(snapshot=snapshot, nimg=plan.nimg, std=plan.std, paths=plan.paths, fit=fit, gain=gain)

            outputs = tuple(pool.map(finish, range(len(batch))))
        yield Step(pass_idx=pass_idx, outputs=outputs)

    def _add_up(
        self, pass_idx: int, batch: list[_Plan], files: InputFiles, sums: WeightedSums
    ) -> Generator[Step, None, dict[str, torch.Tensor]]:
        """Add all inputs, with a step for each but the last; returns the buffers, those of the last input."""
        buffers: dict[str, torch.Tensor] = {}
        added, steps, last = 0, 0, len(self.inputs) - 1
        for group in files.groups():
            if last in group.indices:
                buffers = files.read_buffers(group.readers[group.indices.index(last)])
            try:
                for share in sums.add(group.indices, group.readers, group.last):
                    while steps < min(math.floor(added + share * len(group.indices)), last):
                        steps += 1
                        yield Step(pass_idx=pass_idx)
            except NotFinite as error:
                index, name = error.args
                raise ConfigError(
                    f"{name} is not finite in float16 for EMA length {batch[index].std:.3f}; an input is damaged, or"
                    " the inputs cannot give this length"
                ) from None
            added += len(group.indices)
            del group  # free its tensors before the next group is read
        return buffers


def _as_published(snapshot: Snapshot) -> Snapshot:
    """Return `snapshot` for a pickle, without provenance of our own: only with `info` of the inputs, if they have any.

    Nothing to tell, not even image count and length, keeps the pickle's layout exactly as published.
    """
    info = {key: value for key, value in snapshot.info.items() if key not in ("posthoc_inputs", "posthoc_fit")}
    return replace(snapshot, info=info) if info else replace(snapshot, info={}, nimg=None, ema_std=None)


def _is_finished(path: Path, plan: _Plan, inputs: Sequence[Input], own_networks: Sequence[str]) -> bool:
    """Return whether `path` exists. Raises ConfigError if it is damaged or says that it was not made as planned.

    Pickles, in the published layout, do not say of which snapshots they were made.
    """
    if not path.exists():
        return False
    hint = "leave out --skip to replace it, or choose another folder or prefix"
    try:
        header = read_header(path, own_networks=own_networks)
    except ConfigError as error:
        raise ConfigError(f"{error}; {hint}") from None
    recorded = header.info.get("posthoc_inputs")
    names = [os.path.basename(file.path) for file in inputs]
    if recorded not in (None, names):
        raise ConfigError(f"{path} exists and was made of other snapshots ({len(recorded)}, now {len(names)}); {hint}")
    if (header.nimg or plan.nimg) // 1000 != plan.nimg // 1000 or abs((header.ema_std or plan.std) - plan.std) > 0.0006:
        raise ConfigError(f"{path} exists and records EMA length {header.ema_std} at {header.nimg} images; {hint}")
    return True


def _check_files(files: Sequence[tuple[Path, ...]], inputs: Sequence[Input]) -> None:
    """Refuse two outputs in one file, and an output in the place of an input."""
    for one, two in pairwise(files):
        if one == two:
            raise ConfigError(
                f"two EMA lengths would both be {one[0].name}; give lengths that differ in three decimals"
            )
    taken = {os.path.realpath(file.path) for file in inputs}
    for path in (path for paths in files for path in paths):
        if os.path.realpath(path) in taken:
            raise ConfigError(f"the output {path} would replace an input; give another folder or prefix")
