"""Pictures in Hugging Face `datasets` folders: those of save_to_disk (Arrow) and those of parquet files.

The tables are read by pyarrow, on which `datasets` is built. Nothing is copied to a cache, and no loading script or
other code of the data set is looked at.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.errors import ConfigError
from training.conversion.image_source import Source, choose_split
from training.dataset.item_files import one_line
from training.dataset.label_file import check_labels, require_inside
from training.images.decode import Unreadable

_STATE_FILE, _INFO_FILE = "state.json", "dataset_info.json"  # beside the tables of one split
_SPLITS_FILE = "dataset_dict.json"  # beside the folders of the splits
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_LABEL_COLUMNS = ("label", "labels", "fine_label")

Key = tuple[int, int, int]  # file, row group (0 in Arrow files), row


class TableReader:
    """Reads one column's pictures; keeps the row group that it read last."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self._paths = paths
        self._column = column
        self._kept: tuple[tuple[int, int], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def read(self, key: Key) -> bytes:
        """The encoded picture in a row."""
        place, row = key[:2], key[2]
        if self._kept is None or self._kept[0] != place:
            self._kept = None
            try:
                self._kept = place, _column(self._paths[place[0]], place[1], self._column)
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are of these kinds
                raise Unreadable(one_line(error)) from None
        value = self._kept[1][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
        if isinstance(value, dict) and value.get("path"):
            raise Unreadable("the table has the path of a file and not the picture itself; save it with the pictures")
        raise Unreadable("the table has no picture in this row")


def holds_tables(path: Path) -> bool:
    """Whether `path` is a parquet file, a folder with some, or a folder of save_to_disk."""
    if path.is_file():
        return path.suffix == ".parquet"
    saved = (path / _STATE_FILE).is_file() and (path / _INFO_FILE).is_file()
    return saved or (path / _SPLITS_FILE).is_file() or bool(_parquet_files(path))


def tables_source(path: Path, *, split: str | None, label: str | None) -> Source:
    """The pictures of the tables at `path` in the order of their files and rows."""
    _pyarrow()
    folder, files = _files(path, split)
    if not files:
        raise ConfigError(f"--source={path} holds no images; there is no table in it")
    try:
        schema = _schema(files[0])
        features = _features(schema)
        image = _image_column(schema, features, path)
        label = _label_column(features, schema.names, label, path)
        keys, values = _scan(files, label)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are of these kinds
        raise error if isinstance(error, ConfigError) else _unreadable(path, error) from None
    names = [f"{files[file].relative_to(folder).as_posix()}[{row}]" for file, _, row in _numbered(keys)]
    if not names:
        raise ConfigError(f"--source={path} holds no images; its tables have no rows")
    labels = None if label is None else check_labels(zip(names, values, strict=True), f"{path}: column '{label}'")
    classes = features.get(label, {}).get("names") if label is not None else None
    return Source(path=path, names=names, keys=keys, reader=TableReader(files, image), labels=labels, classes=classes)


def _files(path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the tables of the split in their order."""
    if path.is_file():
        return path.parent, [path]
    if (path / _SPLITS_FILE).is_file():
        splits = _json(path / _SPLITS_FILE).get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
            raise ConfigError(f"{path / _SPLITS_FILE} must list the splits")
        require_inside(splits, str(path / _SPLITS_FILE))
        path = path / choose_split(path, splits, split)
    if (path / _STATE_FILE).is_file():
        entries = _json(path / _STATE_FILE).get("_data_files")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{path / _STATE_FILE} must list the files of the data set")
        names = [str(entry.get("filename")) for entry in entries]
        require_inside(names, str(path / _STATE_FILE))
        return path, [path / name for name in names]
    by_split: dict[str, list[Path]] = {}
    for file in _parquet_files(path):
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if set(by_split) == {""} and split is None:
        return path, by_split[""]
    return path, by_split[choose_split(path, sorted(by_split), split)]


def _parquet_files(path: Path) -> list[Path]:
    """Those in the folder, and below it where they usually are: a walk through a million pictures would take long."""
    folders = [path, *(path / name for name in ("data", *_SPLIT_NAMES))]
    return sorted(file for folder in folders for file in folder.glob("*.parquet") if not file.name.startswith("."))


def _split_of(file: Path) -> str:
    """The split that the name of a parquet file tells, as in data/train-00000-of-00004.parquet; '' for none."""
    words = [*reversed(file.parts[:-1]), file.stem.split("-")[0].split(".")[0]]
    return next((_SPLIT_NAMES[word] for word in reversed(words) if word in _SPLIT_NAMES), "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a JSON object")
    return content


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote into a table about its columns; empty for tables of others."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)}


def _image_column(schema: Any, features: dict[str, dict[str, Any]], path: Path) -> str:
    pa = _pyarrow()
    found = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    if not found:
        binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)
        found = [field.name for field in schema if any(is_kind(field.type) for is_kind in binary)]
    if len(found) != 1:
        columns = ", ".join(schema.names)
        raise ConfigError(f"{path} has {len(found)} columns of pictures among {columns}; one is needed")
    return found[0]


def _label_column(features: dict[str, Any], columns: list[str], wanted: str | None, path: Path) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise ConfigError(f"{path} has no column '{wanted}'; choose one by --label={'|'.join(columns)}")
        return wanted
    usual = [name for name in _LABEL_COLUMNS if name in columns]
    classes = [name for name in columns if features.get(name, {}).get("_type") == "ClassLabel"]
    if usual:
        return usual[0]
    if len(classes) > 1:
        raise ConfigError(f"{path} has {len(classes)} kinds of labels; choose one by --label={'|'.join(classes)}")
    return classes[0] if classes else None


def _scan(files: list[Path], label: str | None) -> tuple[list[Key], list[Any]]:
    """The keys of all rows, and the labels."""
    keys: list[Key] = []
    labels: list[Any] = []
    for number, file in enumerate(files):
        for group, count in enumerate(_group_sizes(file)):
            keys.extend((number, group, row) for row in range(count))
            if label is not None:
                labels.extend(_column(file, group, label).to_pylist())
    return keys, labels


def _numbered(keys: Sequence[Key]) -> Iterator[Key]:
    """The keys with rows counted from the start of their file."""
    file, count = -1, 0
    for key in keys:
        count = count + 1 if key[0] == file else 0
        file = key[0]
        yield key[0], key[1], count


def _schema(file: Path) -> Any:
    if file.suffix == ".parquet":
        return _parquet(file).schema_arrow
    return _arrow(file).schema


def _group_sizes(file: Path) -> list[int]:
    if file.suffix == ".parquet":
        table = _parquet(file)
        return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    return [_arrow(file).num_rows]


def _column(file: Path, group: int, name: str) -> Any:
    if file.suffix == ".parquet":
        return _parquet(file).read_row_group(group, columns=[name]).column(name)
    return _arrow(file).column(name)


def _parquet(file: Path) -> Any:
    return _pyarrow(".parquet").ParquetFile(file)


def _arrow(file: Path) -> Any:
    """The table of an Arrow file, mapped into memory."""
    pa = _pyarrow()
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"--source={path} has no readable tables: {one_line(error)}")


def _pyarrow(module: str = "") -> Any:
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError:
        raise ConfigError(
            "reading Hugging Face data sets needs the package datasets; install it by pip install -e '.[formats]'"
        ) from None
