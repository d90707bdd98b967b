"""A data set of shards behind URLs, of which only those that are being read lie on the local disk.

`https://host/set.zip`, `https://host/set-{00000..00063}.tar`, `s3://bucket/set-*.zip`, `file:///mount/set-*.zip`: every
store that fsspec knows. Shards are ZIP files or tars, each a data set of its own (docs/datasets.md).
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.download import make_cache_dir_path
from dnnlib.errors import ConfigError
from training.dataset.balanced_order import BalancedOrder
from training.dataset.image_folder import ImageFolderDataset, ItemDetails
from training.dataset.item_files import ZipFiles
from training.dataset.items import CONVERT_HINT, ItemDecoder, is_item
from training.dataset.shard_order import StreamOrder, most_in_a_window
from training.run.streams import DataOrder, Order
from training.streaming.cache import ReadAhead, ShardCache
from training.streaming.remote import NotThere, RemoteFile, find_file, find_matches, is_remote, suffix_of
from training.streaming.shard_index import ShardIndex, index_shards, load_table, read_first, require_alike
from training.streaming.tar import TarFiles

__all__ = ["StreamedDataset", "data_order", "is_remote"]

_MAX_SHARDS = 100_000
_OPEN_SHARDS = 32  # at a time; or those of two windows, if they are more
_READ_ATTEMPTS = 4  # a shard may make room for others between being fetched and being opened


class StreamedDataset(ImageFolderDataset):
    """The images or raw latents in shards behind `url`, with the face of ImageFolderDataset.

    Opening reads the index of every shard, and nothing else of a ZIP file; see training/streaming/shard_index.py. Any
    item
    can be read, but for speed items are to be read in the order of `data_order`, which keeps their shards at hand.

    buffer:       images to shuffle over.
    cache_dir:    folder for shards and indices; None for the usual cache folder.
    cache_bytes:  what the shards there may take, in bytes.
    """

    def __init__(
        self,
        url: str,
        *,
        use_labels: bool = True,
        xflip: bool = False,
        buffer: int,
        cache_dir: str | None = None,
        cache_bytes: int,
    ) -> None:
        folder = Path(cache_dir or make_cache_dir_path("datasets"))
        self.url = url
        self.buffer = buffer
        self.copies = 2 if xflip else 1
        self.shard_cache = ShardCache(folder / "shards", cache_bytes)
        self._index_folder = folder / "index"
        try:
            shards = self._find_shards()
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}; give another --data-cache") from None
        require_alike(shards, url)
        self.shards: list[RemoteFile] = [shard.file for shard in shards]
        self.counts = np.array([shard.count for shard in shards], dtype=np.int64)
        self._ends: list[int] = np.cumsum(self.counts).tolist()
        self._require_space()

        first = next(shard for shard in shards if shard.count)
        self.name = self.shards[0].name.rpartition(".")[0]
        self._encoder_entry = first.encoder
        where = f"{first.file.url}: {first.first}"
        self._decoder = ItemDecoder(read_first(first, self._index_folder), where)
        self.image_shape = self._decoder.shape
        _, height, width = self.image_shape
        if height != width:
            raise ConfigError(f"{where} is {width}x{height}; images must be square: {CONVERT_HINT}")
        self._raw_labels = None
        if use_labels and first.labels is not None:
            self._raw_labels = np.concatenate([s.labels for s in shards if s.count and s.labels is not None])
        self._label_dim = 0
        if self._raw_labels is not None:
            indices = self._raw_labels.dtype == np.int64
            self._label_dim = int(self._raw_labels.max()) + 1 if indices else self._raw_labels.shape[1]

        self._cache = None
        self._opened: dict[int, tuple[ZipFiles | TarFiles, np.ndarray]] = {}  # the one used last comes last
        self._most_open = max(2 * most_in_a_window(np.ones(len(shards)), self.counts, buffer), _OPEN_SHARDS)

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which opens shards itself."""
        return {**super().__getstate__(), "_opened": {}}

    def __len__(self) -> int:
        return self.copies * self._ends[-1]

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.read_batch([idx])
        return images[0], labels[0]

    def read_batch(self, indices: Sequence[int], out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Items `indices` as one array [N, C, H, W], and their labels [N, label_dim]; as in the base class."""
        if out is None:
            out = np.empty((len(indices), *self.image_shape), dtype=self.image_dtype)
        for place, idx in zip(out, indices, strict=True):
            raw_idx, mirrored = self._source(idx)
            image = self._load(raw_idx)
            np.copyto(place, image[:, :, ::-1] if mirrored else image)
        return out, self._labels(np.asarray(indices, dtype=np.int64))

    def item_labels(self) -> np.ndarray:
        """The label of every item, as stored; as in the base class."""
        assert self._raw_labels is not None
        return np.concatenate([self._raw_labels] * self.copies)

    def get_details(self, idx: int) -> ItemDetails:
        """Which stored image item `idx` is, whether it is mirrored, and its label as stored."""
        raw_idx, mirrored = self._source(idx)
        raw_label = np.zeros(0, dtype=np.float32) if self._raw_labels is None else self._raw_labels[raw_idx]
        return ItemDetails(raw_idx=raw_idx, xflip=mirrored, raw_label=np.array(raw_label))

    def check_headers(self, max_items: int = 10_000) -> None:
        """Nothing more: the first item of every shard was looked at when the data set was opened."""

    def close(self) -> None:
        """Let go of the shards; reading again opens them again."""
        self._opened.clear()

    @property
    def encoder_entry(self) -> dict[str, Any] | None:
        """What dataset.json says of the encoder that made the latents; None if nothing."""
        return self._encoder_entry

    def _source(self, idx: int) -> tuple[int, bool]:
        """The stored image that item `idx` is, and whether it is mirrored."""
        num_items = len(self)
        if not -num_items <= idx < num_items:
            raise IndexError(f"item {idx} of {num_items}")
        copy, raw_idx = divmod(int(idx) % num_items, self._ends[-1])
        return raw_idx, copy == 1

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        if self._raw_labels is None:
            return np.zeros((len(indices), 0), dtype=np.float32)
        raw_labels = self._raw_labels[indices % self._ends[-1]]
        if not self.has_onehot_labels:
            return raw_labels
        onehot = np.zeros((len(indices), self.label_dim), dtype=np.float32)
        onehot[np.arange(len(indices)), raw_labels] = 1
        return onehot

    def _find_shards(self) -> list[ShardIndex]:
        urls = expand_url(self.url)
        if len(urls) == 1 and urls[0] == self.url and suffix_of(self.url) == ".zip":
            try:
                find_file(self.url)
            except NotThere:
                urls = self._numbered_shards()
        return index_shards(urls, self._index_folder, self.shard_cache)

    def _numbered_shards(self) -> list[str]:
        """name-00000.zip and so on for name.zip, as many as the first one says that there are."""
        head, _, tail = self.url.rpartition(".zip")
        first = f"{head}-00000.zip{tail}"
        try:
            number = index_shards([first], self._index_folder, self.shard_cache)[0].number
        except NotThere:
            raise ConfigError(f"{self.url} does not exist, nor does {first}; check the address") from None
        if number is None or not 0 < number[1] <= _MAX_SHARDS:
            raise ConfigError(f"{first} does not say how many shards there are; give {head}-{{00000..00063}}.zip{tail}")
        return [f"{head}-{i:05d}.zip{tail}" for i in range(number[1])]

    def _require_space(self) -> None:
        """Raise ConfigError unless any window that may come fits in the cache."""
        sizes = np.array([shard.size for shard in self.shards])
        needed = most_in_a_window(sizes, self.counts, self.buffer)
        if needed > self.shard_cache.limit:
            raise ConfigError(
                f"--shuffle-buffer={self.buffer} images lie in shards of up to {needed} bytes, more than "
                f"--data-cache-size={self.shard_cache.limit}; allow twice as much as that, to read ahead, or lower "
                f"--shuffle-buffer, or use smaller shards (dataset_tool.py convert --shard-size)"
            )

    def _locate(self, raw_idx: int) -> tuple[int, int]:
        """The shard that an image is in, and which of its images it is."""
        shard = bisect.bisect_right(self._ends, raw_idx)
        return shard, raw_idx - (self._ends[shard - 1] if shard else 0)

    def _describe(self, raw_idx: int) -> str:
        shard, row = self._locate(raw_idx)
        files, rows = self._open(shard)
        return f"{self.shards[shard].url}: {files.names[int(rows[row])]}"

    def _read(self, raw_idx: int) -> Any:
        shard, row = self._locate(raw_idx)
        for attempt in range(_READ_ATTEMPTS):
            if shard not in self._opened:
                self.shard_cache.fetch(self.shards[shard])
            try:
                files, rows = self._open(shard)
                return files.read(int(rows[row]))
            except ConfigError as error:
                # The file may be gone by now, or a disk may have spoilt it: once more from the source.
                self._opened.pop(shard, None)
                self.shard_cache.discard(self.shards[shard])
                if attempt + 1 == _READ_ATTEMPTS:
                    path = str(self.shard_cache.path(self.shards[shard]))
                    raise ConfigError(str(error).replace(path, self.shards[shard].url)) from None
        raise AssertionError

    def _open(self, shard: int) -> tuple[ZipFiles | TarFiles, np.ndarray]:
        """A shard that is in the cache, and the rows of its images."""
        opened = self._opened.pop(shard, None)
        if opened is None:
            self._let_go()
            file = self.shards[shard]
            path = self.shard_cache.path(file)
            if suffix_of(file.url) == ".tar":
                files: ZipFiles | TarFiles = TarFiles(path, load_table(file, self._index_folder))
            else:
                files = ZipFiles(path)
            rows = np.array([row for row, name in enumerate(files.names) if is_item(name)], dtype=np.int64)
            if len(rows) != self.counts[shard]:
                raise ConfigError(f"{file.url} holds {len(rows)} images, not {self.counts[shard]}; it has changed")
            opened = files, rows
        self._opened[shard] = opened
        return opened

    def _let_go(self) -> None:
        """Close shards that have left the cache, which take up the disk until then, and those used long ago."""
        for shard, (files, _) in list(self._opened.items()):
            if len(self._opened) >= self._most_open or not files.path.exists():
                self._opened.pop(shard, None)


@contextmanager
def data_order(dataset: ImageFolderDataset, seed: int, *, balance: bool = False) -> Iterator[Order]:
    """The order in which a run reads `dataset`. While it lasts, shards that are needed soon are fetched beside it.

    With `balance`, every class comes equally often, for which all images have to be at hand.
    """
    if balance:
        assert not isinstance(dataset, StreamedDataset)
        yield BalancedOrder(dataset.item_labels(), seed)
        return
    if not isinstance(dataset, StreamedDataset):
        yield DataOrder(len(dataset), seed)
        return
    ahead = ReadAhead(dataset.shard_cache)
    shards = dataset.shards

    def enter(*windows: Sequence[int]) -> None:
        ahead.enter(*([shards[i] for i in window] for window in windows))

    try:
        yield StreamOrder(dataset.counts, seed=seed, buffer=dataset.buffer, copies=dataset.copies, enter=enter)
    finally:
        ahead.close()


def expand_url(url: str) -> list[str]:
    """The URLs that one with {00000..00063} or * stands for. Raises ConfigError where there is none."""
    if suffix_of(url) not in (".zip", ".tar"):
        raise ConfigError(f"--data={url} is neither a .zip nor an uncompressed .tar; name such files, as in set-*.zip")
    span = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MAX_SHARDS:
            raise ConfigError(f"--data={url}: {span[0]} is no range of shards; write e.g. {{00000..00063}}")
        numbers = (f"{i:0{len(span[1])}d}" for i in range(first, last + 1))
        return [each for number in numbers for each in expand_url(url[: span.start()] + number + url[span.end() :])]
    if "*" not in url:
        return [url]
    matches = find_matches(url)
    if not matches:
        raise ConfigError(f"--data={url} matches no files; where files can't be listed, write set-{{00000..00063}}.zip")
    return matches
