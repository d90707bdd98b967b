"""The files of a request: where each image goes, which of them are there, and the writing beside the sampling.

Shape legend: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.encoders import StandardRGBEncoder
from training.images.sheet import ImageWriter
from training.sampling.image_records import (
    KEYWORD,
    as_text,
    image_path,
    image_record,
    images_there,
    remove_leftovers,
    request_record,
)
from training.sampling.two_stages import queued_event


@dataclass(frozen=True, kw_only=True, eq=False)
class FilePlan:
    """The files of all images of a request, in the order of its seeds."""

    paths: list[Path]
    records: list[dict[str, Any]]  # what goes into each file, see training.sampling.image_records
    there: frozenset[int]  # positions of those whose files are there and stay
    compression: int  # see encode_png


def plan_files(
    outdir: Path,
    subdirs: bool,
    seeds: Sequence[int],
    classes: Sequence[int] | None,
    skip_existing: bool,
    compression: int,
    world: World,
    *,
    net: Any,
    encoder: Any,
    notes: Sequence[Mapping[str, Any]] | None = None,
    **made_from: Any,
) -> FilePlan:
    """Where the images go, and which of them can be left alone. `made_from`: the rest of `request_record`'s arguments.

    `notes`: what else goes into the record of each image.

    With `skip_existing` all processes must call this: the first one looks, so that all know the same. Raises
    ConfigError in all of them where a file was made from something else.
    """
    request = request_record(net, encoder=encoder, **made_from)
    paths = [image_path(outdir, seed, subdirs=subdirs) for seed in seeds]
    records = [
        image_record(request, seed, None if classes is None else classes[index]) for index, seed in enumerate(seeds)
    ]
    if notes is not None:
        records = [{**record, **note} for record, note in zip(records, notes, strict=True)]
    there: list[int] = []
    if skip_existing:
        size = net.img_resolution if not isinstance(net.img_resolution, int) else (net.img_resolution,) * 2
        shape = (net.img_channels, *size) if isinstance(encoder, StandardRGBEncoder) else None

        def look() -> list[int]:
            found = images_there(paths, records, shape)
            remove_leftovers(paths)
            return np.flatnonzero(found).tolist()

        there = _of_the_first(look, world)
    return FilePlan(paths=paths, records=records, there=frozenset(there), compression=compression)


def _of_the_first(look: Callable[[], list[int]], world: World) -> list[int]:
    """What `look` gives in the first process, in all of them; its ConfigError likewise."""
    if world.size == 1 or not torch.distributed.is_initialized():
        return look()
    found: list[int] | None = None
    error = None
    if world.is_main:
        try:
            found = look()
        except ConfigError as mistake:
            error = str(mistake)
    found, error = world.all_gather_objects((found, error))[0]
    if error is not None:
        raise ConfigError(error)
    assert found is not None
    return found


class BatchFiles:
    """Writes the images of batches while the next ones are computed; a context manager, see ImageWriter."""

    def __init__(self, plan: FilePlan) -> None:
        self._plan = plan
        self._writer = ImageWriter(compression=plan.compression)

    def write(self, images: torch.Tensor, indices: np.ndarray) -> None:
        """Write `images` (uint8 [N, C, H, W]), whose positions are `indices`; on CUDA, once what is queued is done."""
        host, copied = _to_host(images)

        def pixels_of(row: int) -> Callable[[], np.ndarray]:
            def pixels() -> np.ndarray:
                if copied is not None:
                    copied.synchronize()
                return host[row].numpy()

            return pixels

        for row, index in enumerate(indices.tolist()):
            if index in self._plan.there:
                continue
            texts = {KEYWORD: as_text(self._plan.records[index])}
            self._writer.write(self._plan.paths[index], pixels_of(row), texts, image_bytes=host[row].numel())

    def __enter__(self) -> "BatchFiles":
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def _to_host(images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The images in the host's memory, and the event after which they are there; None where they are by now.

    From CUDA they are copied into pinned memory, which PyTorch keeps for the next batch; the host goes on meanwhile.
    """
    if not images.is_cuda:
        return images.cpu(), None
    host = torch.empty_like(images, device="cpu", pin_memory=True)
    host.copy_(images, non_blocking=True)
    return host, queued_event(torch.cuda.current_stream(images.device))
