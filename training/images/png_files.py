"""PNG files: written whole or not at all, by a few threads next to the sampling, and read back with their texts.

Shape legend: C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha), H x W pixels.
"""

import io
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, reason_of
from torch_utils.processes.dealing import cores_per_process
from training.images.png import CHANNELS, END, FAST, HEADER, SIGNATURE, encode_png

_MAX_TEXT_BYTES = 1 << 16  # longer texts in files of others are skipped
_MAX_THREADS = 16
_MAX_PENDING_BYTES = 256 << 20


def write_png(path: Path, image: np.ndarray, *, compression: int = FAST, texts: dict[str, str] | None = None) -> None:
    """Write `image` (uint8 [C, H, W]) to `path`, whole or not at all; the folder must exist. See `encode_png`.

    Files are not flushed to disk one by one, which would cost more than the encoding: an image that a power cut
    destroys is generated again from its seed.
    """
    data = encode_png(image, compression=compression, texts=texts)
    try:
        with atomic_path(path, sync=False) as temp:
            temp.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None


class ImageWriter:
    """Writes PNG files in a few threads, while the caller continues sampling; a context manager.

    At most `max_pending` images wait in memory (default: 256 MB of images), so a slow disk slows the caller down
    instead of filling the memory. The first failure is raised by the next `write` or on leaving the context, which
    waits for every file. `compression`: see `encode_png`.
    """

    def __init__(
        self, *, num_threads: int | None = None, max_pending: int | None = None, compression: int = FAST
    ) -> None:
        self._num_threads = num_threads or min(_MAX_THREADS, cores_per_process())
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
        """Write the result of `image` (uint8 [C, H, W]) to `path`; makes its folder. `image` is called in a thread.

        `image_bytes`: approximate memory of one image, which sets how many may wait; the first call counts.
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
            raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None
        write_png(path, image(), compression=self._compression, texts=texts)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None and self._failure is not None:
            raise self._failure


@dataclass(frozen=True, kw_only=True)
class PngHead:
    """Content of a PNG file in front of its pixels."""

    shape: (
        tuple[int, int, int] | None
    )  # C, H, W of an 8-bit gray or RGB image, with alpha or without; None for other kinds
    texts: dict[str, str]  # by keyword


def read_png_head(path: Path) -> PngHead | None:
    """Read the head of the PNG file `path`; None if it does not exist or lacks the beginning or end of a PNG."""
    try:
        with open(path, "rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return None
            head = _read_chunks(file)
            file.seek(-len(END), os.SEEK_END)
            return head if file.read() == END else None
    except (OSError, struct.error, ValueError):
        return None


def _read_chunks(file: io.BufferedReader) -> PngHead | None:
    shape = None
    texts = {}
    while True:
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IHDR" and length == HEADER.size:
            width, height, bits, color_type, *_ = HEADER.unpack(file.read(length))
            channels = CHANNELS.get(color_type)
            shape = (channels, height, width) if channels and bits == 8 else None
            file.seek(4, os.SEEK_CUR)
        elif name == b"tEXt" and length <= _MAX_TEXT_BYTES:
            keyword, _, text = file.read(length).partition(b"\0")
            texts[keyword.decode("latin1")] = text.decode("latin1")
            file.seek(4, os.SEEK_CUR)
        elif name in (b"IDAT", b"IEND"):
            return PngHead(shape=shape, texts=texts) if name == b"IDAT" else None
        else:
            file.seek(length + 4, os.SEEK_CUR)


def read_png(path: Path) -> np.ndarray:
    """Read the pixels of a gray or RGB image, with alpha or without: uint8 [C, H, W]. Raises ConfigError for others."""
    from training.images.decode import Unreadable, open_image  # Pillow is slow to import

    try:
        with open_image(path.read_bytes()) as image:
            is_usual, pixels = image.mode in ("L", "LA", "RGB", "RGBA"), np.asarray(image)
    except (OSError, Unreadable) as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}") from None
    if not is_usual:
        raise ConfigError(f"{path} is not a gray or RGB image of 8 bits")
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
