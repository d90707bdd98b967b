"""A look at every item of a data set: statistics, and all the reasons why training would refuse it.

`ImageFolderDataset` stops at the first mistake; this collects them all.

N items, C channels, H x W pixels.
"""

import hashlib
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnnlib.background import map_in_order
from dnnlib.errors import ConfigError
from training.conversion.class_folders import LabelChoice, class_name, describe_labels, find_labels
from training.conversion.transforms import is_trainable, resize_options
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.item_files import Files, FolderFiles, open_files
from training.dataset.items import CONVERT_HINT, ItemDecoder, Shape, is_item, is_latents, read_shape
from training.dataset.label_file import LABELS_FILE, Labels, read_file_labels, require_inside
from training.dataset.latents import LatentStatistics, encoder_of
from training.encoders import StabilityVAEEncoder

_MAX_LISTED = 5  # names in a message
_MAX_PENDING = 64  # items being decoded at once
# The report notes latents that differ this much from what the encoder assumes: difference of means in units of the
# assumed deviation, and ratio of deviations. Data sets differ; the published statistics are ImageNet's.
_FAR_MEAN, _FAR_STD = 0.5, 1.5


@dataclass(kw_only=True)
class Report:
    """The findings. Training refuses a data set with `problems`; `notes` are worth knowing."""

    path: str
    kind: str = "images"  # or latents
    num_items: int = 0
    other_files: int = 0
    shapes: dict[str, int] = field(default_factory=dict)  # WxHxC: items
    labels: str = "none"
    classes: dict[int, int] = field(default_factory=dict)  # class: items
    class_names: list[str] | None = None  # in the order of the classes
    mean: list[float] = field(default_factory=list)  # by channel, over items of the most frequent shape
    std: list[float] = field(default_factory=list)
    latents: dict[str, list[float]] = field(default_factory=dict)  # of samples, and as the encoder assumes
    duplicates: list[list[str]] = field(default_factory=list)  # groups of items with equal content
    damaged: list[str] = field(default_factory=list)  # name: reason
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """True if training would take the data set."""
        return not self.problems

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add a ConfigError of the block to the problems instead of raising it."""
        try:
            yield
        except ConfigError as error:
            self.problems.append(str(error))


class Item(NamedTuple):
    """Result of decoding one item."""

    shape: Shape | None = None
    digest: bytes = b""  # of the decoded numbers
    moments: LatentStatistics | None = None  # of the stored numbers
    samples: LatentStatistics | None = None  # of samples from raw latents
    reason: str = ""  # why it cannot be read


@dataclass(kw_only=True)
class _Totals:
    """Sums over the items of one shape."""

    rows: list[int] = field(default_factory=list)
    moments: LatentStatistics = field(default_factory=LatentStatistics)
    samples: LatentStatistics = field(default_factory=LatentStatistics)


class Inspection:
    """Iterate over it, one step per item, to fill `report`. Raises ConfigError if `path` holds no data set at all."""

    def __init__(self, path: Path, *, num_threads: int | None = None) -> None:
        self._files: Files = open_files(path)
        self._rows = [row for row, name in enumerate(self._files.names) if is_item(name)]
        if not self._rows:
            raise ConfigError(f"data set {path} holds no images; it has {len(self._files.names)} other files")
        self._num_threads = num_threads or min(8, os.cpu_count() or 1)
        num_items, num_latents = len(self._rows), sum(is_latents(self._files.names[row]) for row in self._rows)
        self.report = Report(
            path=str(path),
            kind="latents" if num_latents > num_items // 2 else "images",
            num_items=num_items,
            other_files=len(self._files.names) - num_items,
        )
        if 0 < num_latents < num_items:
            self.report.problems.append(
                f"{num_latents} .npy files and {num_items - num_latents} images are mixed; move one kind to a data set"
                " of its own"
            )
        if not isinstance(self._files, FolderFiles):
            with self.report.collecting():
                require_inside(self._files.names, str(path))
        self._totals: dict[Shape, _Totals] = defaultdict(_Totals)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Item]:
        """Look at every item, in a few threads; then draw the conclusions."""
        self._check_labels()
        rows_by_digest: dict[bytes, list[int]] = defaultdict(list)
        pool = ThreadPoolExecutor(self._num_threads)
        items = map_in_order(pool, partial(_read_item, self._files), self._rows, max_pending=_MAX_PENDING)
        for row, item in zip(self._rows, items, strict=True):
            if item.shape is None or item.moments is None:
                self.report.damaged.append(f"{self._files.names[row]}: {item.reason}")
            else:
                totals = self._totals[item.shape]
                totals.rows.append(row)
                totals.moments.merge(item.moments)
                if item.samples is not None:
                    totals.samples.merge(item.samples)
                rows_by_digest[item.digest].append(row)
            yield item
        self.report.duplicates = [self._names(rows) for rows in rows_by_digest.values() if len(rows) > 1]
        self._conclude()

    def _names(self, rows: list[int]) -> list[str]:
        return [self._files.names[row] for row in rows]

    def _check_labels(self) -> None:
        report = self.report
        try:
            labels = read_file_labels(self._files, self._names(self._rows))
        except ConfigError as error:
            report.labels = "unusable"
            report.problems.append(
                f"{error}; correct dataset.json, or make the data set again with dataset_tool.py convert"
            )
            return
        if labels is None:
            self._note_unlabeled()
        elif isinstance(labels.values[0], list):
            report.labels = f"vectors of {len(labels.values[0])}"
        else:
            report.labels = "class indices"
            report.class_names = labels.classes
            self._count_classes(labels)

    def _note_unlabeled(self) -> None:
        """Note that training would see no labels, and which ones `convert` would find in raw images."""
        report = self.report
        report.notes.append("the images have no labels: training needs --cond=False")
        if any(part.names.find(LABELS_FILE) is not None for part in self._files.parts):
            return
        parts = [(part, [name for name in part.names if is_item(name)]) for part in self._files.parts]
        try:
            found = find_labels(Path(report.path), parts, LabelChoice())
        except ConfigError as error:
            report.notes.append(f"dataset_tool.py convert would refuse the labels: {error}")
            return
        if found.labels is not None:
            report.notes[-1] = (
                f"there is no {LABELS_FILE}, so training would see no labels; {self._convert} makes a data set with "
                f"{describe_labels(found.labels)}"
            )
        report.notes += found.notes

    @property
    def _convert(self) -> str:
        return f"dataset_tool.py convert --source={shlex.quote(self.report.path)} --dest=NAME.zip"

    def _count_classes(self, labels: Labels) -> None:
        report = self.report
        counts = Counter(label for label in labels.values if isinstance(label, int))
        report.classes = dict(sorted(counts.items()))
        empty = sorted(set(range(max(counts) + 1)) - set(counts))
        if empty:
            report.notes.append(f"{len(empty)} classes below {max(counts)} have no images: {_listed(empty)}")
        smallest = min(counts, key=lambda label: counts[label])
        if max(counts.values()) > 10 * counts[smallest]:
            report.notes.append(
                f"the largest class has {max(counts.values())} images, the smallest, class"
                f" {class_name(smallest, labels.classes)}, only"
                f" {counts[smallest]}"
            )

    def _conclude(self) -> None:
        report = self.report
        shapes = sorted(self._totals, key=lambda shape: -len(self._totals[shape].rows))
        report.shapes = {f"{w}x{h}x{c}": len(self._totals[c, h, w].rows) for c, h, w in shapes}
        if report.duplicates:
            extra = sum(len(group) - 1 for group in report.duplicates)
            report.notes.append(f"{extra} items repeat the content of others, such as {_listed(report.duplicates[0])}")
        foreign = [text for text in report.damaged if CONVERT_HINT in text]  # sound, but not as training takes them
        if foreign:
            first = foreign[0].removesuffix(f": {CONVERT_HINT}")
            report.problems.append(f"{len(foreign)} items must be converted, such as {first}; {self._convert}")
        damaged = [text for text in report.damaged if CONVERT_HINT not in text]
        if damaged:
            report.problems.append(
                f"{len(damaged)} items cannot be read, such as {damaged[0]}; replace or remove them"
                f" ({self._convert} --on-error=skip leaves them out)"
            )
        if shapes:
            self._check_shapes(shapes)
        if report.accepted:
            with report.collecting():
                encoder_of(ImageFolderDataset(report.path, use_labels=report.labels != "none"))

    def _check_shapes(self, shapes: list[Shape]) -> None:
        report, totals = self.report, self._totals[shapes[0]]
        report.mean, report.std = totals.moments.mean, totals.moments.std
        sides = np.repeat(
            [min(height, width) for _, height, width in shapes], [len(self._totals[s].rows) for s in shapes]
        )
        remedy = self._convert
        if len({shape[1:] for shape in shapes}) > 1 or not is_trainable(shapes[0][2], shapes[0][1]):
            square = all(height == width for _, height, width in shapes)
            remedy += resize_options(int(np.median(sides)), square=square)
        if len(shapes) > 1:
            odd = self._names([self._totals[shape].rows[0] for shape in shapes[1:]])
            report.problems.append(
                f"items have {len(shapes)} different sizes or channel counts, for example {_listed(odd)}; {remedy}"
                " brings images to one size, all as RGB"
            )
        elif not is_trainable(shapes[0][2], shapes[0][1]):
            report.problems.append(
                f"items are {shapes[0][2]}x{shapes[0][1]}; networks take squares of a power of two; {remedy}"
            )
        if report.kind == "images" and shapes[0][0] in (2, 4):
            report.notes.append(
                "the images have an alpha channel: networks learn and generate transparency, and metrics put images on"
                f" white; {self._convert} --background=white makes images without it"
            )
        if report.kind == "latents" and totals.samples.count:
            with report.collecting():
                self._check_latents(totals.samples)

    def _check_latents(self, statistics: LatentStatistics) -> None:
        report = self.report
        report.latents = {"mean": statistics.mean, "std": statistics.std}
        encoder = encoder_of(ImageFolderDataset(report.path, use_labels=False))
        assert isinstance(encoder, StabilityVAEEncoder)
        scale, bias = np.array(encoder.scale), np.array(encoder.bias)
        mean, std = 0 - bias / scale, 0.5 / scale
        report.latents |= {"assumed mean": mean.tolist(), "assumed std": std.tolist()}
        distance = np.abs(np.array(statistics.mean) - mean) / std
        ratio = np.array(statistics.std) / std
        if (distance > _FAR_MEAN).any() or (ratio > _FAR_STD).any() or (ratio < 1 / _FAR_STD).any():
            report.notes.append(
                "the latents are far from what their encoder assumes: in training they would be off-center or"
                " mis-scaled; dataset_tool.py encode --measure notes their own statistics"
            )

    def sample(self, count: int = 48) -> np.ndarray:
        """Items spread over those of the most frequent shape, to look at: uint8 [N, 1 or 3, H, W].

        Of latents, the first three channels of the mean, each scaled to the full range of gray levels.
        """
        if not self._totals:
            raise ConfigError(f"{self.report.path} has no item that could be shown")
        rows = max((totals.rows for totals in self._totals.values()), key=len)
        chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        arrays = np.stack([_decode(self._files, row)[1] for row in chosen])
        if self.report.kind == "latents":
            arrays = arrays[:, : arrays.shape[1] // 2]
            low, high = (f(axis=(0, 2, 3), keepdims=True) for f in (arrays.min, arrays.max))
            arrays = ((arrays - low) / np.maximum(high - low, 1e-8) * 255).astype(np.uint8)
        return arrays[:, :3] if arrays.shape[1] >= 3 else arrays[:, :1]


def _decode(files: Files, row: int) -> tuple[ItemDecoder, np.ndarray]:
    data, where = files.read(row), files.describe(row)
    decoder = ItemDecoder(read_shape(data, where), where)
    return decoder, decoder.decode(data, lambda: where)


def _read_item(files: Files, row: int) -> Item:
    try:
        decoder, array = _decode(files, row)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{files.describe(row)} ")
        return Item(reason=reason.removeprefix("is damaged: ").removeprefix("cannot be read: "))
    array = np.ascontiguousarray(array)
    if decoder.latents and not np.isfinite(array).all():
        return Item(reason="it holds numbers that are not finite")
    numbers = array.astype(np.float64)
    moments = LatentStatistics(count=numbers[0].size, sums=numbers.sum((1, 2)), squares=(numbers**2).sum((1, 2)))
    samples = None
    if decoder.latents and array.shape[0] % 2 == 0:
        samples = LatentStatistics()
        samples.add(array[None])
    digest = hashlib.blake2b(array.tobytes(), digest_size=16, salt=str(array.shape).encode()[:16]).digest()
    return Item(shape=decoder.shape, digest=digest, moments=moments, samples=samples)


def describe(report: Report) -> str:
    """Format the report as lines of text."""
    lines = [f"{report.path}: {report.num_items} {report.kind}"]
    for shape, count in report.shapes.items():
        size, _, channels = shape.rpartition("x")
        lines.append(f"  {count} of {size}, {channels} channel{'' if channels == '1' else 's'}")
    lines.append(f"Labels:   {report.labels}")
    if report.classes:
        lines += _histogram(report.classes, report.class_names)
    moments = {"Mean:    ": report.mean, "Std:     ": report.std} if report.mean else {}
    moments |= {f"Samples, {name}:": values for name, values in report.latents.items()}
    lines += [f"{name} {', '.join(f'{value:.4g}' for value in values)}" for name, values in moments.items()]
    lines.append(f"Other files: {report.other_files}")
    lines += [f"Damaged:  {text}" for text in report.damaged[:20]]
    if len(report.damaged) > 20:
        lines.append(f"Damaged:  and {len(report.damaged) - 20} more")
    lines += [f"Note:     {text}" for text in report.notes]
    lines += [f"Problem:  {text}" for text in report.problems]
    lines.append("Training would take this data set." if report.accepted else "Training would not take this data set.")
    return "\n".join(lines)


def _histogram(classes: dict[int, int], names: Sequence[str] | None, width: int = 40, most: int = 20) -> list[str]:
    """Draw a bar for each class; of more than `most` classes, for ranges of class sizes."""
    if len(classes) <= most:
        largest = max(classes.values())
        texts = [class_name(label, names) for label in classes]
        wide = max(6, *map(len, texts))
        return [
            f"  {text:>{wide}}  {count:>8}  {'#' * -(-count * width // largest)}"
            for text, count in zip(texts, classes.values(), strict=True)
        ]
    counts, edges = np.histogram(list(classes.values()), bins=8)
    lines = [f"  {len(classes)} classes, by number of images:"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        lines.append(f"  {low:>8.0f} to {high:>8.0f}  {count:>6}  {'#' * int(-(-count * width // counts.max()))}")
    return lines


def _listed(values: list[Any]) -> str:
    extra = f" and {len(values) - _MAX_LISTED} more" if len(values) > _MAX_LISTED else ""
    return ", ".join(str(value) for value in values[:_MAX_LISTED]) + extra
