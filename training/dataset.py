"""Images or raw latents with labels, out of a folder or a ZIP file.

N items, C channels, H x W pixels. The layout is that of dataset_tool.py: files in sorted order of their path, and
`dataset.json` with `{"labels": [[file, label], ...]}`, where a label is a class index or a vector.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from dnnlib.errors import ConfigError
from training.dataset_files import FolderFiles, ZipFiles, one_line, open_files
from training.dataset_items import CONVERT_HINT, Shape, check_header, decode, is_item, is_latents, read_shape

LABELS_FILE = "dataset.json"
MAX_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ItemDetails:
    """Where an item of a data set comes from."""

    raw_idx: int  # index among all images of the data set, before max_size and xflip
    xflip: bool  # whether the item is the mirrored copy
    raw_label: np.ndarray  # as stored: a class index (int64, no axes) or a vector (float32)


class ImageFolderDataset(torch.utils.data.Dataset[tuple[np.ndarray, np.ndarray]]):
    """The images or raw latents under `path`; item i is (array [C, H, W], label [label_dim]).

    Arrays are uint8 for pictures (grey ones have one channel) and float32 for .npy files, contiguous and the caller's
    own. Labels are float32; class indices come one-hot, as wide as the largest index + 1; without labels label_dim is
    0. Opening reads the list of files, the labels and the header of the first file, and decodes no pixels: a file
    that is damaged or differs from the first is found when it is read. Mistakes raise ConfigError and name the file.

    Safe to share with DataLoader workers, forked or spawned, and with threads.

    path:        folder or ZIP file.
    resolution:  the image size that the data set must have; None accepts any.
    use_labels:  whether to read the labels; a data set that has none gives label_dim 0 either way.
    max_size:    keep this many images, a choice that random_seed determines; None keeps all.
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
        self._names = _image_names(self._files)
        self._raw_labels: np.ndarray | None = None  # int64 [N] or float32 [N, label_dim]
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

        self.name = Path(os.path.abspath(path)).stem
        self.image_shape: Shape = read_shape(self._read(0), self._describe(0))
        _, height, width = self.image_shape
        if height != width:
            raise ConfigError(f"{self._describe(0)} is {width}x{height}; images must be square: {CONVERT_HINT}")
        if resolution is not None and height != resolution:
            raise ConfigError(f"{self._files.path} holds images of {width}x{height}, not {resolution}x{resolution}")

        if use_labels and LABELS_FILE in self._files.names:
            self._raw_labels = _load_labels(self._files, self._names)
        self._raw_idx, self._xflip = _choose(len(self._names), max_size, xflip, random_seed)

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which fills its own cache."""
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    def __len__(self) -> int:
        return len(self._raw_idx)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        raw_idx = int(self._raw_idx[idx])
        image = self._load(raw_idx)
        if self._xflip[idx]:
            image = image[:, :, ::-1]
        return image.copy(), self.get_label(idx)

    def get_label(self, idx: int) -> np.ndarray:
        """The label of item `idx` as the network takes it: float32 [label_dim], one-hot for class indices."""
        raw_idx = self._raw_idx[idx]
        if self._raw_labels is None:
            return np.zeros(0, dtype=np.float32)
        raw_label = self._raw_labels[raw_idx]
        if not self.has_onehot_labels:
            return np.array(raw_label)
        onehot = np.zeros(self.label_dim, dtype=np.float32)
        onehot[raw_label] = 1
        return onehot

    def get_details(self, idx: int) -> ItemDetails:
        """Which stored image item `idx` is, whether it is mirrored, and its label as stored."""
        raw_idx = int(self._raw_idx[idx])
        raw_label = np.zeros(0, dtype=np.float32) if self._raw_labels is None else self._raw_labels[raw_idx]
        return ItemDetails(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=np.array(raw_label))

    def check_headers(self, max_items: int = 10_000) -> None:
        """Look at the headers of all items, or of `max_items` spread evenly over a larger data set.

        Raises ConfigError for the first that cannot be read or has another size than the rest.
        """
        for idx in np.linspace(0, len(self._names) - 1, min(len(self._names), max_items)).astype(int):
            check_header(self._read(idx), self._describe(idx), self.image_shape, self._names[0])

    def keep_items(self) -> None:
        """Keep decoded items in memory from now on, as `cache=True` does."""
        if self._cache is None:
            self._cache = {}

    def close(self) -> None:
        """Close the ZIP file; reading again opens it again."""
        self._files.close()

    @property
    def num_channels(self) -> int:
        """Channels of the stored arrays: 1 for grey images, 3 for colour, 8 for the usual raw latents."""
        return self.image_shape[0]

    @property
    def holds_latents(self) -> bool:
        """Whether the items are raw latents (.npy files) and not pictures."""
        return is_latents(self._names[0])

    @property
    def resolution(self) -> int:
        """Height and width of the stored arrays."""
        return self.image_shape[1]

    @property
    def label_shape(self) -> list[int]:
        """Shape of one label, `[label_dim]`."""
        if self._raw_labels is None:
            return [0]
        return [int(self._raw_labels.max()) + 1] if self.has_onehot_labels else [self._raw_labels.shape[1]]

    @property
    def label_dim(self) -> int:
        """Length of one label, taken over the whole data set, whatever max_size is; 0 without labels."""
        return self.label_shape[0]

    @property
    def has_labels(self) -> bool:
        """Whether items have labels."""
        return self.label_dim != 0

    @property
    def has_onehot_labels(self) -> bool:
        """Whether the labels are class indices."""
        return self._raw_labels is not None and self._raw_labels.dtype == np.int64

    def _describe(self, raw_idx: int) -> str:
        return f"{self._files.path}: {self._names[raw_idx]}"

    def _read(self, raw_idx: int) -> bytes:
        return self._files.read(self._names[raw_idx])

    def _load(self, raw_idx: int) -> np.ndarray:
        """The stored array [C, H, W], which the caller must not change."""
        if self._cache is not None and raw_idx in self._cache:
            return self._cache[raw_idx]
        data, where = self._read(raw_idx), self._describe(raw_idx)
        image = decode(data, where, self.image_shape, self._names[0])
        if self._cache is not None:
            self._cache[raw_idx] = image
        return image


def _image_names(files: FolderFiles | ZipFiles) -> list[str]:
    """The images or latents among the files, sorted; ConfigError when there are none, or both."""
    names = sorted(name for name in files.names if is_item(name))
    if not names:
        raise ConfigError(f"data set {files.path} holds no images; it has {len(files.names)} other files")
    latents = [name for name in names if is_latents(name)]
    if latents and len(latents) != len(names):
        raise ConfigError(
            f"data set {files.path} mixes {len(latents)} .npy files and {len(names) - len(latents)} pictures; "
            f"give a data set of one kind"
        )
    return names


def _load_labels(files: FolderFiles | ZipFiles, names: list[str]) -> np.ndarray | None:
    """Labels of the images in the order of `names`: int64 [N] or float32 [N, label_dim]; None if the file has none."""
    where = f"{files.path}: {LABELS_FILE}"
    try:
        content = json.loads(files.read(LABELS_FILE).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {one_line(error)}") from None
    entries = content.get("labels") if isinstance(content, dict) else content
    if entries is None:
        return None
    if not isinstance(entries, list) or not isinstance(content, dict):
        raise ConfigError(f'{where} must read {{"labels": [[file, label], ...]}} or {{"labels": null}}')
    try:
        by_name = {str(name).replace("\\", "/"): label for name, label in entries}
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must list pairs of a file and its label") from None
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ConfigError(
            f"{where} has no label for {len(missing)} of {len(names)} images, first {missing[0]}; label all or none"
        )
    return _labels_array(((name, by_name[name]) for name in names), where)


def _labels_array(labels: Iterable[tuple[str, Any]], where: str) -> np.ndarray:
    rows: list[Any] = []
    width: int | None = None  # of the first label: a vector's length, or 0 for a class index
    for name, label in labels:
        kind = _label_width(label)
        if kind is None:
            raise ConfigError(
                f"{where}: the label of {name} is {_shorten(label)}; a label is a class index from 0 to "
                f"{MAX_CLASSES - 1} or a list of finite numbers"
            )
        if width is not None and kind != width:
            raise ConfigError(
                f"{where} mixes kinds of labels: {_kind(kind)} for {name}, {_kind(width)} for the images before it"
            )
        width = kind
        rows.append(label)
    return np.array(rows, dtype=np.float32 if width else np.int64)


def _label_width(label: Any) -> int | None:
    """0 for a class index, the length of a vector, None for what is neither."""
    if type(label) is int:
        return 0 if 0 <= label < MAX_CLASSES else None
    if isinstance(label, list) and label and all(type(x) in (int, float) and math.isfinite(x) for x in label):
        return len(label)
    return None


def _kind(width: int) -> str:
    return f"a vector of {width}" if width else "a class index"


def _choose(count: int, max_size: int | None, xflip: bool, random_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the stored images that make up the data set, and which of them are mirrored."""
    raw_idx = np.arange(count, dtype=np.int64)
    if max_size is not None:
        if max_size < 1:
            raise ConfigError(f"max_size={max_size} keeps no images; give 1 or more")
        if max_size < count:
            np.random.RandomState(random_seed % (1 << 31)).shuffle(raw_idx)
            raw_idx = np.sort(raw_idx[:max_size])
    mirrored = np.zeros(len(raw_idx), dtype=bool)
    if xflip:
        return np.tile(raw_idx, 2), np.concatenate([mirrored, ~mirrored])
    return raw_idx, mirrored


def _shorten(value: Any, length: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."
