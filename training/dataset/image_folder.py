"""Images or raw latents with labels, from a folder or a ZIP file.

N items, C channels, H x W pixels. The layout is that of dataset_tool.py: files in sorted order of their path, and
`dataset.json` with `{"labels": [[file, label], ...]}`, where a label is a class index, a class name or a vector.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import ConfigError
from training.dataset.contract import ImageDataset
from training.dataset.item_files import Files, FolderFiles, open_files
from training.dataset.items import ItemDecoder, is_item, read_shape, require_one_kind
from training.dataset.label_file import (
    LABELS_FILE,
    labels_array,
    read_file_labels,
    read_value,
    require_all_shards,
    require_inside,
)


class ImageFolderDataset(ImageDataset):
    """The images or raw latents under `path`; item i is (array [C, H, W], label [label_dim]). See ImageDataset.

    Opening reads the list of files, the labels and the header of the first file, and decodes no pixels. A file that is
    damaged or differs from the first raises ConfigError, with its name, when it is read. `read_batch` and `BatchReader`
    return many items at once, which is faster.

    path:        folder, ZIP file, or shards name-00000.zip, name-00001.zip, ..., named by name.zip, by name-*.zip or by
                 a folder that holds nothing else.
    resolution:  the required image size; None accepts any.
    use_labels:  whether to read the labels. Without labels, label_dim is 0 either way.
    max_size:    number of images to keep, a choice that random_seed determines; None keeps all.
    xflip:       append a mirrored copy of every image after all of them.
    cache:       keep the decoded images in memory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolution: int | None = None,
        use_labels: bool = True,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = False,
    ) -> None:
        self._files = open_files(Path(path))
        require_all_shards(self._files)
        self._rows = _item_rows(self._files)  # the items among the files, in the order of their names
        first = self._describe(0)
        decoder = ItemDecoder(read_shape(self._read(0), first), first)
        labels = None
        if use_labels:
            labels = read_file_labels(self._files, [self._files.names[row] for row in self._rows])
        raw_idx = _choose(len(self._rows), max_size, random_seed)
        super().__init__(
            name=Path(os.path.abspath(path)).stem,
            decoder=decoder,
            raw_labels=None if labels is None else labels_array(labels.values),
            class_names=None if labels is None else labels.classes,
            num_images=len(self._rows) if raw_idx is None else len(raw_idx),
            raw_idx=raw_idx,
            xflip=xflip,
        )
        size = self.resolution
        if resolution is not None and size != resolution:
            raise ConfigError(f"{self._files.path} holds images of {size}x{size}, not {resolution}x{resolution}")
        if cache:
            self.keep_items()

    def check_headers(self, max_items: int = 10_000) -> None:
        """See ImageDataset."""
        for raw_idx in np.linspace(0, len(self._rows) - 1, min(len(self._rows), max_items)).astype(int):
            self._decoder.check(self._read(raw_idx), self._describe(raw_idx))

    def fingerprint(self) -> int:
        """Return a number that almost certainly differs for other contents of archives, or other names in folders."""
        return self._files.fingerprint()

    def items_fingerprint(self) -> int:
        """Return a number that almost certainly differs for other contents of the items, wherever they lie."""
        return zlib.crc32(self._files.checksums(self._rows).tobytes())

    def close(self) -> None:
        """Release the ZIP files; the next read opens them again."""
        self._files.close()

    @property
    def encoder_entry(self) -> dict[str, Any] | None:
        """Description in dataset.json of the encoder that made the latents; None if missing. Shards must agree."""
        found = self._values("encoder", dict)
        if any(entry != found[0] for entry in found):
            raise ConfigError(f"the shards of {self._files.path} were encoded in different ways; encode them alike")
        return found[0] if found else None

    def _values(self, key: str, kind: type) -> list[Any]:
        rows = [(part, part.names.find(LABELS_FILE)) for part in self._files.parts]
        values = [read_value(p.read(row), key, kind, p.describe(row)) for p, row in rows if row is not None]
        return [value for value in values if value is not None]

    def _describe(self, raw_idx: int) -> str:
        return self._files.describe(int(self._rows[raw_idx]))

    def _read(self, raw_idx: int) -> Any:
        return self._files.read(int(self._rows[raw_idx]))


def _item_rows(files: Files) -> np.ndarray:
    """Return the rows of the items among the files, int64. Raises ConfigError if there are none, or of two kinds."""
    if not isinstance(files, FolderFiles):
        require_inside(files.names, str(files.path))
    rows = [row for row, name in enumerate(files.names) if is_item(name)]
    if not rows:
        raise ConfigError(f"data set {files.path} holds no images; it has {len(files.names)} other files")
    require_one_kind((files.names[row] for row in rows), f"data set {files.path}")
    return np.array(rows, dtype=np.int64)


def _choose(count: int, max_size: int | None, random_seed: int) -> np.ndarray | None:
    """Return the indices of the stored images in the data set, int64 [max_size]; None for all."""
    if max_size is not None and max_size < 1:
        raise ConfigError(f"max_size={max_size} keeps no images; give 1 or more")
    if max_size is None or max_size >= count:
        return None
    raw_idx = np.arange(count, dtype=np.int64)
    np.random.RandomState(random_seed % (1 << 31)).shuffle(raw_idx)
    return np.sort(raw_idx[:max_size])
