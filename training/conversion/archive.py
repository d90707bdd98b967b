"""A data set being written: a folder, a ZIP file, or shards, under temporary names until all of it is complete."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.atomic import TEMPORARY, atomic_path, is_in_use, remove, temporary, temporary_path
from dnnlib.errors import ConfigError, reason_of
from training.dataset.label_file import LABELS_FILE, Label

# What a ZIP file needs besides the content: for each entry, whose name is stored twice, and once for the file.
_ENTRY_BYTES = 30 + 46
_END_BYTES = 22 + 20 + 56 + 2 * 28
_NAME_BYTES = len("00000/img00000000.png")
_MAX_SHARDS = 100_000  # their names have five digits
_SUBFOLDER = re.compile(r"\d{5}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file or folder of the data set, for images `start` to `stop` - 1."""

    path: Path
    start: int
    stop: int
    number: int = 0
    of: int | None = None  # number of shards


def plan_parts(dest: Path, count: int, *, num_shards: int | None, per_shard: int | None) -> list[Part]:
    """Divide `count` images over files: all in `dest`, or in shards of it, equal or of `per_shard` images."""
    if num_shards is None and per_shard is None:
        return [Part(path=dest, start=0, stop=count)]
    if per_shard is not None:
        edges = [*range(0, count, per_shard), count]
    else:
        assert num_shards is not None
        if num_shards > count:
            raise ConfigError(f"--shards={num_shards} are more than the {count} images; try --shards={count}")
        edges = [count * i // num_shards for i in range(num_shards + 1)]
    total = len(edges) - 1
    if total > _MAX_SHARDS:
        raise ConfigError(f"{total} shards are more than the {_MAX_SHARDS} that names can count; make them larger")
    return [Part(path=shard_path(dest, i), start=edges[i], stop=edges[i + 1], number=i, of=total) for i in range(total)]


def is_zip(dest: Path) -> bool:
    """Return whether a data set at `dest` is a ZIP file, by its name, rather than a folder."""
    return dest.suffix.lower() == ".zip"


def shard_path(dest: Path, number: int) -> Path:
    """name.zip -> name-00012.zip."""
    return dest.with_name(f"{dest.stem}-{number:05d}{dest.suffix}")


def existing_shards(dest: Path) -> list[Path]:
    """All existing shards of `dest`, sorted."""
    shard_name = re.compile(rf"{re.escape(dest.stem)}-\d{{5}}{re.escape(dest.suffix)}")
    return sorted(path for path in dest.parent.glob("*") if shard_name.fullmatch(path.name))


def image_name(index: int) -> str:
    """Path of image `index` in a data set."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Path of raw latents `index` in a data set."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


def entry_bytes(png_bytes: int, label: Label | None) -> int:
    """Number of bytes of an image and its label in a ZIP file."""
    return png_bytes + _ENTRY_BYTES + 2 * _NAME_BYTES + len(json.dumps(["", label])) + _NAME_BYTES + len(", ")


def images_per_shard(shard_bytes: int, each: int, head: Mapping[str, Any]) -> int:
    """Number of images of `each` bytes in a ZIP file of `shard_bytes`. Raises ConfigError if it does not hold one."""
    # The numbers in "shard" are not known yet; they have at most six digits.
    content = len(json.dumps({**head, "shard": [_MAX_SHARDS, _MAX_SHARDS], "labels": None}))
    available = shard_bytes - _END_BYTES - _ENTRY_BYTES - 2 * len(LABELS_FILE) - content
    if available < each:
        raise ConfigError(f"--shard-size of {shard_bytes} bytes does not hold one image, which takes {each}")
    return available // each


class Writer:
    """Takes items and their labels; `finish` writes the labels and makes sure that everything is on the disk."""

    def __init__(self, path: Path, head: Mapping[str, Any], item_name: Callable[[int], str]) -> None:
        self._path = path
        self._head = head
        self._item_name = item_name
        self._labels: list[tuple[str, Label | None]] = []

    def add(self, index: int, data: bytes, label: Label | None) -> None:
        """Write item `index`."""
        name = self._item_name(index)
        self._write(name, data)
        self._labels.append((name, label))

    def finish(self) -> None:
        """Write the labels: all items have one, or none; `head` tells which, also for a part without items."""
        labels = self._labels if self._head["labels"] is not None else None
        self._write(LABELS_FILE, json.dumps({**self._head, "labels": labels}).encode("utf-8"))

    def _write(self, name: str, data: bytes) -> None:
        raise NotImplementedError


class _FolderWriter(Writer):
    def _write(self, name: str, data: bytes) -> None:
        path = self._path / name
        if not path.parent.is_dir():
            path.parent.mkdir()
        path.write_bytes(data)


class _ZipWriter(Writer):
    """Uncompressed entries, the same bytes for the same images; ZIP64 where necessary."""

    def __init__(self, path: Path, head: Mapping[str, Any], item_name: Callable[[int], str]) -> None:
        super().__init__(path, head, item_name)
        self._file = open(path, "wb")  # noqa: SIM115 closed by finish or abandon
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    def _write(self, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name)  # dated 1980: the same data set is the same file
        entry.create_system = 3  # Unix, on every system
        entry.external_attr = 0o100644 << 16
        self._archive.writestr(entry, data)

    def finish(self) -> None:
        super().finish()
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close an unfinished file without the table that would make it a valid ZIP; leave a finished one alone."""
        self._archive.fp = None
        with suppress(OSError):
            self._file.close()


@contextmanager
def writing(
    parts: Sequence[Part], head: Mapping[str, Any], item_name: Callable[[int], str] = image_name
) -> Iterator[list[Writer]]:
    """Give a writer for each part. The parts appear when the block ends well; if it does not, nothing is left.

    `head` is the content of dataset.json besides the labels; `item_name` names item i. Raises ConfigError if the disk
    refuses the data.
    """
    try:
        with ExitStack() as stack:
            for folder in {part.path.parent: None for part in parts}:
                stack.enter_context(_made_folder(folder))
            yield [_open_writer(part, head, item_name, stack) for part in parts]
    except OSError as error:
        where = parts[0].path if parts else "the data set"
        raise ConfigError(f"{where} cannot be written: {reason_of(error)}") from None


def _open_writer(part: Part, head: Mapping[str, Any], item_name: Callable[[int], str], stack: ExitStack) -> Writer:
    if not is_zip(part.path):
        return _FolderWriter(stack.enter_context(_filled_folder(part.path)), head, item_name)
    if part.of is not None:
        head = {**head, "shard": [part.number, part.of]}
    writer = _ZipWriter(stack.enter_context(atomic_path(part.path, sync=False)), head, item_name)
    stack.callback(writer.abandon)
    return writer


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if the block fails, remove those that were made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _filled_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder inside `folder` (which may be a mount); its content moves up when the block ends well.

    dataset.json moves last: a folder without it is unfinished.
    """
    with _made_folder(folder):
        if is_unfinished(folder):
            _empty(folder)
        with temporary(folder / LABELS_FILE, Path.mkdir) as temp:
            yield temp
            try:
                for path in sorted(temp.glob("[0-9]*")):
                    os.replace(path, folder / path.name)
                labels = temporary_path(folder / LABELS_FILE)
                os.replace(temp / LABELS_FILE, labels)
                temp.rmdir()
                os.replace(labels, folder / LABELS_FILE)
            except BaseException:
                _empty(folder)
                raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) or _SUBFOLDER.fullmatch(path.name):
            remove(path)


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds nothing but what `writing` had put there before it was killed.

    Subfolders alone may be a data set without labels: the temporary ones tell.
    """
    hidden = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]
    others = {path.name for path in folder.iterdir()} - {path.name for path in hidden}
    return bool(hidden) and all(map(_SUBFOLDER.fullmatch, others)) and not any(map(is_in_use, hidden))
