"""Pictures in WebDataset tars: files that share a name up to its first dot are one sample, such as a.jpg and a.cls."""

import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib.errors import ConfigError
from training.conversion.image_source import Source
from training.dataset.item_files import one_line
from training.dataset.label_file import require_inside
from training.dataset.tar_labels import all_or_none, sample_label
from training.images.decode import SUFFIXES, Unreadable


class TarReader:
    """Reads members of uncompressed tars where they lie, without unpacking; a key is (tar, first byte, bytes)."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: tuple[int, BinaryIO] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def read(self, key: tuple[int, int, int]) -> bytes:
        """The bytes of a member; Unreadable where the file is shorter by now."""
        number, offset, size = key
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = number, open(self._paths[number], "rb")  # noqa: SIM115 kept open for the next
        self._open[1].seek(offset)
        data = self._open[1].read(size)
        if len(data) != size:
            raise Unreadable("the tar file is cut short")
        return data


def holds_tars(path: Path) -> bool:
    """Whether `path` is a tar, or a folder that has nothing but tars."""
    if path.is_file():
        return path.name.endswith((".tar", ".tar.gz", ".tgz"))
    places = [place for place in path.iterdir() if not place.name.startswith(".")]
    return bool(places) and all(place.suffix == ".tar" and place.is_file() for place in places)


def tar_source(path: Path) -> Source:
    """The pictures of the tar or of the folder of tars at `path`, sorted by tar and name."""
    if path.suffix in (".gz", ".tgz"):
        raise ConfigError(
            f"--source={path} is a compressed tar, which cannot be read in parallel; run gunzip on it first"
        )
    tars = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix == ".tar" and p.name[0] != ".")
    reader = TarReader(tars)
    names: list[str] = []
    keys: list[tuple[int, int, int]] = []
    found: list[Any] = []
    for number, tar in enumerate(tars):
        samples = _samples(tar, number)
        for sample in sorted(samples):
            pictures = sorted(name for name in samples[sample] if Path(name).suffix.lower() in SUFFIXES)
            if not pictures:
                continue
            if len(pictures) > 1:
                raise ConfigError(f"{tar} has {len(pictures)} pictures in the sample {sample}; one each is known")
            names.append(f"{tar.name}/{pictures[0]}" if len(tars) > 1 else pictures[0])
            keys.append(samples[sample][pictures[0]])
            sizes = {name: size for name, (_, _, size) in samples[sample].items()}
            found.append(sample_label(sizes, partial(_read, reader, samples[sample]), str(tar)))
    if not names:
        raise ConfigError(f"--source={path} holds no images; a WebDataset tar has files such as 000.jpg and 000.cls")
    return Source(path=path, names=names, keys=keys, reader=reader, labels=all_or_none(names, found, str(path)))


def _samples(tar: Path, number: int) -> dict[str, dict[str, tuple[int, int, int]]]:
    """The regular files of a tar as {sample: {name: key}}."""
    samples: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                require_inside([member.name], str(tar))
                folder, _, name = member.name.rpartition("/")
                # Sparse members do not lie in one piece, and are made by archivers of disks, not of pictures.
                if member.isreg() and not member.issparse() and not name.startswith("."):
                    sample = f"{folder}/{name.partition('.')[0]}"
                    samples[sample][member.name] = number, member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{tar} is no readable tar file: {one_line(error)}") from None
    return samples


def _read(reader: TarReader, keys: dict[str, tuple[int, int, int]], name: str) -> bytes:
    return reader.read(keys[name])
