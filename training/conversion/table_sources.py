"""Hugging Face `datasets` folders: those of save_to_disk (Arrow), and parquet files.

pyarrow, on which `datasets` is built, reads the tables in place. `datasets` itself would first copy parquet files to a
cache, and follows file names in state.json that lead out of the folder. Loading scripts and other code are ignored.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.disk import require_plain
from dnnlib.errors import ConfigError, one_line, reason_of
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from dnnlib.text import did_you_mean
from training.conversion.class_folders import LabelChoice
from training.conversion.image_source import LABEL_COLUMNS, SPLIT_OF, Source, choose_split, import_optional
from training.dataset.label_file import check_labels, read_json, require_inside
from training.images.decode import Unreadable

_STATE_FILE, _INFO_FILE = "state.json", "dataset_info.json"  # next to the tables of one split
_SPLITS_FILE = "dataset_dict.json"  # next to the folders of the splits

Key = tuple[int, int, int]  # file, row group (0 in Arrow files), row


class _Table:
    """A parquet file, or an Arrow file as a single row group, mapped into memory."""

    def __init__(self, file: Path) -> None:
        require_plain(file)
        if file.suffix == ".parquet":
            self._parquet = _pyarrow(".parquet").ParquetFile(file)
            self.schema = self._parquet.schema_arrow
            groups = range(self._parquet.num_row_groups)
            self.group_sizes = [self._parquet.metadata.row_group(group).num_rows for group in groups]
        else:
            pa = _pyarrow()
            self._parquet = None
            self._arrow = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
            self.schema, self.group_sizes = self._arrow.schema, [self._arrow.num_rows]

    def column(self, group: int, name: str) -> Any:
        if self._parquet is None:
            return self._arrow.column(name)
        return self._parquet.read_row_group(group, columns=[name]).column(name)


class TableReader:
    """Reads one column's images; keeps the row group that it read last."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self._paths = paths
        self._column = column
        self._kept: tuple[tuple[int, int], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def read(self, key: Key) -> bytes:
        """Return the encoded image in a row."""
        file, group, row = key
        if self._kept is None or self._kept[0] != (file, group):
            self._kept = None  # free the memory first
            try:
                self._kept = (file, group), _Table(self._paths[file]).column(group, self._column)
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are of these kinds
                raise Unreadable(one_line(error)) from None
        value = self._kept[1][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
        if isinstance(value, dict) and value.get("path"):
            raise Unreadable("the table has the path of a file instead of the image; save it with the images")
        raise Unreadable("the table has no image in this row")


def holds_tables(path: Path) -> bool:
    """Return whether `path` is a parquet file, a folder with some, or a folder of save_to_disk."""
    if path.is_file():
        return path.suffix == ".parquet"
    saved = (path / _STATE_FILE).is_file() and (path / _INFO_FILE).is_file()
    return saved or (path / _SPLITS_FILE).is_file() or bool(_parquet_files(path))


def open_tables(path: Path, *, split: str | None, choice: LabelChoice) -> Source:
    """Open the tables at `path`; images come in the order of files and rows."""
    _pyarrow()
    folder, files = _find_files(path, split)
    if not files:
        raise ConfigError(f"--source={path} holds no images; it has no tables")
    names: list[str] = []
    keys: list[Key] = []
    values: list[Any] = []
    try:
        schema = _Table(files[0]).schema
        features = _features(schema)
        image = _image_column(schema, features, path)
        label = None if choice.leave_out else _label_column(features, schema.names, choice.column, path)
        for number, file in enumerate(files):
            table = _Table(file)
            name = file.relative_to(folder).as_posix()
            names.extend(f"{name}[{row}]" for row in range(sum(table.group_sizes)))
            for group, size in enumerate(table.group_sizes):
                keys.extend((number, group, row) for row in range(size))
                if label is not None:
                    values.extend(table.column(group, label).to_pylist())
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are of these kinds
        pointers = [file for file in files if is_lfs_pointer(file)]
        reason = f"{pointers[0].name}: {POINTER_HINT}" if pointers else one_line(error)
        raise ConfigError(f"--source={path} has no readable tables: {reason}") from None
    if not names:
        raise ConfigError(f"--source={path} holds no images; its tables have no rows")
    classes = features.get(label, {}).get("names") if label is not None else None
    labels = None if label is None else check_labels(names, values, f"{path}: column '{label}'", classes=classes)
    return Source.of(path=path, names=names, keys=keys, reader=TableReader(files, image), labels=labels)


def _find_files(path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the tables of the split in their order."""
    if path.is_file():
        return path.parent, [path]
    if (path / _SPLITS_FILE).is_file():
        splits = _read_json(path / _SPLITS_FILE).get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
            raise ConfigError(f"{path / _SPLITS_FILE} must list the splits")
        require_inside(splits, str(path / _SPLITS_FILE))
        path = path / choose_split(path, splits, split)
    if (path / _STATE_FILE).is_file():
        entries = _read_json(path / _STATE_FILE).get("_data_files")
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
    """Parquet files in the folder and in its usual subfolders; searching all of a million images would take long."""
    folders = [path, *(path / name for name in ("data", *SPLIT_OF))]
    files = (file for folder in folders for file in folder.glob("*.parquet"))
    return sorted(file for file in files if not file.name.startswith(".") and file.is_file())


def _split_of(file: Path) -> str:
    """The split in the name of a parquet file, as in data/train-00000-of-00004.parquet; '' if it has none."""
    words = [*reversed(file.parts[:-1]), file.stem.split("-")[0].split(".")[0]]
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a JSON object")
    return content


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Descriptions of the columns that `datasets` stores in a table; empty for tables of other programs."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)}


def _image_column(schema: Any, features: dict[str, dict[str, Any]], path: Path) -> str:
    types = _pyarrow().types
    columns = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    if not columns:
        binary = (types.is_binary, types.is_large_binary, types.is_struct)
        columns = [field.name for field in schema if any(is_kind(field.type) for is_kind in binary)]
    if len(columns) != 1:
        raise ConfigError(
            f"{path} has {len(columns)} columns of images among {', '.join(schema.names)}; it must have one"
        )
    return columns[0]


def _label_column(features: dict[str, Any], columns: list[str], label: str | None, path: Path) -> str | None:
    if label is not None:
        if label not in columns:
            meant = did_you_mean(label, columns)
            raise ConfigError(f"{path} has no column '{label}'; choose one by --label={'|'.join(columns)}{meant}")
        return label
    usual = [name for name in LABEL_COLUMNS if name in columns]
    classes = [name for name in columns if features.get(name, {}).get("_type") == "ClassLabel"]
    if usual:
        return usual[0]
    if len(classes) > 1:
        raise ConfigError(f"{path} has {len(classes)} kinds of labels; choose one by --label={'|'.join(classes)}")
    return classes[0] if classes else None


def _pyarrow(module: str = "") -> Any:
    return import_optional(f"pyarrow{module}", "Hugging Face data sets")
