"""A data set being written: a folder, a ZIP file, or shards, under temporary names until all of it is there."""

import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, reason_of
from training.dataset.label_file import LABELS_FILE, Label

# What a ZIP file needs beside the entries' bytes: for each entry, without its name which is there twice; in all.
_ENTRY_BYTES = 30 + 46
_END_BYTES = 22 + 20 + 56 + 2 * 28
_NAME_BYTES = len("00000/img00000000.png")
_MAX_SHARDS = 100_000


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file or folder of the data set, for pictures `start` to `stop` - 1."""

    path: Path
    start: int
    stop: int
    number: int = 0
    of: int | None = None  # how many shards there are


class Writer(Protocol):
    """Takes pictures; `finish` writes the labels and makes sure that everything is on the disk."""

    def add(self, index: int, png: bytes, label: Label | None) -> None:
        """Write picture `index`."""
        ...

    def finish(self) -> None:
        """Write the labels."""
        ...


def plan_parts(dest: Path, count: int, *, num_shards: int | None, per_shard: int | None) -> list[Part]:
    """How `count` pictures are spread over files: one at `dest`, or shards of it, equal or of `per_shard` pictures."""
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
        raise ConfigError(
            f"{total} shards are more than the {_MAX_SHARDS} that their names can count; make them larger"
        )
    return [Part(path=shard_path(dest, i), start=edges[i], stop=edges[i + 1], number=i, of=total) for i in range(total)]


def shard_path(dest: Path, number: int) -> Path:
    """name.zip -> name-00012.zip."""
    return dest.with_name(f"{dest.stem}-{number:05d}{dest.suffix}")


def existing_shards(dest: Path) -> list[Path]:
    """The shards of `dest` that are there, of whatever number."""
    return sorted(path for path in dest.parent.glob("*.zip") if shard_path(dest, _number(path)) == path)


def entry_bytes(png_bytes: int, label: Label | None) -> int:
    """What a picture takes in a ZIP file, with its label."""
    return png_bytes + _ENTRY_BYTES + 2 * _NAME_BYTES + len(json.dumps(["", label])) + _NAME_BYTES + len(", ")


def pictures_per_shard(shard_bytes: int, each: int, head: Mapping[str, Any]) -> int:
    """How many pictures of `each` bytes fit a ZIP file of `shard_bytes`; ConfigError if none does."""
    # The numbers of the shard and of all shards are not known yet; they have at most six digits.
    content = len(json.dumps({**head, "shard": [_MAX_SHARDS, _MAX_SHARDS], "labels": None}))
    room = shard_bytes - _END_BYTES - _ENTRY_BYTES - 2 * len(LABELS_FILE) - content
    if room < each:
        raise ConfigError(f"--shard-size of {shard_bytes} bytes does not hold one image, which takes {each}")
    return room // each


@contextmanager
def writing(
    parts: Sequence[Part], head: Mapping[str, Any], item_name: Callable[[int], str] | None = None
) -> Iterator[list[Writer]]:
    """A writer for each part. Nothing is at its place before the block ends well, nothing is left if it does not.

    `head` is what the dataset.json says beside the labels; `item_name` names item i, a picture by default. Raises
    ConfigError where the disk does not take it.
    """
    item_name = item_name or picture_name
    try:
        with ExitStack() as stack:
            for folder in {part.path.parent: None for part in parts}:
                stack.enter_context(_made(folder))
            yield [_writer(part, head, item_name, stack) for part in parts]
    except OSError as error:
        where = parts[0].path if parts else "the data set"
        raise ConfigError(f"{where} cannot be written: {reason_of(error)}") from None


def is_zip(dest: Path) -> bool:
    """Whether a data set at `dest` is a ZIP file and no folder, to go by its name."""
    return dest.suffix.lower() == ".zip"


def _writer(part: Part, head: Mapping[str, Any], item_name: Callable[[int], str], stack: ExitStack) -> Writer:
    if not is_zip(part.path):
        return _FolderWriter(stack.enter_context(_filled(part.path)), head, item_name)
    if part.of is not None:
        head = {**head, "shard": [part.number, part.of]}
    writer = _ZipWriter(stack.enter_context(atomic_path(part.path, sync=False)), head, item_name)
    stack.callback(writer.abandon)
    return writer


class _ZipWriter:
    """Entries without compression, the same bytes for the same pictures; ZIP64 where it has to be."""

    def __init__(self, path: Path, head: Mapping[str, Any], item_name: Callable[[int], str]) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 closed by finish or abandon
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._head = head
        self._item_name = item_name
        self._labels: list[tuple[str, Label | None]] = []

    def add(self, index: int, png: bytes, label: Label | None) -> None:
        name = self._item_name(index)
        self._write(name, png)
        self._labels.append((name, label))

    def finish(self) -> None:
        self._write(LABELS_FILE, _labels_text(self._labels, self._head))
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close an unfinished file without writing what would make it whole; a finished one is left alone."""
        self._archive.fp = None
        with suppress(OSError):
            self._file.close()

    def _write(self, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name)  # dated 1980, so that the same data set is the same file
        entry.create_system = 3  # Unix, on every system
        entry.external_attr = 0o100644 << 16
        self._archive.writestr(entry, data)


class _FolderWriter:
    """Files in a folder."""

    def __init__(self, path: Path, head: Mapping[str, Any], item_name: Callable[[int], str]) -> None:
        self._path = path
        self._head = head
        self._item_name = item_name
        self._labels: list[tuple[str, Label | None]] = []

    def add(self, index: int, png: bytes, label: Label | None) -> None:
        name = self._item_name(index)
        if not self._labels or self._labels[-1][0].split("/")[0] != name.split("/")[0]:
            (self._path / name).parent.mkdir(exist_ok=True)
        (self._path / name).write_bytes(png)
        self._labels.append((name, label))

    def finish(self) -> None:
        (self._path / LABELS_FILE).write_bytes(_labels_text(self._labels, self._head))


def picture_name(index: int) -> str:
    """Where a data set has picture `index`."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def latents_name(index: int) -> str:
    """Where a data set has raw latents `index`."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


def _labels_text(labels: list[tuple[str, Label | None]], head: Mapping[str, Any]) -> bytes:
    """The dataset.json; all pictures have a label or none has. `head` says whether they do, for a part without any."""
    return json.dumps({**head, "labels": labels if head["labels"] is not None else None}).encode("utf-8")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if the block fails, remove those that were made."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A hidden folder inside of `folder`, whose content moves up when the block ends well: `folder` may be a mount."""
    with _made(folder):
        temp = folder / f".{uuid.uuid4().hex[:12]}.tmp"
        temp.mkdir()
        try:
            yield temp
            for place in sorted(temp.iterdir(), key=lambda place: (place.name == LABELS_FILE, place.name)):
                os.replace(place, folder / place.name)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def _number(path: Path) -> int:
    """The number in name-00012.zip, -1 where there is none."""
    match = re.fullmatch(r".*-(\d{5})", path.stem)
    return int(match[1]) if match else -1
