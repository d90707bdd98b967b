"""Compressed tars, unpacked once to a temporary file that is read in place like any other tar."""

import gzip
import shutil
import tempfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from dnnlib.errors import ConfigError, one_line, reason_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
OTHER_TAR_SUFFIXES = (".tar.xz", ".txz", ".tar.bz2", ".tbz", ".tbz2", ".tar.zst", ".tzst", ".tar.lzma", ".tar.z")
# Images hardly get smaller in a tar: one that unpacks to more than this was made to fill the disk.
_MAX_RATIO, _ALWAYS_ALLOWED = 100, 1 << 26
_CHUNK_BYTES = 1 << 20


def unpacked(source: Path, stack: ExitStack) -> Path:
    """Return an uncompressed tar: `source`, or a temporary file that closing `stack` deletes.

    Reading stops as soon as the content is longer than images in a file of this size can be. Raises ConfigError for
    that, for damaged files, and for a full disk.
    """
    if source.suffix == ".tar":
        return source
    folder = Path(tempfile.mkdtemp(prefix="edm2-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{source.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"
    _unpack(source, path)
    return path


def _unpack(source: Path, path: Path) -> None:
    limit = max(_MAX_RATIO * source.stat().st_size, _ALWAYS_ALLOWED)
    with open(path, "wb") as target:
        try:
            with gzip.open(source) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    if target.tell() + len(chunk) > limit:
                        raise ConfigError(
                            f"--source={source} unpacks to more than {_MAX_RATIO} times its size, unlike images; if"
                            " that is right, run gunzip on it first"
                        )
                    _write(target, chunk, source)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError(f"--source={source} is not a readable compressed tar: {one_line(error)}") from None
        except OSError as error:
            raise ConfigError(f"--source={source} cannot be read: {reason_of(error)}") from None


def _write(target: BinaryIO, chunk: bytes, source: Path) -> None:
    try:
        target.write(chunk)
    except OSError as error:
        raise ConfigError(
            f"--source={source} cannot be unpacked to {target.name}: {reason_of(error)}; set TMPDIR to a folder with"
            " more space, or run gunzip on it first"
        ) from None
