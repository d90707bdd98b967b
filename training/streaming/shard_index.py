"""The facts about every shard that a run needs before it reads any: number of items, labels, shape and encoder.

For a ZIP file they come from its table of contents, without the items. A tar has no table of contents: it is downloaded
once. The cache folder keeps the index of each version of a shard, so that this happens once.
"""

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.errors import ConfigError, one_line, reason_of
from training.dataset.items import CONVERT_HINT, Shape, is_item, is_latents, read_shape, require_one_kind
from training.dataset.label_file import (
    LABELS_FILE,
    StoredLabels,
    check_labels,
    common_classes,
    labels_array,
    read_json,
    require_inside,
    stored_labels,
)
from training.dataset.tar_files import TarIndex, index_tar, sample_labels
from training.dataset.zip_index import NameTable, archive_files
from training.streaming.cache import ShardCache, cache_name
from training.streaming.remote import RemoteFile, RemoteReader, find_file, suffix_of

_THREADS = 8  # shards indexed at a time
_OPEN_ATTEMPTS = 10
_FORMAT = 3  # of the index files
_MAX_ENTRY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """One shard, without its items."""

    file: RemoteFile
    count: int
    first: str  # name of the first item; empty without items
    shape: Shape | None  # [C, H, W] of the first item
    labels: np.ndarray | None  # int64 [count] or float32 [count, label_dim]
    classes: list[str] | None  # names of the class indices
    named: bool  # whether labels are stored as names, numbered here among those of this shard
    encoder: dict[str, Any] | None  # of latents, from dataset.json
    number: tuple[int, int] | None  # (shard, number of shards)
    tar: TarIndex | None  # of a tar, from load_index

    @property
    def label_kind(self) -> str:
        """The kind of labels, for messages."""
        if self.labels is None:
            return "no labels"
        if self.labels.dtype != np.int64:
            return f"vectors of {self.labels.shape[1]}"
        return "class names" if self.named else "class indices"


def index_shards(urls: Sequence[str], folder: Path, cache: ShardCache) -> list[ShardIndex]:
    """Return the index of each shard, in order, from `folder` if it is there. Raises ConfigError.

    The tables of tars are left out: those of many shards would take much memory. `load_table` loads one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        tasks = [pool.submit(_index_shard, url, folder, cache) for url in urls]
        try:
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


def index_path(file: RemoteFile, folder: Path) -> Path:
    """The index file of a shard."""
    return folder / f"{cache_name(file)}.npz"


def _index_shard(url: str, folder: Path, cache: ShardCache) -> ShardIndex:
    file = find_file(url)
    path = index_path(file, folder)
    index = load_index(file, path)
    if index is None:
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), thread_local=False):
            index = load_index(file, path)  # another process may have made it
            if index is None:
                index = _index_tar(file, cache) if suffix_of(url) == ".tar" else _index_zip(file)
                _save_index(index, path)
    return dataclasses.replace(index, tar=None)


def _index_zip(file: RemoteFile) -> ShardIndex:
    try:
        with zipfile.ZipFile(RemoteReader(file)) as archive:
            entries = archive_files(archive)
            require_inside(entries, file.url)
            names = sorted(name for name in entries if is_item(name))
            text = _read_entry(archive, entries[LABELS_FILE], file) if LABELS_FILE in entries else None
            first = _read_entry(archive, entries[names[0]], file) if names else None
    except ConfigError:
        raise
    except Exception as error:  # zipfile and its decompressors raise a dozen kinds
        raise ConfigError(f"{file.url} is not a readable ZIP file: {one_line(error)}") from None
    return _make_index(file, names, first, text, None, None)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: RemoteFile) -> bytes:
    if entry.file_size > _MAX_ENTRY_BYTES:
        size, name = entry.file_size, entry.filename
        raise ConfigError(f"{file.url}: {name} claims {size} bytes unpacked, more than any image has")
    return archive.read(entry)


def _index_tar(file: RemoteFile, cache: ShardCache) -> ShardIndex:
    with _open_here(file, cache) as stream:
        tar = index_tar(stream, file.url)

        def read(name: str) -> bytes:
            row = tar.names.find(name)
            assert row is not None
            stream.seek(int(tar.starts[row]))
            return stream.read(int(tar.sizes[row]))

        names = [name for name in tar.names if is_item(name)]
        text = None if tar.names.find(LABELS_FILE) is None else read(LABELS_FILE)
        sample_values = sample_labels(tar.names, names, read, file.url) if text is None else None
        return _make_index(file, names, read(names[0]) if names else None, text, sample_values, tar)


def _open_here(file: RemoteFile, cache: ShardCache) -> BinaryIO:
    """Open the file in the cache. Once open, its data stays even if the cache removes the file to make room."""
    for _ in range(_OPEN_ATTEMPTS):
        path = cache.fetch(file)
        assert path is not None
        with contextlib.suppress(FileNotFoundError):
            return open(path, "rb")
    raise ConfigError(
        f"--data-cache-size={cache.limit} is too small for the shards that are read at a time; allow more"
    )


def _make_index(
    file: RemoteFile,
    names: Sequence[str],
    first: bytes | None,
    text: bytes | None,
    stored: StoredLabels | None,
    tar: TarIndex | None,
) -> ShardIndex:
    require_one_kind(names, file.url)
    content: Any = {}
    if text is not None:
        where = f"{file.url}: {LABELS_FILE}"
        stored, content = stored_labels(text, names, where), read_json(text, where)
    labels = None
    if stored is not None:
        where = file.url if text is None else f"{file.url}: {LABELS_FILE}"
        labels = check_labels(names, stored.values, where, classes=stored.classes)
    encoder, number = content.get("encoder"), content.get("shard")
    if not isinstance(encoder, dict | None):
        raise ConfigError(f'{file.url} has an "encoder" that is not a dictionary; leave it out or encode again')
    if not (isinstance(number, list) and len(number) == 2 and all(type(each) is int for each in number)):
        number = None  # not written by dataset_tool.py
    return ShardIndex(
        file=file,
        count=len(names),
        first=names[0] if names else "",
        shape=None if first is None else read_shape(first, f"{file.url}: {names[0]}"),
        labels=None if labels is None else labels_array(labels.values),
        classes=None if labels is None else labels.classes,
        named=labels is not None and labels.named,
        encoder=encoder,
        number=None if number is None else (number[0], number[1]),
        tar=tar,
    )


def _save_index(index: ShardIndex, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    if index.labels is not None:
        arrays["labels"] = index.labels
    if index.tar is not None:
        arrays["text"] = np.frombuffer(index.tar.names.text, dtype=np.uint8)
        arrays |= {"ends": index.tar.names.ends, "starts": index.tar.starts, "sizes": index.tar.sizes}
    about = {
        name: getattr(index, name) for name in ("count", "first", "shape", "encoder", "number", "classes", "named")
    }
    about |= {"format": _FORMAT, "arrays": sorted(arrays)}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    try:
        with atomic_path(path) as temp, open(temp, "wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {reason_of(error)}; give another --data-cache") from None


def load_index(file: RemoteFile, path: Path) -> ShardIndex | None:
    """Load the index of a shard; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            if about["format"] != _FORMAT or sorted({*stored.files} - {"about"}) != about["arrays"]:
                return None
            tar = None
            if "starts" in stored:
                names = NameTable.packed(stored["text"].tobytes(), stored["ends"])
                tar = TarIndex(names=names, starts=stored["starts"], sizes=stored["sizes"])
            index = ShardIndex(
                file=file,
                count=int(about["count"]),
                first=str(about["first"]),
                shape=None if about["shape"] is None else (*map(int, about["shape"]),),  # type: ignore[arg-type]
                labels=stored.get("labels"),
                classes=about["classes"],
                named=bool(about["named"]),
                encoder=about["encoder"],
                number=None if about["number"] is None else (*about["number"],),
                tar=tar,
            )
            return index if _is_sound(index) else None
    except Exception:  # NumPy and zipfile raise a dozen kinds on damaged bytes; the caller makes the index again
        return None


def _is_sound(index: ShardIndex) -> bool:
    labels, tar = index.labels, index.tar
    if labels is not None:
        kind = (np.dtype(np.int64), 1) if labels.ndim == 1 else (np.dtype(np.float32), 2)
        if (labels.dtype, labels.ndim) != kind or len(labels) != index.count:
            return False
    if tar is None:
        return True
    columns = (tar.starts, tar.sizes)
    return (
        tar.names.is_sound()
        and sum(map(is_item, tar.names)) == index.count
        and all(column.dtype == np.int64 and column.shape == (len(tar.names),) for column in columns)
        and bool(((tar.starts >= 0) & (tar.sizes >= 0) & (tar.sizes <= index.file.size - tar.starts)).all())
    )


def load_table(file: RemoteFile, folder: Path) -> TarIndex:
    """Load the table of a tar that `index_shards` has indexed."""
    index = load_index(file, index_path(file, folder))
    if index is None or index.tar is None:
        raise ConfigError(f"the index of {file.url} in {folder} has been removed; start again to make a new one")
    return index.tar


def require_alike(shards: Sequence[ShardIndex], where: str) -> None:
    """Raise ConfigError unless the shards form one data set: complete, of one kind, shape and encoder."""
    filled = [shard for shard in shards if shard.count]
    if not filled:
        raise ConfigError(f"data set {where} holds no images")
    number = shards[-1].number
    if number is not None and len(shards) > 1 and number[1] != len(shards):
        raise ConfigError(f"{where}: there are {len(shards)} of {number[1]} shards; name or upload all")
    first = filled[0]
    for shard in filled:
        if shard.shape != first.shape or is_latents(shard.first) != is_latents(first.first):
            raise ConfigError(
                f"{shard.file.url} begins with {shard.first} of {shard.shape}, and {first.file.url} with {first.first} "
                f"of {first.shape} (channels, height, width); all must be alike: {CONVERT_HINT}"
            )
        if shard.encoder != first.encoder:
            both = f"{first.file.url} and {shard.file.url}"
            raise ConfigError(f"{both} were encoded in different ways; encode them alike")
        if (shard.labels is None) != (first.labels is None):
            bare, other = (shard, first) if shard.labels is None else (first, shard)
            raise ConfigError(f"{bare.file.url} has no labels, and {other.file.url} has; label all shards or none")
        if shard.label_kind != first.label_kind:
            raise ConfigError(
                f"{shard.file.url} has {shard.label_kind} as labels, and {first.file.url} {first.label_kind}; "
                f"give labels of one kind"
            )


def joined_labels(shards: Sequence[ShardIndex], where: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels of all shards, which are alike, and the names of their classes."""
    labeled = [(shard.labels, shard.classes) for shard in shards if shard.count and shard.labels is not None]
    if not labeled:
        return None, None
    if not next(shard.named for shard in shards if shard.count):
        lists = [classes for _, classes in labeled if classes is not None]
        return np.concatenate([labels for labels, _ in labeled]), common_classes(lists, where)
    names = sorted({name for _, classes in labeled for name in classes or ()})
    numbers = {name: number for number, name in enumerate(names)}
    own = (np.array([numbers[name] for name in classes or ()], dtype=np.int64)[labels] for labels, classes in labeled)
    return np.concatenate(list(own)), names
