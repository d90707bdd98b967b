"""Labels of a data set in its dataset.json: a class index, a name or a vector for every image, all of one kind."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.text import shortened
from training.dataset.item_files import LABELS_FILE, Files, ZipFiles
from training.dataset.items import is_item
from training.dataset.zip_index import plain_name

MAX_CLASSES = 1_000_000

Label = int | list[float]

_LARGEST = float(np.finfo(np.float32).max)

_MAX_CHECKED = 1000  # files that are not items; few, if any
_DRIVE = re.compile(r"[A-Za-z]:")
_NAMED = -1  # in place of a vector's length
_WANTED = '{"labels": [[file, label], ...]} or {"labels": null}'


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of some images, in their order."""

    values: list[Label]  # class indices or vectors, all of one kind
    classes: list[str] | None = None  # names of the class indices
    named: bool = False  # whether the file has class names in place of indices


@dataclass(frozen=True, kw_only=True)
class StoredLabels:
    """Labels as a file has them, not checked yet: indices, names or vectors; None or -1 stands for no label."""

    values: Sequence[Any]
    classes: list[str] | None = None  # names of the indices, if the file lists them


def read_json(data: Any, where: str) -> Any:
    """Parse JSON in UTF-8, -16 or -32, also with a byte-order mark. Raises ConfigError, also for contradictions."""
    try:
        return json.loads(bytes(data), object_pairs_hook=_without_contradictions)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {one_line(error)}") from None


def _without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                both = f"{shortened(value)} and {shortened(values[key])}"
                raise ValueError(f"{shortened(key)} stands there twice, with the values {both}")
    return values


def stored_labels(data: Any, names: Sequence[str], where: str) -> StoredLabels | None:
    """Return what a dataset.json, given as its bytes, says about `names`; None without labels. Raises ConfigError."""
    content = read_json(data, where)
    pairs = _label_pairs(content, where)
    if pairs is None:
        return None
    by_name = labels_by_name(pairs, where)
    require_inside(by_name, where)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise _some_missing(missing, names, where)
    return StoredLabels(values=[by_name[name] for name in names], classes=_listed_classes(content, where))


def _label_pairs(content: Any, where: str) -> Iterable[Any] | None:
    """Return the pairs of file and label in a dataset.json, None if it says that there are no labels."""
    if isinstance(content, dict) and "labels" not in content:
        unknown = [key for key in content if "." not in key]  # a file's name has a suffix
        if unknown or not content:
            keys = f"the key {shortened(unknown[0])}" if unknown else "no keys"
            raise ConfigError(f'{where} has {keys} and no "labels"; it must read {_WANTED}, or {{file: label, ...}}')
        return content.items()
    entries = content["labels"] if isinstance(content, dict) else ()
    if isinstance(entries, dict):
        return entries.items()
    if not isinstance(entries, list | None):
        raise ConfigError(f"{where} must read {_WANTED}")
    return entries


def labels_by_name(pairs: Iterable[Any], where: str) -> dict[str, Any]:
    """Return a label by the plain name of its file. Raises ConfigError for two different labels of one file."""
    try:
        named = [(plain_name(str(name)), label) for name, label in pairs]
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must list pairs of a file and its label") from None
    by_name = dict(named)
    if len(by_name) < len(named):
        for name, label in named:
            if by_name[name] != label:
                both = f"{shortened(label)} and {shortened(by_name[name])}"
                raise ConfigError(f"{where} gives {name} two labels, {both}; correct one of them")
    return by_name


def _listed_classes(content: Any, where: str) -> list[str] | None:
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list | None):
        raise ConfigError(f'{where} has a value of "classes" that is not a list; leave it out or convert again')
    return None if classes is None else [str(name) for name in classes]


def read_file_labels(files: Files, names: Sequence[str]) -> Labels | None:
    """Return the labels of `names` from the dataset.json of a data set, or of each of its shards; None without."""
    stored: list[tuple[Files, Sequence[str], StoredLabels | None]] = []
    name_set = set(names)
    for part in files.parts:
        row = part.names.find(LABELS_FILE)
        part_names = [name for name in part.names if name in name_set]
        if row is None:
            require_none_hidden(part)
        labels = None if row is None else stored_labels(part.read(row), part_names, part.describe(row))
        stored.append((part, part_names, labels))
    found = join_labels(stored, f"{files.path}: {LABELS_FILE}")
    if found is None or len(stored) == 1:
        return found
    order = {name: position for position, name in enumerate(name for _, part_names, _ in stored for name in part_names)}
    return replace(found, values=[found.values[order[name]] for name in names])


def join_labels(stored: Sequence[tuple[Files, Sequence[str], StoredLabels | None]], where: str) -> Labels | None:
    """Return the labels of all parts (files, their items, the labels), in order; None if no part has labels.

    Raises ConfigError if only some parts have labels, or if they name their classes differently.
    """
    labeled = [part for part, _, labels in stored if labels is not None]
    names: list[str] = []
    values: list[Any] = []
    lists: list[list[str]] = []
    for part, part_names, labels in stored:
        if labels is not None:
            names += part_names
            values += labels.values
            lists += [] if labels.classes is None else [labels.classes]
        elif labeled:
            raise ConfigError(f"{part.path} has no labels, and {labeled[0].path} has; label all shards or none")
    return check_labels(names, values, where, classes=common_classes(lists, where)) if labeled else None


def common_classes(lists: Sequence[list[str]], where: str) -> list[str] | None:
    """Return the names of classes of all parts, which must agree; None if no part has them. Raises ConfigError."""
    if any(classes != lists[0] for classes in lists):
        raise ConfigError(f'the shards of {where} have different "classes"; give all the same list')
    return lists[0] if lists else None


def require_none_hidden(part: Files) -> None:
    """Raise ConfigError if a damaged table of contents hides the labels: the run would train without them."""
    if isinstance(part, ZipFiles):
        others = [row for row, name in enumerate(part.names) if not is_item(name)]
        for row in others[:_MAX_CHECKED]:
            part.require_name(row)


def require_all_shards(files: Files) -> None:
    """Raise ConfigError if the dataset.json of the last shard states more shards than exist."""
    last = files.parts[-1]
    row = last.names.find(LABELS_FILE)
    if len(files.parts) == 1 or row is None:
        return
    try:
        count = read_value(last.read(row), "shard", list, last.describe(row))[1]
    except (ConfigError, TypeError, IndexError):
        return  # not written by dataset_tool.py; reading the labels reports what is wrong with them
    if type(count) is int and count != len(files.parts):
        raise ConfigError(f"{files.path}: there are {len(files.parts)} of {count} shards; the last ones are missing")


def require_inside(names: Iterable[str], where: str) -> None:
    """Raise ConfigError if one of the `names` in `where` leads out of the folder that it is relative to."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or _DRIVE.match(name):
            raise ConfigError(f"{where} names '{name[:200]}', which leads out of its folder; rename or remove it")


def read_value(data: Any, key: str, kind: type, where: str) -> Any:
    """Return the value of `key`, of this `kind`, in the bytes of a dataset.json; None if missing."""
    if f'"{key}"'.encode() not in bytes(data).replace(b"\0", b""):  # spares parsing; UTF-16 has zeros in between
        return None
    content = read_json(data, where)
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind | None):
        name = "list" if kind is list else "dictionary"
        raise ConfigError(f'{where} has a value of "{key}" that is not a {name}; leave it out or convert again')
    return value


def check_labels(
    names: Sequence[str], values: Sequence[Any], where: str, *, classes: Sequence[str] | None = None
) -> Labels | None:
    """Return the labels `values` of the images `names`; None if no image has one (None or -1 stands for no label).

    Class names become indices into `classes`, by default all of these names in sorted order. Raises ConfigError unless
    all images have a label, of one kind.
    """
    missing = [name for name, value in zip(names, values, strict=True) if _is_missing(value)]
    if missing and len(missing) < len(names):
        raise _some_missing(missing, names, where)
    if missing:
        return None
    width: int | None = None  # of the first label, see _label_width
    for name, label in zip(names, values, strict=True):
        kind = _label_width(label)
        if kind is None:
            raise ConfigError(
                f"{where}: the label of {name} is {shortened(label)}; a label is a class index from 0 to "
                f"{MAX_CLASSES - 1}, the name of a class, or a list of finite numbers"
            )
        if width is not None and kind != width:
            raise ConfigError(
                f"{where} mixes kinds of labels: {_kind(kind)} for {name}, {_kind(width)} for the images before it"
            )
        width = kind
    if width != _NAMED:
        return Labels(values=list(values), classes=None if classes is None or width else list(classes))
    listed = sorted(set(values)) if classes is None else list(classes)
    index = {name: number for number, name in enumerate(listed)}
    for name, label in zip(names, values, strict=True):
        if label not in index:
            raise ConfigError(f'{where}: the label of {name} is {shortened(label)}, which is not one of "classes"')
    return Labels(values=[index[label] for label in values], classes=listed, named=classes is None)


def _is_missing(label: Any) -> bool:
    return label is None or (type(label) is int and label == -1)


def _some_missing(missing: Sequence[str], names: Sequence[str], where: str) -> ConfigError:
    return ConfigError(
        f"{where} has no label for {len(missing)} of {len(names)} images, first {missing[0]}; label all or none"
        " (dataset_tool.py convert --no-labels leaves the labels out)"
    )


def labels_array(labels: Sequence[Label]) -> np.ndarray:
    """Return checked labels as int64 [N] for class indices, float32 [N, label_dim] for vectors."""
    vectors = len(labels) > 0 and isinstance(labels[0], list)
    return np.array(labels, dtype=np.float32 if vectors else np.int64)


def _label_width(label: Any) -> int | None:
    """Return 0 for a class index, _NAMED for a name, the length of a vector, None for anything else."""
    if type(label) is int:
        return 0 if 0 <= label < MAX_CLASSES else None
    if isinstance(label, str):
        return _NAMED if label.strip() else None
    # NaN is not <= anything.
    if isinstance(label, list) and label and all(type(x) in (int, float) and abs(x) <= _LARGEST for x in label):
        return len(label)
    return None


def _kind(width: int) -> str:
    return "a class name" if width == _NAMED else f"a vector of {width}" if width else "a class index"
