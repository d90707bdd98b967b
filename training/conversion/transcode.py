"""Pixels to raw latents and back: a data set through a VAE, over all processes, in work that can be interrupted.

The work is done in chunks, each a file in a folder next to the destination until all are computed. They are then put
together, shard by shard, in the order of the source. Chunks are multiples of the VAE's batch: neither the number of
processes nor an interruption changes a result.

N images, C channels, H x W pixels.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import atomic_path, short_name, write_text
from dnnlib.disk import make_folder
from dnnlib.errors import ConfigError, one_line, reason_of
from torch_utils.compiling import keep_compiled_code, missing_compiler
from torch_utils.distributed import World
from training.conversion import destination
from training.conversion.archive import Part, existing_shards, image_name, is_zip, latents_name, plan_parts, writing
from training.conversion.destination import MADE_KEY
from training.dataset.image_folder import ImageFolderDataset
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
from training.encoders import StabilityVAEEncoder
from training.images.png import PLAIN, encode_png

_CHUNK_IMAGES = 256  # at most; a multiple of the VAE's batch

# Images of a process from which a compiled VAE pays on a GPU: about two minutes for 2 ms an image. An estimate.
_COMPILE_FROM = 50_000


@dataclass(frozen=True, kw_only=True)
class TranscodeStep:
    """A few images are done: computed now, or by an earlier, interrupted command."""

    num_images: int


class _ChunkFolder:
    """The results of an unfinished command, one file per chunk, and its request, which tells whose they are."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path = path
        self._request = request
        self._request_file = path / "request.json"

    @property
    def exists(self) -> bool:
        return self._request_file.is_file()

    def prepare(self, world: World) -> None:
        """Make the folder. Raises ConfigError if it holds other work; every process must call this."""
        if world.is_main:
            make_folder(self.path)
            if not self.exists:
                for path in self.path.iterdir():
                    path.unlink()  # of unknown origin without a request
                write_text(self._request_file, json.dumps(self._request))
        world.barrier()
        try:
            request = json.loads(self._request_file.read_text("utf-8"))
        except ValueError:
            request = None
        if request != self._request:
            raise ConfigError(
                f"{self.path} holds the unfinished work of another command; finish it, or remove the folder"
            )

    def __contains__(self, number: int) -> bool:
        return self._chunk_file(number).is_file()

    def save(self, number: int, array: np.ndarray) -> None:
        with atomic_path(self._chunk_file(number)) as temp:
            temp.write_bytes(_npy(array))  # np.save would not report a full disk

    def load(self, number: int) -> np.ndarray:
        """Map a chunk into memory. Raises ConfigError for a damaged one, which is removed to be computed again."""
        path = self._chunk_file(number)
        try:
            return np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            with suppress(OSError):
                path.unlink()
            raise ConfigError(f"{path} is damaged ({one_line(error)}); the same command computes it again") from None

    def remove(self, *, only_if_empty: bool = False) -> None:
        """Remove the folder; with `only_if_empty`, unless it holds a chunk."""
        if not (only_if_empty and any(self.path.glob("*.npy"))):
            shutil.rmtree(self.path, ignore_errors=True)

    def _chunk_file(self, number: int) -> Path:
        return self.path / f"{number:08d}.npy"


def compiled_for(
    encoder: StabilityVAEEncoder,
    num_images: int,
    world: World,
    *,
    to_latents: bool,
    announce: Callable[[str], None],
) -> StabilityVAEEncoder:
    """Return `encoder` with the half of the VAE that is used compiled, if that pays for `num_images` of all processes.

    The main process announces it.
    """
    share = num_images // world.size
    if world.device.type != "cuda" or share < _COMPILE_FROM or missing_compiler(world.device) is not None:
        return encoder
    if world.is_main:
        announce(f"Compiling the VAE first, for {share:,} images per process: takes minutes.")
    keep_compiled_code()
    if to_latents:
        return encoder.with_encoder(tf32=encoder._encoder_tf32, compile=True)
    return encoder.with_decoder(batch_size=encoder.batch_size, compile=True)


class Transcoding:
    """A data set on its way through a VAE: iterate over its steps; the files exist at the end.

    The constructor checks what it can without the VAE, and writes nothing. Under torchrun every process makes and runs
    one; they need a common disk. The same command continues interrupted work from `workdir`. With `skip_existing`, an
    existing result that was made from the same stays (`finished`). Raises ConfigError.
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
        self.encoder = encoder  # of the latents; with `measure`, it gets their statistics at the end
        self._world = world
        self._to_latents = to_latents
        self._measure = measure
        self.num_images = min(len(source), max_images or len(source))  # of all processes
        request = {
            "source": str(source_path),
            "content": source.fingerprint(),
            "images": self.num_images,
            "shape": list(source.image_shape),
            "encoder": encoder_entry(encoder),
            "result": "latents" if to_latents else "pixels",
            **({} if encoder._encoder_tf32 else {"encoder_precision": "fp32"}),
        }
        self._made_from = destination.request_digest(
            {key: value for key, value in request.items() if key != "source"} | {"measured": measure}
        )
        self.workdir = dest.with_name(f"{short_name(dest.name)}.partial")
        self._computed = _ChunkFolder(self.workdir, request)
        self._chunk_size = max(_CHUNK_IMAGES // encoder.batch_size, 1) * encoder.batch_size
        self.parts = plan_parts(dest, self.num_images, num_shards=num_shards, per_shard=None)
        sharded = num_shards is not None
        self._existing = existing_shards(dest) if sharded else []
        resumed = self._computed.exists
        if world.size > 1 and not is_zip(dest):
            raise ConfigError(f"{world.size} processes write ZIP files; name one as --dest, as in {dest}.zip")
        resumable = skip_existing or resumed
        destination.require_destination(dest, source_path, sharded=sharded, overwrite=overwrite, resumable=resumable)
        # Also true where an earlier command was killed after it had written all parts.
        self.finished = resumable and not destination.missing_parts(
            self.parts, self._made_from, self._existing, replace=overwrite or (resumed and is_zip(dest))
        )

    def __len__(self) -> int:
        """Number of images that this process has to do."""
        return sum(len(chunk) for _, chunk in self._chunks())

    def __iter__(self) -> Iterator[TranscodeStep]:
        """Compute the missing chunks, then put all together; see the class."""
        if self.finished:
            yield TranscodeStep(num_images=len(self))
        else:
            try:
                self._computed.prepare(self._world)
                if self._world.is_main:
                    destination.remove_leftovers(self.parts)
                yield from self._compute_missing()
                self._world.barrier()
                self._put_together()
                self._world.barrier()
            except OSError as error:
                raise ConfigError(
                    f"{self._dest} cannot be written: {reason_of(error)}; finished chunks stay in {self.workdir}, and"
                    " the same command continues from there"
                ) from None
        if self._world.is_main:
            destination.remove_stale_shards(self._existing, self.parts)
            self._computed.remove()

    def summary(self) -> str:
        """Describe the result in one line."""
        dest = f"{self._dest} in {len(self.parts)} files" if len(self.parts) > 1 else str(self._dest)
        return f"{dest}: {self.num_images} images" + (", there already" if self.finished else "")

    def _chunks(self) -> Iterator[tuple[int, range]]:
        starts = range(0, self.num_images, self._chunk_size)
        for number in range(self._world.rank, len(starts), self._world.size):
            yield number, range(starts[number], min(starts[number] + self._chunk_size, self.num_images))

    def _compute_missing(self) -> Iterator[TranscodeStep]:
        try:
            for number, chunk in self._chunks():
                if number not in self._computed:
                    self._computed.save(number, self._compute(chunk))
                yield TranscodeStep(num_images=len(chunk))
        finally:
            if self._world.size == 1:
                self._computed.remove(only_if_empty=True)  # an early mistake leaves nothing behind

    @torch.no_grad()
    def _compute(self, chunk: range) -> np.ndarray:
        """Compute raw latents float32 [N, 2C, H, W], or pixels uint8 [N, 3, H, W]."""
        stored, _ = self._source.read_batch(chunk)
        if not self._to_latents:
            raw = torch.from_numpy(stored).to(self._world.device)
            return self.encoder.decode(most_likely(self.encoder, raw)).cpu().numpy()
        pixels = torch.from_numpy(rgb(stored)).to(self._world.device)
        latents = self.encoder.encode_pixels(pixels).cpu().numpy()
        if not np.isfinite(latents).all():
            raise ConfigError(f"the VAE {self.encoder.vae_name} makes numbers that are not finite of images {chunk}")
        return latents

    def _put_together(self) -> None:
        if self._measure:
            statistics = LatentStatistics()
            for number in range(-(-self.num_images // self._chunk_size)):
                statistics.add(self._computed.load(number))
            self.encoder = self.encoder.with_statistics(statistics.mean, statistics.std)
        has_labels = self._source.has_labels
        head: dict[str, Any] = {"labels": [] if has_labels else None, MADE_KEY: self._made_from}
        if has_labels and self._source.class_names is not None:
            head["classes"] = self._source.class_names
        if self._to_latents:
            head[ENCODER_KEY] = encoder_entry(self.encoder)
        name = latents_name if self._to_latents else image_name
        for part in self.parts[self._world.rank :: self._world.size]:
            with writing([part], head, name) as (writer,):
                for index, item in self._items(part):
                    label = self._source.get_details(index).raw_label.tolist() if has_labels else None
                    writer.add(index, _npy(item) if self._to_latents else encode_png(item, compression=PLAIN), label)
                writer.finish()

    def _items(self, part: Part) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(part.start // self._chunk_size, -(-part.stop // self._chunk_size)):
            start = number * self._chunk_size
            chunk = self._computed.load(number)
            for index in range(max(start, part.start), min(start + len(chunk), part.stop)):
                yield index, chunk[index - start]


def own_encoder(source: ImageFolderDataset, vae: str | None, *, batch: int) -> StabilityVAEEncoder:
    """Return the encoder of the latents in `source`; `vae` names a VAE to use in place of its own."""
    if not source.holds_latents:
        raise ConfigError(f"{source.name} holds images, not latents; `encode` makes those")
    encoder = encoder_of(source)
    assert isinstance(encoder, StabilityVAEEncoder)
    entry = encoder_entry(encoder)
    entry["arguments"] |= {"vae_name": full_name(vae or encoder.vae_name), "batch_size": batch}
    if vae is not None and (channels := vae_geometry(vae).channels) != len(encoder.scale):
        raise ConfigError(f"VAE {vae!r} has {channels} latent channels, but {source.name} {len(encoder.scale)}")
    return read_encoder(entry, f"{source.name}: dataset.json")


def most_likely(encoder: StabilityVAEEncoder, raw: torch.Tensor) -> torch.Tensor:
    """Final latents [N, C, H, W] from raw ones [N, 2C, H, W]: their means, without noise."""
    return encoder.encode_latents(raw, torch.zeros_like(raw[:, : raw.shape[1] // 2]))


@torch.no_grad()
def sample_images(source: ImageFolderDataset, encoder: StabilityVAEEncoder, device: torch.device) -> np.ndarray:
    """Decode images spread over the data set, uint8 [N, 3, H, W]. Of pixels, each image is followed by its decoding."""
    num_images = min(32 if source.holds_latents else 16, len(source))
    rows = np.linspace(0, len(source) - 1, num_images).astype(int).tolist()
    stored = source.read_batch(rows)[0]
    if source.holds_latents:
        return encoder.decode(most_likely(encoder, torch.from_numpy(stored).to(device))).cpu().numpy()
    before = torch.from_numpy(rgb(stored)).to(device)
    after = encoder.decode(most_likely(encoder, encoder.encode_pixels(before)))
    return torch.stack([before, after], dim=1).flatten(0, 1).cpu().numpy()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
