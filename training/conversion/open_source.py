"""Opening of an image source: the choice among its kinds, and folders and ZIP files of images.

A source is a sorted list of images with their labels. Pixels are read later, in the workers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dnnlib.disk import require_plain
from dnnlib.errors import ConfigError
from dnnlib.lfs import POINTER_HINT, is_lfs_pointer
from training.conversion import array_sources, packed_sources, table_sources
from training.conversion.class_folders import LabelChoice, find_labels
from training.conversion.image_source import Source
from training.conversion.unpacked_tar import OTHER_TAR_SUFFIXES
from training.dataset.item_files import ZipFiles, open_files
from training.dataset.label_file import require_inside
from training.dataset.sample_array import holds_array
from training.images.decode import is_image


def open_source(
    path: Path,
    *,
    split: str | None = None,
    label: str | None = None,
    label_level: int | None = None,
    no_labels: bool = False,
) -> Source:
    """Open the images at `path`. The files there decide on its kind; docs/datasets.md lists the kinds.

    `split` chooses among the parts of a set that has several, such as train and test; `label` among several kinds of
    labels; `label_level` takes the names of folders. Raises ConfigError for an unknown kind, without images, with
    unusable labels, or if the source has no such choice.
    """
    choice = LabelChoice(column=label, level=label_level, leave_out=no_labels)
    if not path.exists() and not any(sign in path.name for sign in "*?[") and path.suffix.lower() != ".zip":
        raise ConfigError(f"--source={path} does not exist")
    require_plain(path)
    if path.name.lower().endswith(OTHER_TAR_SUFFIXES):
        raise ConfigError(f"--source={path} is compressed in a way that is not read; unpack it, or pack it as .tar.gz")
    if is_lfs_pointer(path):
        raise ConfigError(f"--source={path} cannot be read: {POINTER_HINT}")
    one, two = "--split --label", "--label --label-level"  # options of several kinds
    kinds: list[tuple[Callable[[Path], bool], Callable[[], Source], str]] = [
        (array_sources.holds_mnist, lambda: array_sources.open_mnist(path, split=split, choice=choice), "--split"),
        (array_sources.holds_cifar, lambda: array_sources.open_cifar(path, split=split, label=label), one),
        (packed_sources.holds_lmdb, lambda: packed_sources.open_lmdb(path), ""),
        (table_sources.holds_tables, lambda: table_sources.open_tables(path, split=split, choice=choice), one),
        (holds_array, lambda: array_sources.open_samples(path), ""),
        (packed_sources.holds_tars, lambda: packed_sources.open_tars(path, choice), two),
        (lambda path: True, lambda: _open_files_source(path, choice), two),
    ]
    _, opened, options = next(kind for kind in kinds if kind[0](path)) if path.exists() else kinds[-1]
    for option, value in (("--split", split), ("--label", label), ("--label-level", label_level)):
        if value is not None and option not in options.split():
            part = f"; --source={path}/{value} takes a folder of it" if option == "--split" and path.is_dir() else ""
            raise ConfigError(f"{option}={value} is not an option for the kind of source that {path} is{part}")
    if path.is_file() and is_image(path.name):
        raise ConfigError(f"--source={path} is a single image; give the folder that it is in")
    source = opened()
    return replace(source, labels=None, classes=None, notes=()) if no_labels else source


def _open_files_source(path: Path, choice: LabelChoice) -> Source:
    files = open_files(path)
    for part in files.parts:
        if isinstance(part, ZipFiles):
            require_inside(part.names, str(part.path))
    rows = [row for row, name in enumerate(files.names) if is_image(name)]
    names = [files.names[row] for row in rows]
    if not names:
        count = len(files.names)
        raise ConfigError(f"--source={path} holds no images; it {f'has {count} other files' if count else 'is empty'}")
    parts = [(part, [name for name in part.names if is_image(name)]) for part in files.parts]
    found = find_labels(path, parts, choice)
    labels = found.labels
    if labels is not None and len(parts) > 1:  # images are sorted over all shards
        order = sorted(range(len(names)), key=[name for _, part_names in parts for name in part_names].__getitem__)
        labels = replace(labels, values=[labels.values[position] for position in order])
    return Source.of(path=path, names=names, keys=rows, reader=files, labels=labels, notes=found.notes)
