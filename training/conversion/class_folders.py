"""The labels of images in folders, ZIP files and tars: one rule for all of them.

The first of these that exists counts: dataset.json, the metadata.jsonl or metadata.csv of a Hugging Face image folder,
the .cls or .json files of a WebDataset, the names of the top-level folders.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError
from dnnlib.text import did_you_mean
from training.conversion.image_source import LABEL_COLUMNS, SPLIT_OF
from training.dataset.item_files import LABELS_FILE, Files
from training.dataset.label_file import (
    Labels,
    StoredLabels,
    check_labels,
    join_labels,
    labels_by_name,
    read_json,
    require_inside,
    require_none_hidden,
    stored_labels,
)
from training.dataset.tar_files import sample_labels
from training.dataset.zip_index import plain_name

_METADATA = re.compile(r"(?:.*/)?metadata\.(?:csv|jsonl)")
_FILE_COLUMN = "file_name"
_NUMBERED = re.compile(r"\d{5}/img\d{8}\.\w+")  # as dataset_tool.py names images
_MOST_NAMED = 10  # classes in a line of text


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """What a user says about the labels of a source."""

    column: str | None = None  # of tables and metadata files; the kind of CIFAR's labels
    level: int | None = None  # the folders whose names are the classes, 1 for the top
    leave_out: bool = False

    def __post_init__(self) -> None:
        options = {"--no-labels": self.leave_out, "--label-level": self.level, "--label": self.column}
        given = [name for name, value in options.items() if value]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} contradict each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class FoundLabels:
    """The labels of a source, and what its user should know about them."""

    labels: Labels | None = None
    notes: tuple[str, ...] = ()


def find_labels(path: Path, parts: Sequence[tuple[Files, Sequence[str]]], choice: LabelChoice) -> FoundLabels:
    """Return the labels of the images in `parts` (files, and the images among them), in this order.

    Raises ConfigError for labels that contradict each other, or of some of the images only.
    """
    if choice.leave_out:
        return FoundLabels()
    names = [name for _, part_names in parts for name in part_names]
    notes: list[str] = []
    if choice.level is None:
        stored = [(part, part_names, _stored(part, part_names, choice.column, notes)) for part, part_names in parts]
        labels = join_labels(stored, str(path))
        if labels is not None or any(_has_json(part, part_names) for part, part_names in parts):
            return FoundLabels(labels=labels, notes=tuple(notes))
        if choice.column is not None:
            raise ConfigError(f"{path} has no file with a column '{choice.column}'; leave --label out")
    labels = _folder_labels(names, path, choice.level, notes)
    return FoundLabels(labels=labels, notes=tuple(notes))


def _has_json(part: Files, items: Sequence[str]) -> bool:
    return part.names.find(_root(items) + LABELS_FILE) is not None or part.names.find(LABELS_FILE) is not None


def _root(items: Sequence[str]) -> str:
    """Return the folder that all images are in, as after packing a folder: 'name/'; '' if they are in several."""
    root = items[0].partition("/")[0] + "/" if items else ""
    return root if all(name.startswith(root) for name in items) else ""


def _stored(part: Files, items: Sequence[str], column: str | None, notes: list[str]) -> StoredLabels | None:
    """Return the labels in files of `part`; None without such files."""

    def read(name: str) -> Any:
        row = part.names.find(name)
        assert row is not None
        return part.read(row)

    if _has_json(part, items):
        if column is not None:
            raise ConfigError(f"{part.path} has its labels in {LABELS_FILE}; leave --label={column} out")
        root = "" if part.names.find(LABELS_FILE) is not None else _root(items)
        file = root + LABELS_FILE
        return stored_labels(read(file), [name.removeprefix(root) for name in items], f"{part.path}: {file}")
    require_none_hidden(part)
    pairs: list[tuple[str, Any]] = []
    for name in part.names:
        if _METADATA.fullmatch(name) and "/." not in f"/{name}" and not name.startswith("__MACOSX/"):
            pairs += _metadata(bytes(read(name)), name, f"{part.path}: {name}", column, notes)
    if not pairs:
        return sample_labels(part.names, items, read, str(part.path))
    by_name = labels_by_name(pairs, str(part.path))
    if not by_name.keys() & items:
        raise ConfigError(f"{part.path} has none of the images that its metadata names, such as {pairs[0][0]}")
    return StoredLabels(values=[by_name.get(name) for name in items])


def _metadata(data: bytes, name: str, where: str, column: str | None, notes: list[str]) -> list[tuple[str, Any]]:
    """Return pairs of file and label from a metadata file; none, and a note, if it has no labels."""
    rows = list(_csv_rows(data, where) if name.endswith(".csv") else _jsonl_rows(data, where))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    label = column or next((key for key in LABEL_COLUMNS if key in columns), None)
    if column is not None and column not in columns:
        meant = did_you_mean(column, columns)
        raise ConfigError(f"{where} has no column '{column}'; choose one by --label={'|'.join(columns)}{meant}")
    if label is None or _FILE_COLUMN not in columns:
        missing = _FILE_COLUMN if _FILE_COLUMN not in columns else " or ".join(LABEL_COLUMNS[:2])
        notes.append(f"{name} has no column {missing} and is not used; its columns are {', '.join(columns)}")
        return []
    folder = name[: name.rfind("/") + 1]
    pairs = [(folder + plain_name(str(row.get(_FILE_COLUMN))), row.get(label)) for row in rows]
    require_inside((file for file, _ in pairs), where)
    return pairs


def _csv_rows(data: bytes, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table. A column of whole numbers only has numbers, else text; empty is None."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{where} is not a CSV table in UTF-8: {error}") from None
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise ConfigError(f"{where}: row {number} has more fields than the first row has names; quote commas")
    columns = rows[0].keys() if rows else ()
    whole = {key for key in columns if all(re.fullmatch(r"-1|0|[1-9]\d*|", row[key] or "") for row in rows)}
    for row in rows:
        yield {key: None if not text else int(text) if key in whole else text for key, text in row.items()}


def _jsonl_rows(data: bytes, where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            row = read_json(line, f"{where}, line {number},")
            if not isinstance(row, dict):
                raise ConfigError(f"{where}, line {number}, must be a JSON object")
            yield row


def _folder_labels(names: Sequence[str], path: Path, level: int | None, notes: list[str]) -> Labels | None:
    """Return class indices by the folders at `level`, in sorted order; None for a single folder at the top."""
    depth = level or 1
    paths = [name.split("/") for name in names]
    classes = sorted({parts[depth - 1] for parts in paths if len(parts) > depth})
    notes += _folder_notes(names, depth, classes)
    if level is None and len(classes) < 2:
        return None
    if not classes:
        raise ConfigError(f"--label-level={level}: {path} has no images {level} folders deep; choose a lower level")
    outside = [name for name, parts in zip(names, paths, strict=True) if len(parts) <= depth]
    if outside:
        raise ConfigError(
            f"{path} has {len(classes)} class folders, and {len(outside)} images outside of them without a label, "
            f"first {outside[0]}; move them into a class, add a {LABELS_FILE}, or leave the labels out by --no-labels"
        )
    return check_labels(names, [parts[depth - 1] for parts in paths], str(path), classes=classes)


def _folder_notes(names: Sequence[str], depth: int, classes: Sequence[str]) -> Iterator[str]:
    """Yield what makes the folders at `depth` doubtful as classes."""
    below = sorted({parts[depth] for name in names if len(parts := name.split("/")) > depth + 1})
    splits = [name for name in classes if name.lower() in SPLIT_OF]
    deeper = f"--label-level={depth + 1} takes the folders below as classes: {_listed(below)}"
    if splits and len(classes) > 1:
        instead = deeper if below else "--no-labels leaves the labels out"
        yield f"{_listed(splits)} are often parts of a data set, and here they are classes; {instead}"
    elif len(classes) == 1 and len(below) > 1:
        yield f"all folders are in one, {classes[0]}, so they are not classes; {deeper}"
    elif len(classes) > 1 and all(map(_NUMBERED.fullmatch, names)):
        yield f"the folders look like those of a data set without its {LABELS_FILE}; --no-labels leaves the labels out"


def describe_labels(labels: Labels | None, lost: Counter[int] | None = None) -> str:
    """Format the number of images of each class, by name if possible, without the images `lost`."""
    if labels is None:
        return "no labels"
    if isinstance(labels.values[0], list):
        return f"labels are vectors of {len(labels.values[0])}"
    counts = Counter(label for label in labels.values if isinstance(label, int)) - (lost or Counter())
    texts = [f"{class_name(index, labels.classes)} ({counts[index]})" for index in sorted(counts)]
    return f"{len(texts)} class{'es' if len(texts) > 1 else ''}: {_listed(texts)}"


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """Return the name of a class, its number if it has none."""
    return classes[index] if classes is not None and index < len(classes) else str(index)


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    extra = f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return ", ".join(texts[:_MOST_NAMED]) + extra
