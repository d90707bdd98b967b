"""The PNG files of a request: paths, what each image was made from, which files exist already, and writing.

The record of an image is a tEXt chunk with the keyword `KEYWORD` and a JSON object: the seed, the networks by a digest
of their weights, the kind of device (generators differ by it), and every other option that is not at its default.

Shape legend: N images, C channels, H x W pixels.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from dnnlib.atomic import TEMPORARY, short_name
from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from torch_utils.processes.together import on_main
from training.condition.conditioning import Conditioning
from training.encoders import Encoder, StandardRGBEncoder
from training.images.png_files import ImageWriter, PngHead, read_png_head
from training.sampling.denoisers import WithoutLabels
from training.sampling.options import as_json
from training.sampling.sampler import ForeignSampler, Sampler
from training.sampling.two_stages import queued_event
from training.snapshot.parts import described

KEYWORD = "generate_images"

_DIGITS = 16  # of digests
_VALUES = 64  # of each tensor that go into a network's digest


@dataclass(frozen=True, kw_only=True, eq=False)
class FilePlan:
    """The files of all images of a request, in the order of its seeds."""

    paths: list[Path]
    records: list[dict[str, Any]]  # what each image was made from
    existing: frozenset[int]  # positions of those whose files exist and stay
    compression: int  # see encode_png

    @contextmanager
    def writer(self) -> Iterator[Callable[[torch.Tensor, np.ndarray], None]]:
        """Yield a function that writes the images of a batch while the next ones are computed, see `ImageWriter`.

        It takes images (uint8 [N, C, H, W]) and their positions. On CUDA it writes once what is queued is done.
        """
        with ImageWriter(compression=self.compression) as writer:
            yield partial(self._write, writer)

    def _write(self, writer: ImageWriter, images: torch.Tensor, indices: np.ndarray) -> None:
        host, copied = _to_host(images)

        def pixels(row: int) -> np.ndarray:
            if copied is not None:
                copied.synchronize()
            return host[row].numpy()

        for row, index in enumerate(indices.tolist()):
            if index not in self.existing:
                texts = {KEYWORD: json.dumps(self.records[index], sort_keys=True)}
                writer.write(self.paths[index], partial(pixels, row), texts, image_bytes=host[row].numel())


def _to_host(images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the images in the host's memory, and the event after which they are complete; None if they are now.

    From CUDA they are copied into pinned memory, which PyTorch keeps for the next batch; the host does not wait.
    """
    if not images.is_cuda:
        return images.cpu(), None
    host = torch.empty_like(images, device="cpu", pin_memory=True)
    host.copy_(images, non_blocking=True)
    return host, queued_event(torch.cuda.current_stream(images.device))


def plan_files(
    outdir: Path,
    seeds: Sequence[int],
    record: Mapping[str, Any],
    *,
    classes: Sequence[int] | None,
    conditioning: Conditioning | None,
    subdirs: bool,
    compression: int,
    skip_existing: bool,
    shape: tuple[int, ...] | None,
    world: World,
) -> FilePlan:
    """Return where the images go, what each is made from, and with `skip_existing`, which files are left alone.

    `record`: `request_record` of all images. `shape`: [C, H, W] of the images; None = unknown. With `skip_existing` all
    processes must call this: the first one looks, so that all agree. Raises ConfigError in all of them if a file was
    made from something else, or if a seed, and so a file, stands for two images.
    """
    folders = [outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir for seed in seeds]
    paths = [folder / f"{seed:06d}.png" for folder, seed in zip(folders, seeds, strict=True)]
    records = [{"seed": seed, **record} for seed in seeds]
    if classes is not None:
        _require_one_per_seed(seeds, classes, "classes")
        records = [record | {"class": index} for record, index in zip(records, classes, strict=True)]
    if conditioning is not None:
        _require_one_per_seed(seeds, [conditioning.index_of(i) for i in range(len(seeds))], "source images")
        records = [record | note for record, note in zip(records, conditioning.notes(len(seeds)), strict=True)]

    def look() -> list[int]:
        existing = existing_images(paths, records, shape)
        remove_leftovers(paths)
        return existing

    existing: list[int] = []
    if skip_existing:
        existing = on_main(world, look) if torch.distributed.is_initialized() else look()
    return FilePlan(paths=paths, records=records, existing=frozenset(existing), compression=compression)


def _require_one_per_seed(seeds: Sequence[int], choices: Sequence[int], what: str) -> None:
    chosen: dict[int, int] = {}
    for seed, choice in zip(seeds, choices, strict=True):
        if chosen.setdefault(seed, choice) != choice:
            raise ConfigError(f"seed {seed} is asked for with two {what}, but has one file; list each seed once")


def request_record(
    net: Any,
    guides: Sequence[Any],
    encoder: Encoder,
    device: torch.device,
    sampler: Sampler,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what all images of a request depend on, in JSON's types. `extra`: further settings; None = left out.

    Options at the sampler's defaults are left out, and so are guides with guidance 1.
    """
    record: dict[str, Any] = {"net": network_digest(net), "device": device.type, **sampler.record()}
    if guides and (sampler.guidance.weight != 1 or isinstance(sampler, ForeignSampler)):
        record["gnet"] = [network_digest(guide) for guide in guides]
    if not isinstance(encoder, StandardRGBEncoder):
        record["encoder"] = encoder_digest(encoder)
    return dict(as_json(record | {name: value for name, value in extra.items() if value is not None}))


def network_digest(net: Any) -> str | None:
    """Digest of a network: the beginning of each tensor, as float32, and the settings besides them.

    It is the same for a .pkl and a .safetensors file. None for objects that are not torch modules.
    """
    if isinstance(net, WithoutLabels):
        return f"{network_digest(net.net)} without labels"
    if not isinstance(net, torch.nn.Module):
        return None
    tensors = net.state_dict()
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    settings = {
        name: getattr(net, name, None) for name in ("img_resolution", "img_channels", "label_dim", "sigma_data")
    }
    digest = hashlib.sha256(json.dumps([shapes, settings], default=str).encode())
    starts = [value.detach().reshape(-1)[:_VALUES].to(torch.float32) for value in tensors.values() if value.numel()]
    if starts:
        digest.update(torch.cat(starts).cpu().numpy().tobytes())  # one copy from the device
    return digest.hexdigest()[:_DIGITS]


def encoder_digest(encoder: Encoder) -> str:
    """Digest of the encoder's class and constructor arguments."""
    try:
        content = json.dumps(described(encoder), sort_keys=True)
    except (AttributeError, ConfigError):  # a foreign encoder
        content = type(encoder).__name__
    return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]


def existing_images(
    paths: Sequence[Path], records: Sequence[Mapping[str, Any]], shape: tuple[int, ...] | None
) -> list[int]:
    """Return the positions of the files that exist and are complete; `records`: what they should be made from.

    Files without a record, as earlier versions wrote them, count by their names. Raises ConfigError if one was made
    from something else, or has another `shape` [C, H, W] (None = unknown).
    """
    names = {folder: _names_in(folder) for folder in {path.parent for path in paths}}
    existing = []
    for index, (path, record) in enumerate(zip(paths, records, strict=True)):
        head = read_png_head(path) if path.name in names[path.parent] else None
        if head is not None:
            _require_same(path, head, record, shape)
            existing.append(index)
    return existing


def remove_leftovers(paths: Sequence[Path]) -> None:
    """Remove the temporary files that a killed run left for these files (see dnnlib.atomic)."""
    expected = {path.with_name(short_name(path.name)) for path in paths}
    for folder in {path.parent for path in paths}:
        for name in _names_in(folder):
            match = TEMPORARY.fullmatch(name)
            if match and match[1] and folder / match[1] in expected:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _require_same(path: Path, head: PngHead, record: Mapping[str, Any], shape: tuple[int, ...] | None) -> None:
    advice = "give another --outdir, or leave out --skip-existing to generate all images again"
    if shape is not None and head.shape != shape:
        found = "of another kind" if head.shape is None else "x".join(map(str, head.shape))
        expected = "x".join(map(str, shape))
        raise ConfigError(f"{path} exists and is {found} (channels, height, width), not {expected}; {advice}")
    try:
        existing = json.loads(head.texts.get(KEYWORD, ""))
    except (ValueError, RecursionError):
        return
    if not isinstance(existing, dict):
        return
    for name in sorted(existing.keys() | record.keys()):
        if existing.get(name) != record.get(name):
            values = (existing.get(name), record.get(name))
            old, new = ("the default" if value is None else str(value)[:80] for value in values)
            raise ConfigError(f"{path} was made with {name} {old}, and this asks for {new}; {advice}")
