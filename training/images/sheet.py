"""Files of images: written beside the sampling by a few threads, and put together as contact sheets.

Shape legend: N images, C channels (1 grey, 3 RGB), H x W pixels.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from training.images.png_files import FAST, SMALL, write_png

_MAX_THREADS = 16
_MAX_PENDING_BYTES = 256 << 20

SHEET_GAP = 2  # white pixels between and around the images of a contact sheet


def num_writer_threads() -> int:
    """As many as this process has cores, those of other processes of the same run on this machine left out."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return max(1, min(_MAX_THREADS, cores // ranks))


class ImageWriter:
    """Writes PNG files in a few threads, so that the caller goes on sampling; a context manager.

    At most `max_pending` images wait in memory (default: as many as make 256 MB): a slower disk holds the caller back
    rather than filling it. The first failure is raised by the next `write` or on leaving the context, which waits for
    every file. `compression`: see `encode_png`.
    """

    def __init__(
        self, *, num_threads: int | None = None, max_pending: int | None = None, compression: int = FAST
    ) -> None:
        self._num_threads = num_threads or num_writer_threads()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="png")
        self._slots = None if max_pending is None else threading.BoundedSemaphore(max_pending)
        self._compression = compression
        self._failure: BaseException | None = None

    def write(
        self,
        path: Path,
        image: Callable[[], np.ndarray],
        texts: dict[str, str] | None = None,
        image_bytes: int = 1 << 20,
    ) -> None:
        """Write what `image` returns (uint8 [C, H, W]) to `path`, whose folder is made. `image` runs in a thread.

        `image_bytes`: about what an image takes, for the number of images that may wait; the first call counts.
        """
        if self._failure is not None:
            raise self._failure
        if self._slots is None:
            pending = max(2 * self._num_threads, _MAX_PENDING_BYTES // max(image_bytes, 1))
            self._slots = threading.BoundedSemaphore(pending)
        self._slots.acquire()
        self._pool.submit(self._write_into_folder, path, image, texts).add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        assert self._slots is not None
        self._slots.release()
        if not future.cancelled() and self._failure is None:
            self._failure = future.exception()

    def _write_into_folder(self, path: Path, image: Callable[[], np.ndarray], texts: dict[str, str] | None) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        write_png(path, image(), compression=self._compression, texts=texts)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None and self._failure is not None:
            raise self._failure


def contact_sheet(images: np.ndarray, *, num_columns: int, gap: int = SHEET_GAP) -> np.ndarray:
    """Lay `images` (uint8 [N, C, H, W]) out row by row with `gap` white pixels between and around them.

    Returns uint8 [C, rows * (H + gap) + gap, num_columns * (W + gap) + gap]; places left over stay white.
    """
    num_images, num_channels, height, width = images.shape
    num_rows = -(-num_images // num_columns)
    size = (num_channels, num_rows * (height + gap) + gap, num_columns * (width + gap) + gap)
    sheet = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def require_sheet(path: Path) -> None:
    """Raise ConfigError unless a contact sheet can be written to `path`."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"--grid={path} cannot be written; name a file that ends in .png")
    require_folder(path.parent)


def write_sheet(path: Path, images: np.ndarray, *, num_columns: int, texts: dict[str, str] | None = None) -> None:
    """Write a contact sheet of `images` (uint8 [N, C, H, W]) to `path`, whose folder is made; `texts` go with it."""
    make_folder(path.parent)
    write_png(path, contact_sheet(images, num_columns=num_columns), compression=SMALL, texts=texts)
