"""Small pictures that come as arrays in one file: the idx files of MNIST and its kin, the pickles of CIFAR."""

import gzip
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from dnnlib.errors import ConfigError
from training.conversion.image_source import Source, choose_split
from training.dataset.item_files import one_line
from training.dataset.label_file import check_labels

_IDX = re.compile(r"(?P<start>(?:.*-)?(?P<split>train|t10k|test)-)images[-.]idx3-ubyte(?P<gz>\.gz)?")
_CIFAR_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_CIFAR_BATCH = re.compile(r"data_batch_\d+|test_batch|train|test")
_CIFAR_NAMES = ("batches.meta", "meta")
_CIFAR_SIDE = 32
_MAX_CIFAR_BYTES = 1 << 28  # CIFAR-100's largest file has 150 MB


class ArrayReader:
    """For sources whose keys are the pixels themselves: they travel to the workers with their task."""

    def read(self, key: np.ndarray) -> np.ndarray:
        """`key`."""
        return key


def holds_mnist(path: Path) -> bool:
    """Whether `path` is an idx file of pictures or a folder with one."""
    return bool(_idx_files(path))


def mnist_source(path: Path, *, split: str | None) -> Source:
    """The pictures in idx files, labelled by the file of labels beside them if there is one."""
    files = _idx_files(path)
    image_file = files[choose_split(path, sorted(files), split)]
    images = _read_idx(image_file, 3)
    label_file = image_file.with_name(image_file.name.replace("images", "labels").replace("idx3", "idx1"))
    if not label_file.is_file() and label_file.suffix == ".gz":
        label_file = label_file.with_suffix("")
    names = _numbered_names(image_file.name, len(images), path)
    labels = None
    if label_file.is_file():
        values = _read_idx(label_file, 1)
        if len(values) != len(images):
            raise ConfigError(f"{label_file} has {len(values)} labels for {len(images)} images in {image_file.name}")
        labels = check_labels(zip(names, values.tolist(), strict=True), str(label_file))
    return Source(path=path, names=names, keys=cast(Sequence[Any], images), reader=ArrayReader(), labels=labels)


def holds_cifar(path: Path) -> bool:
    """Whether `path` is CIFAR's tar.gz, the folder in it, or one of the files in that."""
    if path.is_dir():
        names = {place.name for place in path.iterdir() if place.is_file()}
        return any(name in names for name in _CIFAR_NAMES) and any(_CIFAR_BATCH.fullmatch(name) for name in names)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return bool(_tar_members(path, first_only=True))
    if _CIFAR_BATCH.fullmatch(path.name) is None:
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"  # a pickle of protocol 2 or later


def cifar_source(path: Path, *, split: str | None, label: str | None) -> Source:
    """The pictures of CIFAR-10 or CIFAR-100 in the order of the files; nothing in their pickles is executed."""
    files = {path.name: path.read_bytes()} if path.is_file() and "tar" not in path.name else {}
    if path.is_dir():
        files = {place.name: place.read_bytes() for place in sorted(path.iterdir()) if _is_cifar_name(place.name)}
    elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
        files = _tar_members(path)
    batches = {name: data for name, data in files.items() if _CIFAR_BATCH.fullmatch(name)}
    if path.is_file() and len(batches) == 1:
        chosen = list(batches)
    else:
        wanted = choose_split(path, sorted({_cifar_split(name) for name in batches}), split)
        chosen = sorted(name for name in batches if _cifar_split(name) == wanted)
    images, labels, names = [], [], []
    for name in chosen:
        batch = _read_pickle(batches[name], f"{path}: {name}")
        pixels, classes, kind = _batch(batch, f"{path}: {name}", label)
        images.append(pixels)
        labels.extend(classes)
        names.extend(_numbered_names(name, len(pixels), path))
    checked = check_labels(zip(names, labels, strict=True), f"{path}: {kind}")
    class_names = _cifar_classes(files, path, kind)
    keys = cast(Sequence[Any], np.concatenate(images))
    return Source(path=path, names=names, keys=keys, reader=ArrayReader(), labels=checked, classes=class_names)


def _idx_files(path: Path) -> dict[str, Path]:
    """Files of pictures by their split."""
    places = sorted(path.iterdir(), reverse=True) if path.is_dir() else [path]
    found = ((_IDX.fullmatch(place.name), place) for place in places if place.is_file())
    return {"train" if match["split"] == "train" else "test": place for match, place in found if match}


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """The uint8 array in an idx file, compressed or not."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            zeros, kind, axes = struct.unpack(">HBB", file.read(4))
            if (zeros, kind, axes) != (0, 8, num_axes):
                raise ValueError(f"it does not begin as idx data of {num_axes} axes")
            shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
            # Read in steps, so that the header's numbers cost no memory that the file does not fill.
            count = int(np.prod(shape, dtype=object))
            data = bytearray()
            while len(data) < count:
                part = file.read(min(count - len(data), 1 << 24))
                if not part:
                    raise ValueError(f"it is cut short: {len(data)} of {count} bytes")
                data += part
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ConfigError(f"{path} is no readable idx file: {one_line(error)}") from None


def _numbered_names(name: str, count: int, path: Path) -> list[str]:
    if not count:
        raise ConfigError(f"--source={path} holds no images: {name} is empty")
    return [f"{name}[{i}]" for i in range(count)]


def _is_cifar_name(name: str) -> bool:
    return name in _CIFAR_NAMES or _CIFAR_BATCH.fullmatch(name) is not None


def _cifar_split(name: str) -> str:
    return "test" if name.startswith("test") else "train"


def _tar_members(path: Path, *, first_only: bool = False) -> dict[str, bytes]:
    """CIFAR's files in a tar by name, or a sign that it is one; empty for other tars."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if not member.isreg():
                    continue
                if folder not in _CIFAR_FOLDERS:
                    return {}
                if first_only:
                    return {name: b""}
                file = archive.extractfile(member) if _is_cifar_name(name) else None
                if file is not None and member.size <= _MAX_CIFAR_BYTES:
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is no readable tar file: {one_line(error)}") from None
    return dict(sorted(found.items()))


def _read_pickle(data: bytes, name: str) -> dict[str, Any]:
    # Needs torch, which workers have no use for.
    from training.conversion.python2_pickle import read_python2_pickle

    content = read_python2_pickle(cast(BinaryIO, io.BytesIO(data)), name)
    if not isinstance(content, dict):
        raise ConfigError(f"{name} holds no CIFAR batch")
    return content


def _batch(batch: dict[str, Any], where: str, wanted: str | None) -> tuple[np.ndarray, list[Any], str]:
    """Pixels [N, 32, 32, 3], class indices [N] and the name of these labels in the file."""
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * _CIFAR_SIDE**2,):
        raise ConfigError(f"{where} holds no CIFAR batch: 'data' must be uint8 [N, {3 * _CIFAR_SIDE**2}]")
    kinds = [key for key in ("labels", "fine_labels", "coarse_labels") if isinstance(batch.get(key), list)]
    kind = kinds[0] if wanted is None and kinds else f"{wanted}_labels"
    if kind not in kinds:
        names = "|".join(key.removesuffix("_labels") for key in kinds if key != "labels")
        raise ConfigError(f"{where} has no {wanted} labels" + (f"; choose by --label={names}" if names else ""))
    if len(batch[kind]) != len(data):
        raise ConfigError(f"{where} has {len(batch[kind])} {kind} for {len(data)} images")
    return data.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1), batch[kind], kind


def _cifar_classes(files: dict[str, bytes], path: Path, kind: str) -> list[str] | None:
    """What the class indices stand for, if that file is there."""
    for name in _CIFAR_NAMES:
        if name in files:
            names = _read_pickle(files[name], f"{path}: {name}").get(kind.removesuffix("s") + "_names")
            if isinstance(names, list):
                return [text.decode("latin-1") if isinstance(text, bytes) else str(text) for text in names]
    return None
