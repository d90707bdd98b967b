"""A data set of shards behind URLs; only the shards that are being read lie on the local disk.

`https://host/set.zip`, `https://host/set-{00000..00063}.tar`, `s3://bucket/set-*.zip`, `file:///mount/set-*.zip`: every
store that fsspec supports. Shards are ZIP files or tars, each a data set of its own (docs/datasets.md).
"""

import bisect
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.download import make_cache_dir_path
from dnnlib.errors import ConfigError, reason_of
from training.dataset.contract import ImageDataset
from training.dataset.item_files import Files, ZipFiles
from training.dataset.items import ItemDecoder, is_item
from training.dataset.order import Order, StreamOrder, largest_window
from training.dataset.tar_files import TarFiles
from training.streaming.cache import ReadAhead, ShardCache
from training.streaming.remote import NotThere, RemoteFile, find_file, find_matches, is_named_so, suffix_of
from training.streaming.shard_index import ShardIndex, index_shards, joined_labels, load_table, require_alike

_MAX_SHARDS = 100_000
_OPEN_SHARDS = 32  # at a time; the shards of two windows if these are more
_READ_ATTEMPTS = 4  # the cache may remove a shard between its download and its opening


class StreamedDataset(ImageDataset):
    """The images or raw latents in shards behind `url`.

    Opening reads the index of every shard, and nothing else of a ZIP file; see training/streaming/shard_index.py. Any
    item can be read, but reading is fast only in the order of `order()`, which downloads shards ahead of their use.

    buffer:       images to shuffle over.
    cache_dir:    folder for shards and indices; None for the usual cache folder.
    cache_bytes:  bound on the bytes of all shards there.
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
        self.shard_cache = ShardCache(folder / "shards", cache_bytes)
        self._index_folder = folder / "index"
        try:
            shards = self._find_shards()
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {reason_of(error)}; give another --data-cache") from None
        require_alike(shards, url)
        self.shards: list[RemoteFile] = [shard.file for shard in shards]
        self.counts = np.array([shard.count for shard in shards], dtype=np.int64)
        self._ends: list[int] = np.cumsum(self.counts).tolist()
        self._require_space()
        self._opened: dict[int, tuple[Files, np.ndarray]] = {}  # the last used comes last
        self._most_open = max(2 * largest_window(np.ones(len(shards)), self.counts, buffer), _OPEN_SHARDS)

        first = next(shard for shard in shards if shard.count)
        assert first.shape is not None
        self._encoder_entry = first.encoder
        raw_labels, class_names = joined_labels(shards, url) if use_labels else (None, None)
        super().__init__(
            name=self.shards[0].name.rpartition(".")[0],
            decoder=ItemDecoder(first.shape, f"{first.file.url}: {first.first}"),
            raw_labels=raw_labels,
            class_names=class_names,
            num_images=self._ends[-1],
            xflip=xflip,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_opened": {}}

    @contextmanager
    def order(self, seed: int, *, balance: bool = False) -> Iterator[Order]:
        """Yield the order in which a run reads the items; meanwhile, threads download the shards needed next."""
        assert not balance  # needs all images at hand; training/config.py refuses it
        ahead = ReadAhead(self.shard_cache)

        def enter(*windows: Sequence[int]) -> None:
            ahead.enter(*([self.shards[i] for i in window] for window in windows))

        try:
            yield StreamOrder(self.counts, seed=seed, buffer=self.buffer, copies=self._copies, enter=enter)
        finally:
            ahead.close()

    def check_headers(self, max_items: int = 10_000) -> None:
        """Check nothing more: opening checks the first item of every shard."""

    def fingerprint(self) -> int:
        """Return a number that almost certainly differs for other versions of the shards."""
        return zlib.crc32(json.dumps([(file.name, file.size, file.version) for file in self.shards]).encode())

    def close(self) -> None:
        """Release the shards; the next read opens them again."""
        self._opened.clear()

    @property
    def encoder_entry(self) -> dict[str, Any] | None:
        """Description in dataset.json of the encoder that made the latents; None if missing."""
        return self._encoder_entry

    def _find_shards(self) -> list[ShardIndex]:
        urls = expand_url(self.url)
        if len(urls) == 1 and urls[0] == self.url and suffix_of(self.url) == ".zip":
            try:
                find_file(self.url)
            except NotThere:
                urls = self._numbered_shards()
        return index_shards(urls, self._index_folder, self.shard_cache)

    def _numbered_shards(self) -> list[str]:
        """Return name-00000.zip and so on for name.zip, as many as the first one states."""
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
        """Raise ConfigError unless every possible window fits in the cache."""
        sizes = np.array([shard.size for shard in self.shards])
        needed = largest_window(sizes, self.counts, self.buffer)
        if needed > self.shard_cache.limit:
            raise ConfigError(
                f"--shuffle-buffer={self.buffer} images lie in shards of up to {needed} bytes, more than "
                f"--data-cache-size={self.shard_cache.limit}; allow twice as much as that, to read ahead, or lower "
                f"--shuffle-buffer, or use smaller shards (dataset_tool.py convert --shard-size)"
            )

    def _locate(self, raw_idx: int) -> tuple[int, int]:
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
                # The file may have been removed or damaged on the disk: download it again.
                self._opened.pop(shard, None)
                self.shard_cache.discard(self.shards[shard])
                if attempt + 1 == _READ_ATTEMPTS:
                    path = str(self.shard_cache.path(self.shards[shard]))
                    raise ConfigError(str(error).replace(path, self.shards[shard].url)) from None
        raise AssertionError

    def _open(self, shard: int) -> tuple[Files, np.ndarray]:
        """Return a shard that is in the cache, and the rows of its images."""
        opened = self._opened.pop(shard, None)
        if opened is None:
            # Close shards used long ago, and those removed from the cache, which occupy the disk while they are open.
            for other, (files, _) in list(self._opened.items()):
                if len(self._opened) >= self._most_open or not files.path.exists():
                    self._opened.pop(other, None)
            file = self.shards[shard]
            path = self.shard_cache.path(file)
            if suffix_of(file.url) == ".tar":
                files = TarFiles(path, load_table(file, self._index_folder))
            else:
                files = ZipFiles(path)
            rows = np.array([row for row, name in enumerate(files.names) if is_item(name)], dtype=np.int64)
            if len(rows) != self.counts[shard]:
                raise ConfigError(f"{file.url} holds {len(rows)} images, not {self.counts[shard]}; it has changed")
            opened = files, rows
        self._opened[shard] = opened
        return opened


def expand_url(url: str) -> list[str]:
    """Return the URLs that one with {00000..00063} or * stands for. Raises ConfigError if there are none."""
    if suffix_of(url) not in (".zip", ".tar"):
        raise ConfigError(f"--data={url} is neither a .zip nor an uncompressed .tar; name such files, as in set-*.zip")
    span = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if (span is not None or "*" in url) and is_named_so(url):
        return [url]
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MAX_SHARDS:
            raise ConfigError(f"--data={url}: {span[0]} is not a range of shards; write e.g. {{00000..00063}}")
        numbers = (f"{i:0{len(span[1])}d}" for i in range(first, last + 1))
        return [each for number in numbers for each in expand_url(url[: span.start()] + number + url[span.end() :])]
    if "*" not in url:
        return [url]
    matches = find_matches(url)
    if not matches:
        raise ConfigError(f"--data={url} matches no files; where files can't be listed, write set-{{00000..00063}}.zip")
    return matches
