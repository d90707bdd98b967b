"""Images or raw latents with labels, out of a folder or a ZIP file.

N items, C channels, H x W pixels. The layout is that of dataset_tool.py: files in sorted order of their path, and
`dataset.json` with `{"labels": [[file, label], ...]}`, where a label is a class index or a vector.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from dnnlib.errors import ConfigError
from training.dataset.item_files import Files, FolderFiles, one_line, open_files
from training.dataset.items import CONVERT_HINT, ItemDecoder, is_item, is_latents
from training.dataset.label_file import LABELS_FILE, labels_array, read_file_labels, require_all_shards, require_inside


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

    Safe to share with DataLoader workers, forked or spawned, and with threads. `read_batch` and `BatchReader` give many
    items at once, which is faster.

    path:        folder, ZIP file, or shards name-00000.zip, name-00001.zip, ..., to be given as name.zip, as name-*.zip
                 or as a folder that holds nothing else.
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
        require_all_shards(self._files)
        self._rows = _item_rows(self._files)  # the items among the files, in the order of their names
        self._raw_labels: np.ndarray | None = None  # int64 [N] or float32 [N, label_dim]
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

        self.name = Path(os.path.abspath(path)).stem
        self._decoder = ItemDecoder(self._read(0), self._describe(0))
        self.image_shape = self._decoder.shape
        _, height, width = self.image_shape
        if height != width:
            raise ConfigError(f"{self._describe(0)} is {width}x{height}; images must be square: {CONVERT_HINT}")
        if resolution is not None and height != resolution:
            raise ConfigError(f"{self._files.path} holds images of {width}x{height}, not {resolution}x{resolution}")

        if use_labels:
            labels = read_file_labels(self._files, [self._files.names[row] for row in self._rows])
            self._raw_labels = None if labels is None else labels_array(labels)
        self._label_dim = _width(self._raw_labels)
        self._raw_idx, self._xflip = _choose(len(self._rows), max_size, xflip, random_seed)

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which fills its own cache."""
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    def __len__(self) -> int:
        return len(self._raw_idx)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._load(int(self._raw_idx[idx]))
        if self._xflip[idx]:
            image = image[:, :, ::-1]
        return image.copy(order="C"), self.get_label(idx)

    def read_batch(self, indices: Sequence[int], out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Items `indices` as one array [N, C, H, W], each copied once, and their labels [N, label_dim].

        `out` is such an array to use, uint8 for pictures and float32 for latents.
        """
        if out is None:
            out = np.empty((len(indices), *self.image_shape), dtype=self.image_dtype)
        for place, idx in zip(out, indices, strict=True):
            image = self._load(int(self._raw_idx[idx]))
            np.copyto(place, image[:, :, ::-1] if self._xflip[idx] else image)
        return out, self._labels(np.asarray(indices, dtype=np.int64))

    def get_label(self, idx: int) -> np.ndarray:
        """The label of item `idx` as the network takes it: float32 [label_dim], one-hot for class indices."""
        return self._labels(np.array([idx]))[0]

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        if self._raw_labels is None:
            return np.zeros((len(indices), 0), dtype=np.float32)
        raw_labels = self._raw_labels[self._raw_idx[indices]]
        if not self.has_onehot_labels:
            return raw_labels
        onehot = np.zeros((len(indices), self.label_dim), dtype=np.float32)
        onehot[np.arange(len(indices)), raw_labels] = 1
        return onehot

    def item_labels(self) -> np.ndarray:
        """The label of every item, as stored: class indices int64 [N], or vectors float32 [N, label_dim]."""
        assert self._raw_labels is not None
        labels: np.ndarray = self._raw_labels[self._raw_idx]
        return labels

    def get_details(self, idx: int) -> ItemDetails:
        """Which stored image item `idx` is, whether it is mirrored, and its label as stored."""
        raw_idx = int(self._raw_idx[idx])
        raw_label = np.zeros(0, dtype=np.float32) if self._raw_labels is None else self._raw_labels[raw_idx]
        return ItemDetails(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=np.array(raw_label))

    def check_headers(self, max_items: int = 10_000) -> None:
        """Look at the headers of all items, or of `max_items` spread evenly over a larger data set.

        Raises ConfigError for the first that cannot be read or has another size than the rest.
        """
        for raw_idx in np.linspace(0, len(self._rows) - 1, min(len(self._rows), max_items)).astype(int):
            self._decoder.check(self._read(raw_idx), self._describe(raw_idx))

    def fingerprint(self) -> int:
        """A number that is another one, most likely, for other files: of archives by content, of folders by names."""
        return self._files.fingerprint()

    def labels_fingerprint(self) -> int:
        """A number that is another one, most likely, for other labels."""
        return 0 if self._raw_labels is None else zlib.crc32(self._raw_labels.tobytes())

    def keep_items(self) -> None:
        """Keep decoded items in memory from now on, as `cache=True` does."""
        if self._cache is None:
            self._cache = {}

    def close(self) -> None:
        """Let go of the ZIP files; reading again opens them again."""
        self._files.close()

    @property
    def num_channels(self) -> int:
        """Channels of the stored arrays: 1 for grey images, 3 for colour, 8 for the usual raw latents."""
        return self.image_shape[0]

    @property
    def holds_latents(self) -> bool:
        """Whether the items are raw latents (.npy files) and not pictures."""
        return self._decoder.latents

    @property
    def encoder_entry(self) -> dict[str, Any] | None:
        """What dataset.json says of the encoder that made the latents; None if nothing. Shards must agree."""
        found = self._noted("encoder", dict)
        if any(entry != found[0] for entry in found):
            raise ConfigError(f"the shards of {self._files.path} were encoded in different ways; encode them alike")
        return found[0] if found else None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices, as dataset.json lists them; None where it does not."""
        found = self._noted("classes", list)
        return [str(name) for name in found[0]] if found else None

    def _noted(self, key: str, kind: type) -> list[Any]:
        """What the dataset.json of each part says under `key`, where it says something."""
        found = []
        for part in self._files.parts:
            row = part.names.find(LABELS_FILE)
            value = None if row is None else _noted(bytes(part.read(row)), key, kind, part.describe(row))
            found.extend([] if value is None else [value])
        return found

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """float32 for raw latents, uint8 for pictures."""
        return np.dtype(np.float32 if self.holds_latents else np.uint8)

    @property
    def resolution(self) -> int:
        """Height and width of the stored arrays."""
        return self.image_shape[1]

    @property
    def label_shape(self) -> list[int]:
        """Shape of one label, `[label_dim]`."""
        return [self.label_dim]

    @property
    def label_dim(self) -> int:
        """Length of one label, taken over the whole data set, whatever max_size is; 0 without labels."""
        return self._label_dim

    @property
    def has_labels(self) -> bool:
        """Whether items have labels."""
        return self.label_dim != 0

    @property
    def has_onehot_labels(self) -> bool:
        """Whether the labels are class indices."""
        return self._raw_labels is not None and self._raw_labels.dtype == np.int64

    def _describe(self, raw_idx: int) -> str:
        return self._files.describe(int(self._rows[raw_idx]))

    def _read(self, raw_idx: int) -> Any:
        return self._files.read(int(self._rows[raw_idx]))

    def _load(self, raw_idx: int) -> np.ndarray:
        """The stored array [C, H, W], which the caller must not change; possibly a view of the file."""
        if self._cache is not None and raw_idx in self._cache:
            return self._cache[raw_idx]
        image = self._decoder.decode(self._read(raw_idx), lambda: self._describe(raw_idx))
        if self._cache is not None:
            image = self._cache[raw_idx] = np.ascontiguousarray(image)
        return image


class BatchReader(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set of batches, for a DataLoader with `batch_size=None` and a sampler of index lists.

    A batch is put together where it is read: in a worker it lies in shared memory, and is not copied again.
    """

    def __init__(self, dataset: ImageFolderDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [N, C, H, W] and labels [N, label_dim] of the items `indices`."""
        dtype = torch.float32 if self.dataset.holds_latents else torch.uint8
        images = torch.empty((len(indices), *self.dataset.image_shape), dtype=dtype)
        if torch.utils.data.get_worker_info() is not None:
            images.share_memory_()
        _, labels = self.dataset.read_batch(indices, out=images.numpy())
        return images, torch.from_numpy(labels)


def _item_rows(files: Files) -> np.ndarray:
    """Rows of the images or latents among the files, int64; ConfigError when there are none, or both, or where a name
    in an archive leads out of it."""
    if not isinstance(files, FolderFiles):
        require_inside(files.names, str(files.path))
    rows, num_latents = [], 0
    for row, name in enumerate(files.names):
        if is_item(name):
            rows.append(row)
            num_latents += is_latents(name)
    if not rows:
        raise ConfigError(f"data set {files.path} holds no images; it has {len(files.names)} other files")
    if num_latents not in (0, len(rows)):
        raise ConfigError(
            f"data set {files.path} mixes {num_latents} .npy files and {len(rows) - num_latents} pictures; "
            f"give a data set of one kind"
        )
    return np.array(rows, dtype=np.int64)


def _noted(data: bytes, key: str, kind: type, where: str) -> Any:
    """The value of `key`, of this `kind`, in the text of a dataset.json; None where it has none."""
    if f'"{key}"'.encode() not in data:
        return None
    try:
        value = json.loads(data.decode("utf-8")).get(key)
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{where} is not JSON: {one_line(error)}") from None
    if not isinstance(value, kind | None):
        name = "list" if kind is list else "dictionary"
        raise ConfigError(f'{where} has a value of "{key}" that is no {name}; leave it out or make the data set anew')
    return value


def _width(raw_labels: np.ndarray | None) -> int:
    """Length of a label as the network takes it."""
    if raw_labels is None:
        return 0
    return int(raw_labels.max()) + 1 if raw_labels.dtype == np.int64 else raw_labels.shape[1]


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
