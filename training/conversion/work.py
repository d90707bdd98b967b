"""The part of a conversion that runs in many processes: pictures in, PNGs out, in order and in bounded memory.

Workers are spawned and import this module, so nothing here imports torch.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dnnlib.errors import ConfigError
from training.conversion.image_source import Reader
from training.conversion.transforms import TRANSFORMS, Size, scale
from training.dataset.item_files import one_line
from training.images.decode import Unreadable, decode_rgb, encode_png, rgb_from_array


class Outcome(NamedTuple):
    """What became of one picture: a PNG of `size`, a `reason` why it cannot be read, or neither: left out."""

    png: bytes | None = None
    size: Size | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to do with every picture. `size` as for the transform, None to keep the picture's own."""

    reader: Reader
    transform: str | None
    size: Size | None
    exif: bool

    def convert(self, key: Any) -> Outcome:
        """The outcome for the picture that the reader has under `key`."""
        try:
            data = self.reader.read(key)
            picture = rgb_from_array(data) if isinstance(data, np.ndarray) else decode_rgb(data, exif=self.exif)
        except (Unreadable, ConfigError, OSError) as error:
            return Outcome(reason=one_line(error))
        if self.transform is not None and self.size is not None:
            result = TRANSFORMS[self.transform](picture, self.size)
        else:
            result = picture if self.size is None else scale(picture, self.size)
        return Outcome() if result is None else Outcome(png=encode_png(result), size=result.size)


def convert_chunks(
    work: Work, chunks: Iterable[Sequence[Any]], *, num_workers: int
) -> Generator[list[Outcome], None, None]:
    """The outcomes for every chunk of keys, in order; in this process if `num_workers` is 1.

    At most two chunks for each worker and one more are in memory. Raises ConfigError if a worker is killed.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield [work.convert(key) for key in chunk]
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(work,))
    pending: deque[Future[list[Outcome]]] = deque()
    try:
        for chunk in chunks:
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
            pending.append(pool.submit(_convert_chunk, list(chunk)))
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            f"a worker process was killed, which happens where memory runs out; "
            f"free some, or try --workers={max(1, num_workers // 2)}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# From malloc.h. 32 MB is the largest threshold that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 25

# What a worker process works on; set once when it starts.
_work: Work | None = None


def _start_worker(work: Work) -> None:
    global _work
    _work = work
    # ^C reaches all processes of a terminal; the main one decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Have glibc keep what a picture frees for the next one; mapping fresh pages each time costs a quarter of the work.

    Other C libraries have no such setting, or need none.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(setting, _KEPT_BYTES)


def _end_with_parent() -> None:
    """A main process that is killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _convert_chunk(keys: list[Any]) -> list[Outcome]:
    assert _work is not None
    return [_work.convert(key) for key in keys]
