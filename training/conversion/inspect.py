"""A look at every item of a data set: what is in it, and whether training would take it.

Unlike `ImageFolderDataset`, which stops at the first mistake, this collects them all.

N items, C channels, H x W pixels.
"""

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnnlib.errors import ConfigError
from training.conversion.inspect_report import Report, describe
from training.conversion.transforms import require_trainable_size
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.item_files import Files, FolderFiles, open_files
from training.dataset.items import ItemDecoder, Shape, is_item, is_latents
from training.dataset.label_file import Label, read_file_labels, require_inside
from training.dataset.latents import LatentStatistics, encoder_of
from training.encoders import StabilityVAEEncoder

__all__ = ["Inspection", "Report", "describe"]

_SHOWN = 5  # names listed of many
_AHEAD = 64  # items being decoded at once
# How far the latents may be from what the encoder assumes before the report says so: in units of the assumed deviation,
# and as a ratio of deviations. Data sets differ; the published statistics are ImageNet's.
_FAR_MEAN, _FAR_STD = 0.5, 1.5


class Item(NamedTuple):
    """What decoding one item gave."""

    shape: Shape | None = None
    digest: bytes = b""  # of the decoded numbers
    sums: np.ndarray | None = None  # float64 [2, C]: of the numbers and of their squares, divided by H * W
    statistics: LatentStatistics | None = None  # of latents
    reason: str = ""  # why it cannot be read


class Inspection:
    """Iterate over it, one step an item, to fill `report`. Raises ConfigError where there is no data set at all."""

    def __init__(self, path: Path, *, num_threads: int | None = None) -> None:
        self._files: Files = open_files(path)
        self._rows = [row for row, name in enumerate(self._files.names) if is_item(name)]
        if not self._rows:
            raise ConfigError(f"data set {path} holds no images; it has {len(self._files.names)} other files")
        self._num_threads = num_threads or min(8, os.cpu_count() or 1)
        num_latents = sum(is_latents(self._files.names[row]) for row in self._rows)
        self.report = Report(
            path=str(path),
            kind="latents" if num_latents > len(self._rows) // 2 else "pictures",
            num_items=len(self._rows),
            other_files=len(self._files.names) - len(self._rows),
        )
        if 0 < num_latents < len(self._rows):
            self.report.problems.append(
                f"{num_latents} .npy files and {len(self._rows) - num_latents} pictures are mixed;"
                " move one kind to a data set of its own"
            )
        if not isinstance(self._files, FolderFiles):
            try:
                require_inside(self._files.names, str(path))
            except ConfigError as error:
                self.report.problems.append(str(error))
        self._by_shape: dict[Shape, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Item]:
        """Look at every item, in a few threads; then draw the conclusions."""
        self._check_labels()
        totals = _Totals()
        for row, item in zip(self._rows, self._items(), strict=True):
            if item.shape is None:
                self.report.damaged.append(f"{self._files.names[row]}: {item.reason}")
            else:
                self._by_shape[item.shape].append(row)
                totals.add(row, item)
            yield item
        self._conclude(totals)

    def _items(self) -> Iterator[Item]:
        pending: deque[Future[Item]] = deque()
        with ThreadPoolExecutor(self._num_threads) as pool:
            try:
                for row in self._rows:
                    pending.append(pool.submit(_look_at, self._files, row))
                    if len(pending) >= _AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _check_labels(self) -> None:
        report, names = self.report, [self._files.names[row] for row in self._rows]
        try:
            labels = read_file_labels(self._files, names)
        except ConfigError as error:
            report.labels = "unusable"
            report.problems.append(
                f"{error}; mend dataset.json, or make the data set anew with dataset_tool.py convert"
            )
            return
        if labels is None:
            report.notes.append("there are no labels: training needs --cond=False")
        elif isinstance(labels[0], list):
            report.labels = f"vectors of {len(labels[0])}"
        else:
            report.labels = "class indices"
            self._count_classes(labels)

    def _count_classes(self, labels: list[Label]) -> None:
        report = self.report
        counts = Counter(label for label in labels if isinstance(label, int))
        report.classes = dict(sorted(counts.items()))
        empty = sorted(set(range(max(counts) + 1)) - set(counts))
        if empty:
            report.notes.append(f"{len(empty)} classes below {max(counts)} have no images: {_listed(empty)}")
        if max(counts.values()) > 10 * min(counts.values()):
            smallest = min(counts, key=lambda label: counts[label])
            report.notes.append(
                f"classes differ much in size: {max(counts.values())} images at the most, {counts[smallest]} in class"
                f" {smallest}"
            )

    def _conclude(self, totals: "_Totals") -> None:
        report = self.report
        ordered = sorted(self._by_shape, key=lambda shape: -len(self._by_shape[shape]))
        report.shapes = {f"{w}x{h}x{c}": len(self._by_shape[c, h, w]) for c, h, w in ordered}
        report.duplicates = [[self._files.names[row] for row in rows] for rows in totals.duplicates()]
        if report.duplicates:
            extra = sum(len(group) - 1 for group in report.duplicates)
            report.notes.append(f"{extra} items repeat the content of others, such as {_listed(report.duplicates[0])}")
        if report.damaged:
            report.problems.append(
                f"{len(report.damaged)} items cannot be read, such as {report.damaged[0]}; replace or remove them"
                " (dataset_tool.py convert --on-error=skip leaves them out)"
            )
        if ordered:
            self._check_shapes(ordered, totals)
        if report.accepted:
            self._open_as_training_does()

    def _open_as_training_does(self) -> None:
        report = self.report
        try:
            encoder_of(ImageFolderDataset(report.path, use_labels=report.labels != "none"))
        except ConfigError as error:
            report.problems.append(str(error))

    def _check_shapes(self, ordered: list[Shape], totals: "_Totals") -> None:
        report = self.report
        report.mean, report.std = totals.moments(ordered[0])
        if len(ordered) > 1:
            odd = [self._files.names[rows[0]] for rows in (self._by_shape[shape] for shape in ordered[1:])]
            report.problems.append(
                f"items have {len(ordered)} different sizes or channel counts, for example {_listed(odd)}; convert with"
                " --resolution=WxH brings pictures to one size, all as RGB"
            )
        self._check_size(ordered[0])
        if report.kind == "latents" and ordered[0] in totals.statistics:
            self._check_latents(totals.statistics[ordered[0]])

    def _check_size(self, shape: Shape) -> None:
        try:
            require_trainable_size((shape[2], shape[1]), "its size")
        except ConfigError as error:
            self.report.problems.append(str(error))

    def _check_latents(self, statistics: LatentStatistics) -> None:
        """Hold the latents against what the encoder will take them for."""
        report = self.report
        report.latents = {"mean": statistics.mean, "std": statistics.std}
        try:
            encoder = encoder_of(ImageFolderDataset(report.path, use_labels=False))
        except ConfigError as error:
            report.problems.append(str(error))
            return
        assert isinstance(encoder, StabilityVAEEncoder)
        scale, bias = np.array(encoder.scale), np.array(encoder.bias)
        mean, std = 0 - bias / scale, 0.5 / scale
        report.latents |= {"assumed mean": mean.tolist(), "assumed std": std.tolist()}
        distance = np.abs(np.array(statistics.mean) - mean) / std
        ratio = np.array(statistics.std) / std
        if (distance > _FAR_MEAN).any() or (ratio > _FAR_STD).any() or (ratio < 1 / _FAR_STD).any():
            report.notes.append(
                "the latents are far from what their encoder assumes, and training would see them off-centre or"
                " mis-scaled; dataset_tool.py encode --measure notes their own statistics"
            )

    def sample(self, count: int = 48) -> np.ndarray:
        """Items spread over those of the most frequent shape, to look at: uint8 [N, 1 or 3, H, W].

        Of latents, the first three channels of the mean are shown, each brought to the range of grey levels.
        """
        if not self._by_shape:
            raise ConfigError(f"{self.report.path} has no item that could be shown")
        rows = max(self._by_shape.values(), key=len)
        chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        arrays = np.stack([_decode(self._files, row)[1] for row in chosen])
        if self.report.kind == "latents":
            arrays = arrays[:, : arrays.shape[1] // 2]
            low, high = (f(axis=(0, 2, 3), keepdims=True) for f in (arrays.min, arrays.max))
            arrays = ((arrays - low) / np.maximum(high - low, 1e-8) * 255).astype(np.uint8)
        return arrays[:, :3] if arrays.shape[1] >= 3 else arrays[:, :1]


class _Totals:
    """Sums over items, by shape, and who has the same content."""

    def __init__(self) -> None:
        self._rows: dict[bytes, list[int]] = defaultdict(list)
        self._sums: dict[Shape, tuple[int, np.ndarray]] = {}
        self.statistics: dict[Shape, LatentStatistics] = defaultdict(LatentStatistics)

    def add(self, row: int, item: Item) -> None:
        assert item.shape is not None and item.sums is not None
        self._rows[item.digest].append(row)
        count, sums = self._sums.get(item.shape, (0, np.zeros_like(item.sums)))
        self._sums[item.shape] = count + 1, sums + item.sums
        if item.statistics is not None:
            self.statistics[item.shape].merge(item.statistics)

    def duplicates(self) -> list[list[int]]:
        return [rows for rows in self._rows.values() if len(rows) > 1]

    def moments(self, shape: Shape) -> tuple[list[float], list[float]]:
        count, sums = self._sums[shape]
        mean, square = sums / count
        return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()


def _decode(files: Files, row: int) -> tuple[ItemDecoder, np.ndarray]:
    data, where = files.read(row), files.describe(row)
    decoder = ItemDecoder(data, where)
    return decoder, decoder.decode(data, lambda: where)


def _look_at(files: Files, row: int) -> Item:
    try:
        decoder, array = _decode(files, row)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{files.describe(row)} ")
        return Item(reason=reason.removeprefix("is damaged: ").removeprefix("cannot be read: "))
    array = np.ascontiguousarray(array)
    if decoder.latents and not np.isfinite(array).all():
        return Item(reason="it holds numbers that are not finite")
    numbers = array.astype(np.float64)
    statistics = None
    if decoder.latents and array.shape[0] % 2 == 0:
        statistics = LatentStatistics()
        statistics.add(array[None])
    return Item(
        shape=decoder.shape,
        digest=hashlib.blake2b(array.tobytes(), digest_size=16, salt=str(array.shape).encode()[:16]).digest(),
        sums=np.stack([numbers.mean((1, 2)), (numbers**2).mean((1, 2))]),
        statistics=statistics,
    )


def _listed(values: list[Any]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(str(value) for value in values[:_SHOWN]) + more
