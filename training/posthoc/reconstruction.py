"""Networks with any EMA length, after training, from the snapshots of a run (arXiv 2312.02696, Section 3.2).

A reconstruction is a weighted sum of the stored averages; `training.phema` has the weights, `training.posthoc.sums` the
sums, `inputs` and `files` the stored averages.
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

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, reason_of
from dnnlib.leftovers import remove_leftovers
from training import phema
from training.posthoc.inputs import Input, choose_inputs, list_input_pickles
from training.posthoc.stored_averages import InputFiles
from training.posthoc.sums import NotFinite, WeightedSums
from training.snapshot import Snapshot, pickle_file, read_header, safetensors_file

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
_WRITERS = 2  # threads; most of the time goes into copying to, and waiting for, the disk


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
    """As many steps as there are inputs make a pass: in pass 0 each is checked, from pass 1 on all are added up."""

    pass_idx: int
    outputs: tuple[Output, ...] = ()  # what the last step of a pass has completed


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
) -> "Reconstruction":
    """Plan the networks of lengths `out_std` at `out_nimg` images (None = the newest input); iterating builds them.

    `in_pkls` are what `list_input_pickles` returns, or anything with path, nimg and std. `max_batch_size` outputs are
    built at a time; each such batch is one pass over the inputs. With `out_dir`, outputs are written there as
    {out_prefix}-{kimg}-{std} in `out_format` (pkl, safetensors, both); `skip_existing` leaves alone what is there,
    whole and made of the same snapshots, refuses what is not, and removes what a killed process left of these files.
    Nothing else is read or written before the iteration, and nothing is added or written before all inputs were checked
    against each other. Raises ConfigError for what cannot be done.

    Memory: the outputs of a batch in float16, and about 20 MB beside. Inputs in .safetensors files are read where they
    lie, block by block. Inputs in pickles take up to `read_bytes`, or two files if these are larger; if all of them
    together are larger, each batch also needs its outputs in float32, and each pass reads the pickles anew.
    """
    inputs = [Input(path=str(file.path), nimg=int(file.nimg), std=float(file.std)) for file in in_pkls]
    stds = sorted({float(std) for std in np.atleast_1d(np.asarray(out_std, dtype=np.float64))})
    _check_stds(stds)
    if max_batch_size < 1:
        raise ConfigError(f"a batch of {max_batch_size} outputs builds nothing; give 1 or more")
    if out_format not in _FORMATS:
        raise ConfigError(f"'{out_format}' is no file format; choose from {', '.join(_FORMATS)}")
    nimg, inputs = choose_inputs(inputs, out_nimg)
    plans = [_Plan(nimg=nimg, std=std, paths=()) for std in stds]
    if out_dir is not None:
        stems = [Path(out_dir) / f"{out_prefix}-{nimg // 1000:07d}-{std:.3f}" for std in stds]
        files = [tuple(stem.with_name(stem.name + suffix) for suffix in _FORMATS[out_format]) for stem in stems]
        _check_files(files, inputs, Path(out_dir))
        plans = [replace(plan, paths=paths) for plan, paths in zip(plans, files, strict=True)]
    skipped = []
    if skip_existing:
        skipped = [path for plan in plans for path in plan.paths if _is_finished(path, plan, inputs)]
        for path in (path for plan in plans for path in plan.paths):
            remove_leftovers(path)
        plans = [replace(plan, paths=tuple(p for p in plan.paths if p not in skipped)) for plan in plans]
        plans = [plan for plan in plans if plan.paths or out_dir is None]
    return Reconstruction(inputs, nimg, plans, skipped, max_batch_size, read_bytes)


def reconstruct_networks(
    in_pkls: Iterable[Any], out_std: float | Iterable[float], out_nimg: int | None = None, max_batch_size: int = 8
) -> Iterator[tuple[float, Snapshot]]:
    """The networks that `reconstruct_phema` would write, as (length, snapshot) in the order of their lengths.

    Nothing is written; `max_batch_size` networks are in memory at a time, all until the last of them is let go. Raises
    ConfigError, at once for what the arguments show.
    """
    work = reconstruct_phema(in_pkls, out_std, out_nimg, max_batch_size=max_batch_size)
    return ((output.std, output.snapshot) for step in work for output in step.outputs)


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
        self,
        inputs: Sequence[Input],
        out_nimg: int,
        plans: Sequence[_Plan],
        skipped: Sequence[Path],
        max_batch_size: int,
        read_bytes: int,
    ) -> None:
        self.inputs = list(inputs)
        self.out_nimg = out_nimg
        self.out_stds = [plan.std for plan in plans]
        self.skipped = list(skipped)
        self._batches = [list(plans[i : i + max_batch_size]) for i in range(0, len(plans), max_batch_size)]
        self._read_bytes = read_bytes

    def __len__(self) -> int:
        """Number of steps: inputs times (one checking pass and a pass for each batch of outputs)."""
        return len(self.inputs) * (1 + len(self._batches)) if self._batches else 0

    def __iter__(self) -> Iterator[Step]:
        """Check all inputs against each other, then build and write the outputs batch by batch."""
        if not self._batches:
            return
        files = InputFiles(self.inputs, self._read_bytes)
        for _ in files.check():
            yield Step(pass_idx=0)
        for index, batch in enumerate(self._batches, start=1):
            yield from self._run_pass(index, batch, files)

    def _run_pass(self, pass_idx: int, batch: list[_Plan], files: InputFiles) -> Iterator[Step]:
        profiles = ([file.nimg for file in self.inputs], [file.std for file in self.inputs])
        wanted = ([plan.nimg for plan in batch], [plan.std for plan in batch])
        weights = phema.solve_posthoc_coefficients(*profiles, *wanted)
        fits = phema.posthoc_fit(*profiles, *wanted, weights)
        sums = WeightedSums(files.shapes(), weights)
        with ThreadPoolExecutor(_WRITERS) as pool:
            # Laid out while the sums are made, which leave Python the time for it.
            laid_out = pool.submit(lambda: [files.lay_out() for _ in batch])
            buffers = yield from self._add_up(pass_idx, batch, files, sums)
            names, nets = [os.path.basename(file.path) for file in self.inputs], laid_out.result()

            def finish(place: int) -> Output:
                plan, fit, gain = batch[place], float(fits[place]), float(np.linalg.norm(weights[:, place]))
                info = {"posthoc_inputs": names, "posthoc_fit": fit}
                tensors = sums.outputs[place] | buffers
                snapshot = files.assemble(nets[place], tensors, nimg=plan.nimg, std=plan.std, info=info)
                _write(snapshot, plan.paths)
                return Output(snapshot=snapshot, nimg=plan.nimg, std=plan.std, paths=plan.paths, fit=fit, gain=gain)

            outputs = tuple(pool.map(finish, range(len(batch))))
        yield Step(pass_idx=pass_idx, outputs=outputs)

    def _add_up(
        self, pass_idx: int, batch: list[_Plan], files: InputFiles, sums: WeightedSums
    ) -> Generator[Step, None, dict[str, torch.Tensor]]:
        """Add all inputs, a step for each but the last; returns the buffers, which are those of the last input."""
        buffers: dict[str, torch.Tensor] = {}
        added, steps, last = 0, 0, len(self.inputs) - 1
        for group in files.groups():
            if last in group.places:
                buffers = files.read_buffers(group.readers[group.places.index(last)])
            try:
                for share in sums.add(group.places, group.readers, group.last):
                    while steps < min(math.floor(added + share * len(group.places)), last):
                        steps += 1
                        yield Step(pass_idx=pass_idx)
            except NotFinite as error:
                place, name = error.args
                raise ConfigError(
                    f"{name} is not finite in float16 for EMA length {batch[place].std:.3f}; an input is damaged, or"
                    " the inputs cannot give this length"
                ) from None
            added += len(group.places)
            del group  # its tensors, before the next group comes
        return buffers


def _is_finished(path: Path, plan: _Plan, inputs: Sequence[Input]) -> bool:
    """Whether `path` is there already, whole and, as far as it says, made as planned. Raises ConfigError if not so.

    Pickles, in the published layout, do not say of which snapshots they were made.
    """
    if not path.exists():
        return False
    hint = "leave out --skip to replace it, or choose another folder or prefix"
    try:
        header = read_header(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {hint}") from None
    recorded = header.info.get("posthoc_inputs")
    names = [os.path.basename(file.path) for file in inputs]
    if recorded not in (None, names):
        raise ConfigError(
            f"{path} is there, and was made of other snapshots ({len(recorded)}, now {len(names)}); {hint}"
        )
    if (header.nimg or plan.nimg) // 1000 != plan.nimg // 1000 or abs((header.ema_std or plan.std) - plan.std) > 0.0006:
        raise ConfigError(f"{path} is there, and says that its EMA length is {header.ema_std} at {header.nimg}; {hint}")
    return True


def _check_stds(stds: Sequence[float]) -> None:
    if not stds:
        raise ConfigError("no EMA length to reconstruct; give at least one, e.g. 0.100")
    for std in stds:
        if not 0 < std < 0.289:
            raise ConfigError(f"{std} is no EMA length; each must lie above 0 and below 0.289")


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


def _write(snapshot: Snapshot, paths: Sequence[Path]) -> None:
    """Write `snapshot`; as `save_snapshot` does, which would first make all parts anew: these are new.

    Pickles tell what the inputs told, such as --label-dropout; where that is nothing, no more than published ones do.
    """
    parts: dict[str, Any] = {
        "net": snapshot.net,
        "encoder": snapshot.encoder,
        "loss_fn": snapshot.loss_fn,
        "dataset_kwargs": snapshot.dataset_kwargs,
    }
    more: dict[str, Any] = {"nimg": snapshot.nimg, "ema_std": snapshot.ema_std, "info": snapshot.info}
    told = {name: value for name, value in snapshot.info.items() if name not in ("posthoc_inputs", "posthoc_fit")}
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temp:
                if path.suffix == ".pkl":
                    pickle_file.write(temp, **parts, provenance={**more, "info": told} if told else None)
                else:
                    safetensors_file.write(temp, **parts, **more)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {reason_of(error)}") from None
