"""Images as PNG files: written beside the sampling by a few threads, and put together as contact sheets.

Shape legend: N images, C channels (1 grey, 3 RGB), H x W pixels.
"""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder

SHEET_GAP = 2  # white pixels between and around the images of a contact sheet


def require_png_channels(num_channels: int) -> None:
    """Raise ConfigError unless images of `num_channels` can be written as PNG."""
    if num_channels not in (1, 3):
        raise ConfigError(
            f"images of {num_channels} channels cannot be written as PNG files, only grey (1) and RGB (3) ones can; "
            "latents need the decoder of their data set"
        )


def write_png(path: Path, image: np.ndarray, *, texts: Mapping[str, str] | None = None) -> None:
    """Write `image` (uint8 [C, H, W]) to `path`, whole or not at all, with `texts` by key; the folder must exist.

    Not flushed to disk file by file, which would cost more than the encoding: an image lost to a power cut is made
    again from its seed.
    """
    require_png_channels(image.shape[0])
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)  # [H, W] or [H, W, C]
    info = PIL.PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    try:
        with atomic_path(path, sync=False) as temp:
            PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(temp, format="PNG", pnginfo=info)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None


class ImageWriter:
    """Writes PNG files in a few threads, so that the caller goes on sampling; a context manager.

    At most `max_pending` images wait in memory: a slower disk holds the caller back rather than filling it. The
    first failure is raised by the next `write` or on leaving the context, which waits for every file.
    """

    def __init__(self, *, num_threads: int | None = None, max_pending: int = 256) -> None:
        self._pool = ThreadPoolExecutor(num_threads or min(4, os.cpu_count() or 1), thread_name_prefix="png")
        self._slots = threading.BoundedSemaphore(max_pending)
        self._failure: BaseException | None = None

    def write(self, path: Path, image: Callable[[], np.ndarray]) -> None:
        """Write what `image` returns (uint8 [C, H, W]) to `path`, whose folder is made. `image` runs in a thread."""
        if self._failure is not None:
            raise self._failure
        self._slots.acquire()
        self._pool.submit(_write_into_folder, path, image).add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        self._slots.release()
        if not future.cancelled() and self._failure is None:
            self._failure = future.exception()

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None and self._failure is not None:
            raise self._failure


def _write_into_folder(path: Path, image: Callable[[], np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    write_png(path, image())


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


def write_sheet(path: Path, images: np.ndarray, *, num_columns: int, texts: Mapping[str, str] | None = None) -> None:
    """Write a contact sheet of `images` (uint8 [N, C, H, W]) to `path`, whose folder is made; `texts` go with it."""
    make_folder(path.parent)
    write_png(path, contact_sheet(images, num_columns=num_columns), texts=texts)
