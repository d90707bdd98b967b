"""Labels of a data set in its dataset.json: a class index or a vector for every image, all of one kind."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError, one_line
from dnnlib.text import shortened
from training.dataset.item_files import LABELS_FILE, Files, ZipFiles
from training.dataset.items import is_item

MAX_CLASSES = 1_000_000

Label = int | list[float]

_LARGEST = float(np.finfo(np.float32).max)

_MAX_CHECKED = 1000  # files that are not items; few, if any
_DRIVE = re.compile(r"[A-Za-z]:")


def read_labels(data: bytes, names: Sequence[str], where: str) -> list[Label] | None:
    """Return the labels of `names` from the text of a dataset.json; None without labels. Raises ConfigError."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {one_line(error)}") from None
    entries = content.get("labels") if isinstance(content, dict) else ()
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ConfigError(f'{where} must read {{"labels": [[file, label], ...]}} or {{"labels": null}}')
    try:
        by_name = {str(name).replace("\\", "/"): label for name, label in entries}
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must list pairs of a file and its label") from None
    require_inside(by_name, where)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ConfigError(
            f"{where} has no label for {len(missing)} of {len(names)} images, first {missing[0]}; label all or none"
        )
    return check_labels(((name, by_name[name]) for name in names), where)


def read_file_labels(files: Files, names: Sequence[str]) -> list[Label] | None:
    """Return the labels of `names` from the dataset.json of a data set, or of each of its shards; None without."""
    name_set = set(names)
    by_name: dict[str, Label] = {}
    labeled: list[Files] = []
    for part in files.parts:
        row = part.names.find(LABELS_FILE)
        part_names = [name for name in part.names if name in name_set]
        if row is None:
            _require_none_hidden(part)
        labels = None if row is None else read_labels(bytes(part.read(row)), part_names, part.describe(row))
        if labels is not None:
            labeled.append(part)
            by_name.update(zip(part_names, labels, strict=True))
    if labeled and len(labeled) < len(files.parts):
        bare = next(part for part in files.parts if part not in labeled)
        raise ConfigError(f"{bare.path} has no labels, and {labeled[0].path} has; label all shards or none")
    if not labeled:
        return None
    return check_labels(((name, by_name[name]) for name in names), f"{files.path}: {LABELS_FILE}")


def _require_none_hidden(part: Files) -> None:
    """Raise ConfigError if a damaged table of contents hides the labels: the run would train without them."""
    if isinstance(part, ZipFiles):
        others = [row for row, name in enumerate(part.names) if not is_item(name)]
        for row in others[:_MAX_CHECKED]:
            part.require_name(row)


def require_all_shards(files: Files) -> None:
    """Raise ConfigError if the dataset.json of the last shard states more shards than exist."""
    last = files.parts[-1]
    row = last.names.find(LABELS_FILE)
    data = b"" if len(files.parts) == 1 or row is None else bytes(last.read(row))
    if b'"shard"' not in data:
        return
    try:
        count = json.loads(data.decode("utf-8"))["shard"][1]
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return  # not written by dataset_tool.py; reading the labels reports what is wrong with them
    if type(count) is int and count != len(files.parts):
        raise ConfigError(f"{files.path}: there are {len(files.parts)} of {count} shards; the last ones are missing")


def require_inside(names: Iterable[str], where: str) -> None:
    """Raise ConfigError if one of the `names` in `where` leads out of the folder that it is relative to."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or _DRIVE.match(name):
            raise ConfigError(f"{where} names '{name[:200]}', which leads out of its folder; rename or remove it")


def check_labels(labels: Iterable[tuple[str, Any]], where: str) -> list[Label]:
    """Return the labels from pairs (image name, label). Raises ConfigError unless all are labels of one kind."""
    checked: list[Label] = []
    width: int | None = None  # of the first label: a vector's length, or 0 for a class index
    for name, label in labels:
        kind = _label_width(label)
        if kind is None:
            raise ConfigError(
                f"{where}: the label of {name} is {shortened(label)}; a label is a class index from 0 to "
                f"{MAX_CLASSES - 1} or a list of finite numbers"
            )
        if width is not None and kind != width:
            raise ConfigError(
                f"{where} mixes kinds of labels: {_kind(kind)} for {name}, {_kind(width)} for the images before it"
            )
        width = kind
        checked.append(label)
    return checked


def labels_array(labels: Sequence[Label]) -> np.ndarray:
    """Return checked labels as int64 [N] for class indices, float32 [N, label_dim] for vectors."""
    vectors = len(labels) > 0 and isinstance(labels[0], list)
    return np.array(labels, dtype=np.float32 if vectors else np.int64)


def _label_width(label: Any) -> int | None:
    """Return 0 for a class index, the length of a vector, None for anything else."""
    if type(label) is int:
        return 0 if 0 <= label < MAX_CLASSES else None
    # NaN is not <= anything.
    if isinstance(label, list) and label and all(type(x) in (int, float) and abs(x) <= _LARGEST for x in label):
        return len(label)
    return None


def _kind(width: int) -> str:
    return f"a vector of {width}" if width else "a class index"
