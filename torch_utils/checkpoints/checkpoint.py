"""Training checkpoints: one torch.save file that appears whole or not at all, checked, read without running code."""

import contextlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, reason_of
from torch_utils.checkpoints.digest import DigestWriter, digest_of, read_digest

# Said in the file itself, so that one that lost its digest is not taken for one that never had any.
_FORMAT = {"name": "edm2-training-state", "version": 1}
_SUFFIX = ".damaged"
MANIFEST = "checkpoint.json"  # of a checkpoint that is a folder


class DamagedCheckpoint(ConfigError):
    """The file is not what was written."""


def save_checkpoint(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write `data` (plain containers, numbers, strings and tensors) to `path`, atomically, with a digest.

    Before the file takes its name, it is read back from the disk. Raises OSError where it cannot be written.
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
    """Read what `save_checkpoint` wrote, or a plain torch.save of a dictionary, onto the CPU.

    Raises DamagedCheckpoint where the file is not as it was written, ConfigError where it is missing or foreign.
    """
    stored = None
    try:
        stored = read_digest(path)
        if stored is not None:
            if digest_of(path) != stored:
                raise _damaged(path)
        elif not _is_sound_zip(path):
            raise _damaged(path)
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
        if stored is not None:  # what was written, so that the fault is elsewhere: not enough memory, for one
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path} is undamaged, but cannot be read here: {reason}") from None
        # A dozen kinds, with texts that advise to run what is in the file.
        raise _damaged(path) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no checkpoint: it holds a {type(data).__name__}")
    said = data.pop("format", None)
    if said is not None and stored is None:
        raise _damaged(path)  # one of ours, without its digest
    if said not in (None, _FORMAT):
        raise ConfigError(f"{path} is a checkpoint of the kind {said!r:.80}; known is {_FORMAT}: use a newer version")
    return data


def checkpoint_bytes(data: Any) -> int:
    """How large the file of `data` will be, within a hundredth; a little more than it is."""
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size() + 512  # the record's headers, alignment, entry, description
    if isinstance(data, dict):
        return sum(64 + checkpoint_bytes(value) for value in data.values()) + 4096
    if isinstance(data, list | tuple):
        return sum(checkpoint_bytes(value) for value in data) + 4096
    return 64


def newest(folder: Path, prefix: str, suffix: str) -> Path | None:
    """The file called prefix + digits + suffix in `folder` with the highest number, or None."""
    found = numbered(folder, prefix, suffix)
    return found[-1] if found else None


def numbered(folder: Path, prefix: str, suffix: str) -> list[Path]:
    """The files called prefix + digits + suffix in `folder`, the highest number last."""
    found = []
    for path in folder.glob(f"{prefix}*{suffix}"):
        digits = path.name[len(prefix) : len(path.name) - len(suffix)]
        if digits.isdecimal():
            found.append((int(digits), path))
    return [path for _, path in sorted(found)]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; its new name."""
    target = path.with_name(path.name + _SUFFIX)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{_SUFFIX}-{number}")
    path.rename(target)
    return target


def remove_older(paths: list[Path], *, keep: int) -> None:
    """Remove all but the last `keep` of `paths`, of those with a digest: others are no files of ours to remove.

    Of folders those with a manifest (torch_utils/checkpoints/sharded.py).

    To be called when the last one is verified, as `save_checkpoint` does.
    """
    assert keep > 0
    for path in paths[:-keep]:
        with contextlib.suppress(OSError):  # what cannot be removed stays
            if path.is_dir():
                if (path / MANIFEST).is_file():
                    (path / MANIFEST).unlink()  # what is left half-removed is no checkpoint
                    shutil.rmtree(path)
            elif read_digest(path) is not None:
                path.unlink()


def _damaged(path: str | os.PathLike[str]) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path} cannot be read as a checkpoint: it is damaged or something else")


def _is_sound_zip(path: str | os.PathLike[str]) -> bool:
    """Whether the checksums of a file without a digest agree, in all records; True for what is no ZIP file at all.

    torch.load doesn't compare them. Its records are stored as they are, so that none is larger than the file.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return True  # torch.load tells what it is
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        small = sum(e.file_size for e in entries) <= Path(path).stat().st_size
        return stored and small and archive.testzip() is None


def _harmless() -> list[Any]:
    """What older files may name beside tensors: numbers of NumPy, and the dictionary with attributes.

    That one is read as a plain dictionary.
    """
    scalar = np.float64(0).__reduce__()[0]  # of a private module, which has another name in older versions
    scalars = [(scalar, f"numpy.{place}.multiarray.scalar") for place in ("core", "_core")]
    kinds = [np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int32DType, np.dtypes.Int64DType]
    return [(dict, "dnnlib.util.EasyDict"), *scalars, np.dtype, *kinds]
