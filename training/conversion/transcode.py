"""Pixels to raw latents and back: a data set through a VAE, over all processes, to be taken up again when interrupted.

The work is done in chunks, which are files of their own in a folder beside the destination until all are there. They
are then put together, shard by shard, in the order of the source. Chunks are multiples of the VAE's batch, so that
neither the number of processes nor an interruption changes a result.

N images, C channels, H x W pixels.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import atomic_path, write_text
from dnnlib.errors import ConfigError, reason_of
from dnnlib.folders import make_folder, require_folder
from torch_utils.distributed import World
from training.conversion.archive import (
    Part,
    existing_shards,
    is_zip,
    latents_name,
    picture_name,
    plan_parts,
    writing,
)
from training.conversion.finished import MADE_KEY, missing_parts, remove_leftovers, request_digest
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.item_files import find_shards
from training.dataset.latents import (
    ENCODER_KEY,
    LatentStatistics,
    encoder_entry,
    encoder_of,
    full_name,
    read_encoder,
    rgb,
    vae_geometry,
)
from training.dataset.zip_index import one_line
from training.encoders import StabilityVAEEncoder
from training.images.png import encode_plain_png

_REQUEST = "request.json"
_CHUNK_IMAGES = 256  # at most; a multiple of the VAE's batch


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some images are done: computed just now, or found done already."""

    num_images: int


class Transcoding:
    """A data set on its way through a VAE: iterate over its steps; the files are there at the end.

    Making one checks what can be checked without the VAE, and writes nothing. Under torchrun every process makes and
    runs one; they need a common disk. What was done before an interruption is found in `workdir`, provided that the
    same is asked for again; with `skip_existing` a result that is there already and was made from the same is left as
    it is (`finished`). Raises ConfigError.
    """

    def __init__(
        self,
        source: ImageFolderDataset,
        dest: Path,
        encoder: StabilityVAEEncoder,
        *,
        source_path: Path,
        world: World,
        to_latents: bool,
        measure: bool = False,
        max_images: int | None = None,
        num_shards: int | None = None,
        overwrite: bool = False,
        skip_existing: bool = False,
    ) -> None:
        self._source = source
        self._dest = dest
        self._encoder = encoder
        self._world = world
        self._to_latents = to_latents
        self._measure = measure
        self.num_images = min(len(source), max_images or len(source))  # of all processes
        self.workdir = dest.with_name(f"{dest.name}.partial")
        self._request = {
            "source": str(source_path),
            "content": source.fingerprint(),
            "images": self.num_images,
            "shape": list(source.image_shape),
            "encoder": encoder_entry(encoder),
            "result": "latents" if to_latents else "pixels",
        }
        self._made_from = request_digest(
            {key: value for key, value in self._request.items() if key != "source"} | {"measured": measure}
        )
        self.parts = plan_parts(dest, self.num_images, num_shards=num_shards, per_shard=None)
        self._chunk = max(_CHUNK_IMAGES // encoder.batch_size, 1) * encoder.batch_size
        self._stale = existing_shards(dest) if num_shards is not None else []  # of an earlier, larger number
        resumed = (self.workdir / _REQUEST).is_file()
        known = skip_existing or resumed
        self._require_places(source_path, sharded=num_shards is not None, overwrite=overwrite, known=known)
        replace = overwrite or (resumed and is_zip(dest))
        # Whether all is there already, because it was finished before, or killed when it was as good as finished.
        self.finished = known and not missing_parts(self.parts, self._made_from, self._stale, replace=replace)

    def __len__(self) -> int:
        """The images that this process has to do."""
        return sum(len(chunk) for _, chunk in self._chunks())

    def __iter__(self) -> Iterator[Step]:
        """Compute what is missing, then put it together; see the class."""
        world = self._world
        if self.finished:
            self._tidy_up()
            yield Step(num_images=len(self))
            return
        try:
            self._start()
            yield from self._compute_missing()
            world.barrier()
            self._put_together()
            world.barrier()
        except OSError as error:
            raise ConfigError(
                f"{self._dest} cannot be written: {reason_of(error)}; what is done stays in {self.workdir}, and"
                " the same command again goes on from there"
            ) from None
        self._tidy_up()

    @property
    def encoder(self) -> StabilityVAEEncoder:
        """The encoder that belongs to the latents; with `measure`, once the work is done, that of their statistics."""
        return self._encoder

    def _tidy_up(self) -> None:
        """Remove what is of no use any more once the result is there."""
        if self._world.is_main:
            written = {part.path for part in self.parts}
            for path in self._stale:
                if path not in written:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.workdir, ignore_errors=True)

    def _chunks(self) -> Iterator[tuple[int, range]]:
        """Number and images of the chunks that are this process's to compute."""
        starts = range(0, self.num_images, self._chunk)
        for number in range(self._world.rank, len(starts), self._world.size):
            yield number, range(starts[number], min(starts[number] + self._chunk, self.num_images))

    def _chunk_path(self, number: int) -> Path:
        return self.workdir / f"{number:08d}.npy"

    @torch.no_grad()
    def _compute(self, chunk: range) -> np.ndarray:
        """Raw latents float32 [N, 2C, H, W], or pixels uint8 [N, 3, H, W]."""
        stored, _ = self._source.read_batch(chunk)
        if self._to_latents:
            pixels = torch.from_numpy(rgb(stored)).to(self._world.device)
            latents = self._encoder.encode_pixels(pixels).cpu().numpy()
            if not np.isfinite(latents).all():
                raise ConfigError(
                    f"the VAE {self._encoder.vae_name} makes numbers that are not finite of images {chunk}"
                )
            return latents
        raw = torch.from_numpy(stored).to(self._world.device)
        return self._encoder.decode(most_likely(self._encoder, raw)).cpu().numpy()

    def _compute_missing(self) -> Iterator[Step]:
        try:
            for number, chunk in self._chunks():
                path = self._chunk_path(number)
                if not path.is_file():
                    result = self._compute(chunk)
                    with atomic_path(path) as temp:
                        temp.write_bytes(_npy(result))  # np.save would not say that the disk is full
                yield Step(num_images=len(chunk))
        finally:
            if self._world.size == 1 and not any(self.workdir.glob("*.npy")):
                shutil.rmtree(self.workdir, ignore_errors=True)  # an early mistake leaves nothing behind

    def _start(self) -> None:
        """Make the working folder, or make sure that an existing one holds the same work."""
        request_file = self.workdir / _REQUEST
        if self._world.is_main:
            make_folder(self.workdir)
            if not request_file.is_file():
                for path in self.workdir.iterdir():
                    path.unlink()  # nothing tells what it was made from
                write_text(request_file, json.dumps(self._request))
        self._world.barrier()
        try:
            found = json.loads(request_file.read_text("utf-8"))
        except ValueError:
            found = None
        if found != self._request:
            raise ConfigError(
                f"{self.workdir} holds the unfinished work of another command; finish it, or remove the folder"
            )
        if self._world.is_main:
            remove_leftovers(self.parts)

    def _put_together(self) -> None:
        """Write this process's parts of the destination out of the chunks."""
        if self._measure:
            statistics = LatentStatistics()
            for number in range(-(-self.num_images // self._chunk)):
                statistics.add(_load(self._chunk_path(number)))
            self._encoder = self._encoder.with_statistics(statistics.mean, statistics.std)
        head: dict[str, Any] = {"labels": [] if self._source.has_labels else None, MADE_KEY: self._made_from}
        if self._source.has_labels and self._source.class_names is not None:
            head["classes"] = self._source.class_names
        if self._to_latents:
            head[ENCODER_KEY] = encoder_entry(self._encoder)
        name = latents_name if self._to_latents else picture_name
        for part in self.parts[self._world.rank :: self._world.size]:
            with writing([part], head, name) as (writer,):
                for index, item in self._items(part):
                    writer.add(index, _npy(item) if self._to_latents else encode_plain_png(item), self._label(index))
                writer.finish()

    def _items(self, part: Part) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(part.start // self._chunk, -(-part.stop // self._chunk)):
            start = number * self._chunk
            chunk = _load(self._chunk_path(number))
            for index in range(max(start, part.start), min(start + len(chunk), part.stop)):
                yield index, chunk[index - start]

    def _label(self, index: int) -> Any:
        return self._source.get_details(index).raw_label.tolist() if self._source.has_labels else None

    def _require_places(self, source: Path, *, sharded: bool, overwrite: bool, known: bool) -> None:
        dest = self._dest
        if dest.resolve() == source.resolve() or (source.is_dir() and dest.resolve().is_relative_to(source.resolve())):
            raise ConfigError(f"--dest={dest} lies inside of --source={source}; choose a place outside")
        if sharded and not is_zip(dest):
            raise ConfigError(f"--dest={dest} is a folder, but shards are ZIP files; name one, as in data.zip")
        if self._world.size > 1 and not is_zip(dest):
            raise ConfigError(f"{self._world.size} processes write ZIP files; name one as --dest, as in {dest}.zip")
        require_folder(dest.parent)
        if is_zip(dest):
            found = existing_shards(dest) if sharded else [dest] if dest.exists() else []
            inputs = {source.resolve()} if source.is_file() else {path.resolve() for path in find_shards(source)}
            for path in found:
                if path.is_dir():
                    raise ConfigError(f"{path} is a folder; choose another --dest")
                if path.resolve() in inputs:
                    raise ConfigError(f"{path} is part of --source={source}; choose another --dest")
            if found and not (overwrite or known):
                raise ConfigError(f"{found[0]} exists already; choose another --dest, or add --overwrite to replace it")
        elif dest.is_dir() and any(os.scandir(dest)) and not known:
            raise ConfigError(f"--dest={dest} is not empty; choose a new folder")
        elif dest.exists() and not dest.is_dir():
            raise ConfigError(f"--dest={dest} is a file; name a ZIP file or a folder")


def own_encoder(source: ImageFolderDataset, vae: str | None, *, batch: int) -> StabilityVAEEncoder:
    """The encoder that the latents of `source` belong to, with the VAE called `vae` in the place of its own."""
    if not source.holds_latents:
        raise ConfigError(f"{source.name} holds pictures, not latents; `encode` makes those")
    encoder = encoder_of(source)
    assert isinstance(encoder, StabilityVAEEncoder)
    entry = encoder_entry(encoder)
    entry["arguments"] |= {"vae_name": full_name(vae or encoder.vae_name), "batch_size": batch}
    if vae is not None and (channels := vae_geometry(vae).channels) != len(encoder.scale):
        raise ConfigError(f"VAE {vae!r} has {channels} latent channels, but {source.name} {len(encoder.scale)}")
    return read_encoder(entry, f"{source.name}: dataset.json")


def _spread(dataset: ImageFolderDataset, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]


def most_likely(encoder: StabilityVAEEncoder, raw: torch.Tensor) -> torch.Tensor:
    """Final latents [N, C, H, W] from raw ones [N, 2C, H, W], the means without noise."""
    return encoder.encode_latents(raw, torch.zeros_like(raw[:, : raw.shape[1] // 2]))


@torch.no_grad()
def samples(source: ImageFolderDataset, encoder: StabilityVAEEncoder, device: torch.device) -> np.ndarray:
    """Pictures spread over the data set, uint8 [N, 3, H, W]: latents decoded; pixels as they are and, each followed by
    it, as their latents decode."""
    if source.holds_latents:
        raw = torch.from_numpy(source.read_batch(_spread(source, 32))[0]).to(device)
        return encoder.decode(most_likely(encoder, raw)).cpu().numpy()
    before = torch.from_numpy(rgb(source.read_batch(_spread(source, 16))[0])).to(device)
    after = encoder.decode(most_likely(encoder, encoder.encode_pixels(before)))
    return torch.stack([before, after], dim=1).flatten(0, 1).cpu().numpy()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        with suppress(OSError):
            path.unlink()
        raise ConfigError(f"{path} is damaged ({one_line(error)}); the same command again computes it anew") from None
