"""Training checkpoints: one torch.save file, written atomically, verified, and read without running code.

The file carries a digest of itself in the comment at the end of a ZIP file, which is what torch.save writes. The
comment is `edm2 sha256 ` + 64 hexadecimal digits: the SHA-256 of every byte before the digits, the last record and the
start of the comment included. So no bit of the file can change unnoticed, and torch.load or any other reader of ZIP
files reads it as before.
"""

import contextlib
import hashlib
import os
import re
import shutil
import struct
import uuid
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from dnnlib.atomic import atomic_path
from dnnlib.disk import forget_cached
from dnnlib.errors import ConfigError, one_line, reason_of

# Part of the data, so that a file that lost its digest is not mistaken for one that never had any.
_FORMAT = {"name": "edm2-training-state", "version": 1}
_SUFFIX = ".damaged"
_LABEL = b"edm2 sha256 "
_COMMENT_BYTES = len(_LABEL) + 64
_END = b"PK\x05\x06"  # signature of the last record: 22 bytes, the last two of which are the length of the comment
_END_BYTES = 22
_BLOCK_BYTES = 8 << 20
MANIFEST = "checkpoint.json"  # in a checkpoint that is a folder


class DamagedCheckpoint(ConfigError):
    """The content of a checkpoint is not what was written."""


def save_checkpoint(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write `data` (plain containers, numbers, strings and tensors) to `path`, atomically, with a digest.

    The file is read back from the disk before it gets its name. Raises OSError if it cannot be written.
    """
    with atomic_path(path) as temp:
        with open(temp, "wb") as file:
            writer = DigestWriter(file)
            try:
                torch.save({**data, "format": dict(_FORMAT)}, cast(IO[bytes], writer))
                digest = writer.finish()
            except Exception:
                if writer.failure is not None:
                    raise writer.failure from None
                raise
            file.flush()
            os.fsync(file.fileno())
        if read_digest(temp) != digest or digest_of(temp, from_disk=True) != digest:
            raise OSError(None, "the disk does not give back what was written to it", str(path))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of `save_checkpoint`, or a plain torch.save of a dictionary, onto the CPU.

    Raises DamagedCheckpoint if the file is not as it was written, ConfigError if it is missing or something else.
    """
    stored = None
    try:
        stored = read_digest(path)
        if stored is not None:
            if digest_of(path) != stored:
                raise damaged(path)
        elif not _is_sound_zip(path):
            raise damaged(path)
        with torch.serialization.safe_globals(_harmless()):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: {reason_of(error)}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint: {reason_of(error)}") from None
    except DamagedCheckpoint:
        raise
    except Exception as error:
        if stored is not None:  # the digest is right, so the cause is elsewhere, such as too little memory
            raise ConfigError(f"{path} is undamaged, but cannot be read here: {one_line(error)}") from None
        # One of a dozen kinds, with texts that advise to run the code in the file.
        raise damaged(path) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a checkpoint: it holds a {type(data).__name__}")
    kind = data.pop("format", None)
    if kind is not None and stored is None:
        raise damaged(path)  # one of ours that lost its digest
    if kind not in (None, _FORMAT):
        raise ConfigError(f"{path} has the unknown format {kind!r:.80}, not {_FORMAT}; use a newer version")
    return data


def checkpoint_bytes(data: Any) -> int:
    """Estimate the size of the file of `data`: up to about 1% more than it will be, never less."""
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size() + 512  # headers, alignment, directory entry
    if isinstance(data, dict):
        return sum(64 + checkpoint_bytes(value) for value in data.values()) + 4096
    if isinstance(data, list | tuple):
        return sum(checkpoint_bytes(value) for value in data) + 4096
    return 64


def numbered(folder: Path, prefix: str, suffix: str) -> list[Path]:
    """List the files named prefix + number + suffix in `folder`, the highest number last; it may have 3 decimals."""
    found = []
    for path in folder.glob(f"{prefix}*{suffix}"):
        digits = path.name[len(prefix) : len(path.name) - len(suffix)]
        if re.fullmatch(r"[0-9]+(\.[0-9]{3})?", digits):
            found.append((float(digits), path))
    return [path for _, path in sorted(found)]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer looks like one, and return the new path."""
    target = path.with_name(path.name + _SUFFIX)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{_SUFFIX}-{number}")
    path.rename(target)
    return target


def remove_older(paths: list[Path], *, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of `paths`; the last one must be verified, as by `save_checkpoint`.

    Files without our digest, and folders without our manifest (torch_utils/checkpoints/sharded.py), are never deleted.
    """
    assert keep > 0
    for path in paths[:-keep]:
        with contextlib.suppress(OSError):  # a file that cannot be deleted stays
            if path.is_dir():
                if (path / MANIFEST).is_file():
                    # A run deletes hidden folders that name no checkpoint when it starts, if this process is killed.
                    shutil.rmtree(path.rename(path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")))
            elif read_digest(path) is not None:
                path.unlink()


def damaged(path: str | os.PathLike[str]) -> DamagedCheckpoint:
    """Return the exception for a checkpoint that cannot be read."""
    return DamagedCheckpoint(f"{path} cannot be read as a checkpoint: it is damaged or something else")


def _is_sound_zip(path: str | os.PathLike[str]) -> bool:
    """Check the checksums of all records of a file without a digest; True if it is not a ZIP file at all.

    torch.load does not compare them. The records of torch.save are uncompressed, so none may be larger than the file.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return True  # torch.load will explain what is wrong
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        small = sum(e.file_size for e in entries) <= Path(path).stat().st_size
        return stored and small and archive.testzip() is None


def _harmless() -> list[Any]:
    """List the globals besides tensors that older files use: numbers of NumPy, and EasyDict, read as a plain dict."""
    scalar = np.float64(0).__reduce__()[0]  # in a private module, which NumPy 2 renamed
    scalars = [(scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    kinds = [np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int32DType, np.dtypes.Int64DType]
    return [(dict, "dnnlib.util.EasyDict"), *scalars, (_plain_dtype, "numpy.dtype"), *kinds]


def _plain_dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """Return the dtype of a number. One such as V4000000000 would make a scalar that fills the memory."""
    if code not in ("f4", "f8", "i4", "i8"):
        raise ValueError("a NumPy dtype other than those of plain numbers")
    return np.dtype(code)


class DigestWriter:
    """A file object for torch.save that writes to `file`; `finish` adds the digest."""

    def __init__(self, file: IO[bytes]) -> None:
        self.failure: OSError | None = None  # of `file`: torch.save may turn it into another error
        self._file = file
        self._hash = hashlib.sha256()
        self._held = b""  # the last 22 bytes, which may be the last record

    def write(self, data: Any) -> int:
        """Write the bytes-like object `data`, but hold the last 22 bytes back."""
        view = memoryview(data).cast("B")
        if len(view) >= _END_BYTES:
            self._emit(self._held)
            self._emit(view[:-_END_BYTES])
            self._held = bytes(view[-_END_BYTES:])
        else:
            held = self._held + bytes(view)
            self._emit(held[:-_END_BYTES])
            self._held = held[-_END_BYTES:]
        return len(view)

    def flush(self) -> None:
        """Do nothing: `file` is flushed by its owner."""

    def finish(self) -> str:
        """Write the rest and the digest; return the digest."""
        assert self._held[:4] == _END and self._held[-2:] == b"\0\0", "torch.save wrote no ZIP file"
        self._emit(self._held[:-2] + struct.pack("<H", _COMMENT_BYTES) + _LABEL)
        digest = self._hash.hexdigest()
        self._emit(digest.encode())
        return digest

    def _emit(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._hash.update(data)


def read_digest(path: str | os.PathLike[str]) -> str | None:
    """Return the digest that the file carries, unchecked, or None."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END_BYTES - _COMMENT_BYTES, 0))
        tail = file.read()
    head = tail[:_END_BYTES]
    if len(tail) < _END_BYTES + _COMMENT_BYTES or head[:4] != _END or head[20:] != struct.pack("<H", _COMMENT_BYTES):
        return None
    if not tail[_END_BYTES:].startswith(_LABEL):
        return None
    return tail[-64:].decode("ascii", errors="replace")


def digest_of(path: str | os.PathLike[str], *, from_disk: bool = False) -> str:
    """Compute the digest that the file should carry; `from_disk` bypasses the system's cache."""
    digest = hashlib.sha256()
    left = Path(path).stat().st_size - 64
    block = memoryview(bytearray(max(min(left, _BLOCK_BYTES), 0)))
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            forget_cached(file.fileno())
        while left > 0:
            count = file.readinto(block[: min(left, len(block))])
            if not count:
                break
            digest.update(block[:count])
            left -= count
    return digest.hexdigest()
