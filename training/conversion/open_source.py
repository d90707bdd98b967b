"""Opening of an image source: the choice among its kinds, and folders and ZIP files of images.

A source is a sorted list of images with their labels. Pixels are read later, in the workers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from dnnlib.errors import ConfigError
from training.conversion import array_sources, packed_sources, table_sources
from training.conversion.image_source import Source
from training.dataset.item_files import ZipFiles, open_files
from training.dataset.label_file import LABELS_FILE, Label, read_file_labels, require_inside
from training.images.decode import is_image


def open_source(path: Path, *, split: str | None = None, label: str | None = None) -> Source:
    """Open the images at `path`. The files there decide on its kind; docs/datasets.md lists the kinds.

    `split` chooses among the parts of a set that has several, such as train and test; `label` among several kinds of
    labels. Raises ConfigError for an unknown kind, without images, or with unusable labels.
    """
    if not path.exists():
        if any(sign in path.name for sign in "*?[") or path.suffix == ".zip":
            return _open_files_source(path)
        raise ConfigError(f"--source={path} does not exist")
    kinds: list[tuple[Callable[[Path], bool], Callable[[], Source]]] = [
        (array_sources.holds_mnist, lambda: array_sources.open_mnist(path, split=split)),
        (array_sources.holds_cifar, lambda: array_sources.open_cifar(path, split=split, label=label)),
        (packed_sources.holds_lmdb, lambda: packed_sources.open_lmdb(path)),
        (table_sources.holds_tables, lambda: table_sources.open_tables(path, split=split, label=label)),
        (packed_sources.holds_tars, lambda: packed_sources.open_tars(path)),
    ]
    for holds, opened in kinds:
        if holds(path):
            return opened()
    if path.is_file() and is_image(path.name):
        raise ConfigError(f"--source={path} is a single image; give the folder that it is in")
    return _open_files_source(path)


def _open_files_source(path: Path) -> Source:
    files = open_files(path)
    for part in files.parts:
        if isinstance(part, ZipFiles):
            require_inside(part.names, str(part.path))
    rows = [row for row, name in enumerate(files.names) if is_image(name)]
    names = [files.names[row] for row in rows]
    if not names:
        count = len(files.names)
        raise ConfigError(f"--source={path} holds no images; it {f'has {count} other files' if count else 'is empty'}")
    classes = None
    if any(part.names.find(LABELS_FILE) is not None for part in files.parts):
        labels: Sequence[Label] | None = read_file_labels(files, names)
    else:
        labels, classes = _folder_labels(names, path)
    return Source(path=path, names=names, keys=rows, reader=files, labels=labels, classes=classes)


def _folder_labels(names: Sequence[str], path: Path) -> tuple[list[Label] | None, list[str] | None]:
    """Class indices by the top-level folders of `names` in sorted order, and these folders; None for a single one."""
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    if len(classes) < 2:
        return None, None
    outside = [name for name in names if "/" not in name]
    if outside:
        raise ConfigError(
            f"{path} has {len(classes)} class folders, and {len(outside)} images outside of them without a label, "
            f"first {outside[0]}; move them into a class, or add a {LABELS_FILE}"
        )
    index = {name: number for number, name in enumerate(classes)}
    return [index[name.split("/")[0]] for name in names], classes
