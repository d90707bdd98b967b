"""The part of a conversion that runs in many processes: images in, PNGs out, in order and in bounded memory.

Workers are spawned and import this module; nothing here imports torch, which takes seconds.
"""

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dnnlib.background import map_in_order
from dnnlib.errors import ConfigError, one_line
from dnnlib.orphans import end_children, end_with_parent
from torch_utils.processes.stopping import SIGNALS, spared_children
from training.conversion.image_source import ImageReader
from training.conversion.transforms import TRANSFORMS, Size, scale
from training.images.decode import DecodeOptions, Unreadable, decode_image
from training.images.png import PLAIN, encode_png

# From malloc.h. glibc accepts no larger threshold than 32 MB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 25


class Outcome(NamedTuple):
    """Result of one image: a PNG of `size`, a `reason` why it cannot be read, or neither if it is left out."""

    png: bytes | None = None
    size: Size | None = None
    reason: str | None = None
    transparent: bool = False  # a pixel was not opaque
    largest: int | None = None  # value of a source with 16 bits


@dataclass(frozen=True, kw_only=True)
class ImageConverter:
    """Converts images one by one. `size` as for the transform; None keeps each image's own."""

    reader: ImageReader
    transform: str | None
    size: Size | None
    decoding: DecodeOptions

    def convert(self, key: Any) -> Outcome:
        """Convert the image that the reader has under `key`."""
        try:
            image, transparent, largest = decode_image(self.reader.read(key), self.decoding)
        except (Unreadable, ConfigError, OSError) as error:
            return Outcome(reason=one_line(error))
        if self.size is not None:
            resized = (scale if self.transform is None else TRANSFORMS[self.transform])(image, self.size)
            if resized is None:
                return Outcome()
            image = resized
        png = encode_png(np.asarray(image).transpose(2, 0, 1), compression=PLAIN)
        return Outcome(png=png, size=image.size, transparent=transparent, largest=largest)


def convert_chunks(
    converter: ImageConverter, chunks: Iterable[Sequence[Any]], *, num_workers: int
) -> Generator[list[Outcome], None, None]:
    """Convert every chunk of keys, in order; in this process if `num_workers` is 1.

    At most two chunks for each worker and one more are in memory. Raises ConfigError if a worker is killed.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield [converter.convert(key) for key in chunk]
        return
    context = multiprocessing.get_context("spawn")
    pool = _Pool(num_workers, mp_context=context, initializer=_start_worker, initargs=(converter,))
    try:
        yield from map_in_order(pool, _convert_chunk, map(list, chunks), max_pending=2 * num_workers + 1)
    except BrokenProcessPool:
        raise ConfigError(
            f"a worker process was killed, which happens where memory runs out; "
            f"free some, or try --workers={max(1, num_workers // 2)}"
        ) from None


class _Pool(ProcessPoolExecutor):
    """A pool whose end does not wait for work under way, which may hang: of what has been asked for all is there."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        with spared_children():  # it may start a worker
            return super().submit(*args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        end_children(list((self._processes or {}).values()))
        super().shutdown(wait, cancel_futures=cancel_futures)


_converter: ImageConverter | None = None  # of a worker process; set once when it starts


def _start_worker(converter: ImageConverter) -> None:
    global _converter
    _converter = converter
    # ^C reaches all processes of a terminal; the main one decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_memory()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    end_with_parent()


def _convert_chunk(keys: list[Any]) -> list[Outcome]:
    assert _converter is not None
    return [_converter.convert(key) for key in keys]


def _keep_memory() -> None:
    """Have glibc keep the memory of one image for the next: mapping fresh pages each time takes a quarter of the time.

    Other C libraries have no such setting, or do not need it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(setting, _KEPT_BYTES)
