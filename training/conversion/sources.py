"""What pictures can be made into a data set from: one function for each kind, and the choice between them.

A source is a sorted list of pictures with their labels; pixels are read later, in the workers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from dnnlib.errors import ConfigError
from training.conversion import sources_arrays, sources_lmdb, sources_tables, sources_tar
from training.conversion.image_source import Source
from training.dataset.item_files import ZipFiles, open_files
from training.dataset.label_file import LABELS_FILE, Label, read_file_labels, require_inside
from training.images.decode import SUFFIXES


def open_source(path: Path, *, split: str | None = None, label: str | None = None) -> Source:
    """The pictures at `path`, whose kind shows in the files there; docs/datasets.md has the list.

    `split` chooses among the parts of a set that has several, such as train and test; `label` among several kinds of
    labels. Raises ConfigError for what is none of the kinds, holds no pictures or has unusable labels.
    """
    if not path.exists():
        if any(sign in path.name for sign in "*?[") or path.suffix == ".zip":
            return files_source(path)
        raise ConfigError(f"--source={path} does not exist")
    choices: list[tuple[Callable[[Path], bool], Callable[[], Source]]] = [
        (sources_arrays.holds_mnist, lambda: sources_arrays.mnist_source(path, split=split)),
        (sources_arrays.holds_cifar, lambda: sources_arrays.cifar_source(path, split=split, label=label)),
        (sources_lmdb.holds_lmdb, lambda: sources_lmdb.lmdb_source(path)),
        (sources_tables.holds_tables, lambda: sources_tables.tables_source(path, split=split, label=label)),
        (sources_tar.holds_tars, lambda: sources_tar.tar_source(path)),
    ]
    for holds, opened in choices:
        if holds(path):
            return opened()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        raise ConfigError(f"--source={path} is a single picture; give the folder that it is in")
    return files_source(path)


def files_source(path: Path) -> Source:
    """Pictures in a folder, at any depth, or in a ZIP file or shards of one."""
    files = open_files(path)
    for part in files.parts:
        if isinstance(part, ZipFiles):
            require_inside(part.names, str(part.path))
    rows = [row for row, name in enumerate(files.names) if _is_picture(name)]
    names = [files.names[row] for row in rows]
    if not names:
        count = len(files.names)
        raise ConfigError(f"--source={path} holds no images; it {f'has {count} other files' if count else 'is empty'}")
    classes = None
    if any(part.names.find(LABELS_FILE) is not None for part in files.parts):
        labels: Sequence[Label] | None = read_file_labels(files, names)
    else:
        labels, classes = folder_labels(names, path)
    return Source(path=path, names=names, keys=rows, reader=files, labels=labels, classes=classes)


def folder_labels(names: Sequence[str], path: Path) -> tuple[list[Label] | None, list[str] | None]:
    """Class indices after the top-level folders of `names` in sorted order, and the folders; None if there is one."""
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    if len(classes) < 2:
        return None, None
    outside = [name for name in names if "/" not in name]
    if outside:
        raise ConfigError(
            f"{path} has {len(classes)} class folders, and {len(outside)} images outside of them that have no label, "
            f"first {outside[0]}; move them into a class, or add a {LABELS_FILE}"
        )
    index = {name: number for number, name in enumerate(classes)}
    return [index[name.split("/")[0]] for name in names], classes


def _is_picture(name: str) -> bool:
    # Archives made by file managers carry previews and resource forks under such names.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and Path(name).suffix.lower() in SUFFIXES
