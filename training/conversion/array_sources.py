"""Images that come as arrays in one file: batches of samples, the idx files of MNIST and its kin, CIFAR's pickles.

Pickles are read as data by a closed machine: nothing in them is executed.
"""

import gzip
import io
import itertools
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.text import did_you_mean
from torch_utils.pickles.machine import Machine, Refused
from torch_utils.pickles.values import VOCABULARY, build
from training.conversion.class_folders import LabelChoice
from training.conversion.image_source import ArrayReader, Source, choose_split
from training.conversion.unpacked_tar import TAR_SUFFIXES
from training.dataset.item_files import FREE_BYTES, MAX_RATIO
from training.dataset.label_file import check_labels
from training.dataset.sample_array import LABELS_KEY, SampleArray
from training.dataset.tar_files import ReadsBounded
from training.dataset.zip_index import plain_name

_IDX = re.compile(r"(?:.*-)?(train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?")
_READ_BYTES = 1 << 24

_CIFAR_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_CIFAR_BATCH = re.compile(r"data_batch_\d+|test_batch|train|test")
_CIFAR_NAMES = ("batches.meta", "meta")
_CIFAR_SIDE = 32
_MAX_CIFAR_ENTRIES = 1000  # the sets have 8 files
_MAX_CIFAR_BYTES = 1 << 28  # all files of CIFAR-10 or CIFAR-100 have 186 MB


def holds_mnist(path: Path) -> bool:
    """Return whether `path` is an idx file of images or a folder with one."""
    return bool(_idx_files(path))


def open_mnist(path: Path, *, split: str | None, choice: LabelChoice) -> Source:
    """Open the images in idx files, with the labels in the file next to them if it exists."""
    files = _idx_files(path)
    image_file = files[choose_split(path, sorted(files), split)]
    images = _read_idx(image_file, 3)
    label_file = image_file.with_name(image_file.name.replace("images", "labels").replace("idx3", "idx1"))
    if not label_file.is_file() and label_file.suffix == ".gz":
        label_file = label_file.with_suffix("")
    names = _numbered_names(image_file.name, len(images), path)
    labels = None
    if label_file.is_file() and not choice.leave_out:
        values = _read_idx(label_file, 1)
        if len(values) != len(images):
            raise ConfigError(f"{label_file} has {len(values)} labels for {len(images)} images in {image_file.name}")
        labels = check_labels(names, values.tolist(), str(label_file))
    return Source.of(path=path, names=names, keys=cast(Sequence[Any], images), reader=ArrayReader(), labels=labels)


def _idx_files(path: Path) -> dict[str, Path]:
    files = sorted(path.iterdir(), reverse=True) if path.is_dir() else [path]
    matches = ((_IDX.fullmatch(file.name), file) for file in files if file.is_file())
    return {"train" if match[1] == "train" else "test": file for match, file in matches if match}


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            zeros, kind, axes = struct.unpack(">HBB", file.read(4))
            if (zeros, kind, axes) != (0, 8, num_axes):
                raise ValueError(f"it does not begin as idx data of {num_axes} axes")
            shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
            # Read in steps: numbers in the header allocate no more memory than the file fills.
            count = int(np.prod(shape, dtype=object))
            if path.suffix == ".gz" and count > max(FREE_BYTES, MAX_RATIO * path.stat().st_size):
                raise ValueError(f"it announces {count} bytes, more than {MAX_RATIO} times those of the file")
            data = bytearray()
            while len(data) < count:
                part = file.read(min(count - len(data), _READ_BYTES))
                if not part:
                    raise ValueError(f"it is cut short: {len(data)} of {count} bytes")
                data += part
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ConfigError(f"{path} is not a readable idx file: {one_line(error)}") from None


def _numbered_names(name: str, count: int, path: Path) -> list[str]:
    if not count:
        raise ConfigError(f"--source={path} holds no images: {name} is empty")
    return [f"{name}[{i}]" for i in range(count)]


def open_samples(path: Path) -> Source:
    """Open the images in an .npz batch of samples or an .npy file, with the labels in the array `arr_1`, if any."""
    array = SampleArray(path)
    values = array.labels()
    if values is not None and len(values) != len(array.names):
        raise ConfigError(f"{path} has {len(values)} labels in {LABELS_KEY} for {len(array.names)} images")
    labels = None if values is None else check_labels(array.names, values, f"{path}: {LABELS_KEY}")
    keys = cast(Sequence[Any], array.pixels)
    return Source.of(path=path, names=array.names, keys=keys, reader=ArrayReader(), labels=labels)


def holds_cifar(path: Path) -> bool:
    """Return whether `path` is CIFAR's tar.gz, the folder in it, or one of the files in that."""
    if path.is_dir():
        names = {file.name for file in path.iterdir() if file.is_file()}
        return any(name in names for name in _CIFAR_NAMES) and any(_CIFAR_BATCH.fullmatch(name) for name in names)
    if path.name.endswith(TAR_SUFFIXES):
        return bool(_tar_members(path, first_only=True))
    if _CIFAR_BATCH.fullmatch(path.name) is None:
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"  # a pickle of protocol 2 or later


def open_cifar(path: Path, *, split: str | None, label: str | None) -> Source:
    """Open CIFAR-10 or CIFAR-100; images come in the order of the files."""
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if _is_cifar_name(file.name) and file.is_file()]
        files = {file.name: _read_whole(file) for file in found}
    elif path.name.endswith(TAR_SUFFIXES):
        files = _tar_members(path)
    else:
        files = {path.name: _read_whole(path)}
    batches = sorted(name for name in files if _CIFAR_BATCH.fullmatch(name))
    if len(batches) > 1 or not path.is_file():
        split = choose_split(path, sorted({_cifar_split(name) for name in batches}), split)
        batches = [name for name in batches if _cifar_split(name) == split]
    images, labels, names, kind = [], [], [], ""
    for name in batches:
        pixels, classes, kind = _read_batch(files[name], f"{path}: {name}", label)
        images.append(pixels)
        labels.extend(classes)
        names.extend(_numbered_names(name, len(pixels), path))
    return Source.of(
        path=path,
        names=names,
        keys=cast(Sequence[Any], np.concatenate(images)),
        reader=ArrayReader(),
        labels=check_labels(names, labels, f"{path}: {kind}", classes=_cifar_classes(files, path, kind)),
    )


def _read_whole(file: Path) -> bytes:
    if file.stat().st_size > _MAX_CIFAR_BYTES:
        raise ConfigError(f"{file} has more than {_MAX_CIFAR_BYTES} bytes; CIFAR has 186 MB")
    return file.read_bytes()


def _is_cifar_name(name: str) -> bool:
    return name in _CIFAR_NAMES or _CIFAR_BATCH.fullmatch(name) is not None


def _cifar_split(name: str) -> str:
    return "test" if name.startswith("test") else "train"


def _tar_members(path: Path, *, first_only: bool = False) -> dict[str, bytes]:
    """Read CIFAR's files from a tar, by name; with first_only just a first name. Empty for other tars."""
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) if path.suffix != ".tar" else open(path, "rb") as packed:
            # Headers may claim any size, which tarfile reads at once.
            bounded: Any = ReadsBounded(packed, _MAX_CIFAR_BYTES >> 8 * first_only)
            archive = tarfile.open(fileobj=bounded, mode="r:")  # noqa: SIM115 it holds nothing but `packed`
            for member in itertools.islice(archive, _MAX_CIFAR_ENTRIES):
                folder, _, name = plain_name(member.name).rpartition("/")
                if not member.isreg():
                    continue
                if folder not in _CIFAR_FOLDERS:
                    return {}
                if first_only:
                    return {name: b""}
                file = archive.extractfile(member) if _is_cifar_name(name) else None
                if file is not None:
                    if sum(map(len, members.values())) + member.size > _MAX_CIFAR_BYTES:
                        raise ConfigError(
                            f"{path} holds more than {_MAX_CIFAR_BYTES} bytes of images; CIFAR has 186 MB"
                        )
                    members[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a readable tar file: {one_line(error)}") from None
    return dict(sorted(members.items()))


def _read_batch(data: bytes, where: str, label: str | None) -> tuple[np.ndarray, list[Any], str]:
    """Return pixels [N, 32, 32, 3], class indices [N] and the name of these labels in the file."""
    batch = _read_pickle(data, where)
    pixels = batch.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * _CIFAR_SIDE**2,):
        raise ConfigError(f"{where} is not a CIFAR batch: 'data' must be uint8 [N, {3 * _CIFAR_SIDE**2}]")
    kinds = [key for key in ("labels", "fine_labels", "coarse_labels") if isinstance(batch.get(key), list)]
    kind = kinds[0] if label is None and kinds else f"{label}_labels"
    if kind not in kinds:
        names = [key.removesuffix("_labels") for key in kinds if key != "labels"]
        advice = f"; choose by --label={'|'.join(names)}{did_you_mean(str(label), names)}" if names else ""
        raise ConfigError(f"{where} has no {label} labels{advice}")
    if len(batch[kind]) != len(pixels):
        raise ConfigError(f"{where} has {len(batch[kind])} {kind} for {len(pixels)} images")
    return pixels.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1), batch[kind], kind


def _cifar_classes(files: dict[str, bytes], path: Path, kind: str) -> list[str] | None:
    for name in _CIFAR_NAMES:
        if name in files:
            names = _read_pickle(files[name], f"{path}: {name}").get(kind.removesuffix("s") + "_names")
            if isinstance(names, list):
                return [text.decode("latin-1") if isinstance(text, bytes) else str(text) for text in names]
    return None


def _read_pickle(data: bytes, where: str) -> dict[str, Any]:
    """Read the dictionary in a pickle of Python 2 or 3 without executing anything; keys are always str."""
    try:
        content = _Python2Machine(cast(BinaryIO, io.BytesIO(data)), _PYTHON2_WORDS, _build_array).load()
    except Refused as error:
        raise ConfigError(f"{where}: not read, and nothing in it was run: {str(error)[:400]}") from None
    except Exception as error:  # a damaged file can fail anywhere: in the parser, the stack, NumPy
        raise ConfigError(f"{where}: the file is damaged or cut short: {one_line(error)[:200]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a CIFAR batch")
    return content


_PYTHON2_WORDS = {
    name: action for name, action in VOCABULARY.items() if name.startswith(("numpy.", "_codecs.", "__builtin__."))
}


class _Python2Machine(Machine):
    """Knows Python 2's byte strings, which the parser returns as text with one character per byte."""

    def _step(self, name: str, argument: Any, position: int | None) -> None:
        if name in ("SHORT_BINSTRING", "BINSTRING"):
            self._stack.append(argument)
        else:
            super()._step(name, argument, position)

    def _set_items(self, items: list[Any]) -> None:
        # Files that Python 3 has written again have keys of bytes.
        keys = [key.decode("latin-1") if type(key) is bytes else key for key in items[::2]]
        super()._set_items([part for pair in zip(keys, items[1::2], strict=True) for part in pair])


def _build_array(target: Any, state: Any) -> None:
    """Set an object's state; the bytes of a Python 2 array are a byte string, too."""
    if type(target) is np.ndarray and type(state) is tuple and state and type(state[-1]) is str:
        state = (*state[:-1], state[-1].encode("latin-1"))
    build(target, state)
