"""The conversion of images to a data set, from the options to the files.

Image i of the data set is image i of the source, after the choice by max_images. A name therefore identifies its image
even where others were left out, and neither the number of workers nor that of processes changes a byte.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import PIL

from dnnlib.errors import ConfigError
from torch_utils.distributed import World
from training.conversion import archive, destination
from training.conversion.archive import Part, Writer
from training.conversion.class_folders import describe_labels
from training.conversion.destination import MADE_KEY, MADE_WITH_KEY
from training.conversion.image_source import choose_images
from training.conversion.open_source import open_source
from training.conversion.transforms import Size, require_trainable_size, result_size
from training.conversion.workers import ImageConverter, Outcome, convert_chunks
from training.images.decode import KEEP_ALPHA, DecodeOptions

# PNG bytes that travel between processes at once: large enough to make that cheap, small enough for many workers.
_CHUNK_BYTES = 4 << 20
_MAX_CHUNK = 16
# Images with 16 bits that stay below a quarter of their range, as 12-bit data does, deserve a note.
_DARK = (1 << 14) - 1


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options of `dataset_tool.py convert`."""

    source: Path
    dest: Path  # a ZIP file if its name ends so, else a folder
    max_images: int | None = None
    balanced: bool = False  # take max_images evenly over the classes
    resolution: Size | None = None  # (width, height)
    transform: str | None = None  # name in transforms.TRANSFORMS; None scales without keeping the aspect
    exif: bool = False  # these three: see DecodeOptions
    background: str | None = None
    value_range: tuple[float, float] | None = None
    workers: int = 1  # of every process
    on_error: Literal["stop", "skip"] = "stop"  # at unreadable files
    shards: int | None = None
    shard_size: int | None = None  # bytes
    overwrite: bool = False  # existing ZIP files
    split: str | None = None
    label: str | None = None
    label_level: int | None = None
    no_labels: bool = False
    skip_existing: bool = False  # keep existing files that were made from the same

    def __post_init__(self) -> None:
        result_size(self.transform, self.resolution)
        self.decoding()
        if self.shards is not None and self.shard_size is not None:
            raise ConfigError("--shards and --shard-size both say how large shards are; give one of them")
        if self.balanced and self.no_labels:
            raise ConfigError("--balanced takes images evenly over the classes, which --no-labels leaves out; give one")
        if self.balanced and self.max_images is None:
            raise ConfigError("--balanced says how --max-images are taken; add --max-images=N")

    def decoding(self) -> DecodeOptions:
        """Return the options of the decoder. Raises ConfigError."""
        return DecodeOptions(exif=self.exif, background=self.background, value_range=self.value_range)

    @property
    def sharded(self) -> bool:
        """True if the result is written as shards."""
        return self.shards is not None or self.shard_size is not None


@dataclass(frozen=True, kw_only=True)
class ConvertStep:
    """Result of a few images."""

    num_images: int
    num_written: int
    unreadable: Sequence[str]  # name and reason; only with on_error 'skip'


class DatasetConversion:
    """A conversion that is ready to run: iterate over its steps; the files exist at the end.

    The constructor checks everything that it can without reading all images, and writes nothing. Under torchrun every
    process makes and runs one, which writes its share of the shards; they appear when all processes are done. Raises
    ConfigError; an iteration that ends early leaves nothing behind. With `skip_existing`, shards appear one by one, and
    finished ones of the same conversion are not in `parts`: interrupted work continues from there.
    """

    def __init__(self, options: ConvertOptions, world: World | None = None) -> None:
        self.options = options
        self._world = world or World()
        if self._world.size > 1 and not options.sharded:
            raise ConfigError(
                f"{self._world.size} processes cannot write one file together; "
                f"add --shards={self._world.size}, for example, or --shard-size"
            )
        destination.require_destination(
            options.dest,
            options.source,
            sharded=options.sharded,
            overwrite=options.overwrite,
            resumable=options.skip_existing,
        )
        source = open_source(
            options.source,
            split=options.split,
            label=options.label,
            label_level=options.label_level,
            no_labels=options.no_labels,
        )
        self.source = choose_images(source, options.max_images, balanced=options.balanced)
        self._converter = ImageConverter(
            reader=self.source.reader,
            transform=options.transform,
            size=options.resolution,
            decoding=options.decoding(),
        )
        self._first, sample = self._find_first()
        assert sample.png is not None and sample.size is not None
        self.size = sample.size
        require_trainable_size(self.size, self._describe(self._first))
        self._png_bytes = len(sample.png)
        self._head: dict[str, Any] = {"labels": None if self.source.labels is None else []}
        self._head[MADE_WITH_KEY] = {"pillow": PIL.__version__}
        if self.source.classes is not None:
            self._head["classes"] = list(self.source.classes)
        if options.skip_existing:  # without it, the same images give the same bytes, whatever their names were
            how: list[Any] = [options.resolution, options.transform, options.exif, options.on_error]
            how += [value for value in (options.background, options.value_range) if value is not None]
            request = {"names": list(self.source.names), "labels": self.source.labels, "how": how}
            self._head[MADE_KEY] = destination.request_digest(request)
        self._existing = archive.existing_shards(options.dest) if options.sharded else []
        self._mixed: str | None = None
        self._all_parts, self.parts, self.num_kept = self._plan()
        self._left_out = self._num_unreadable = self._num_transparent = self._num_deep = self._largest = 0
        self._lost: Counter[int] = Counter()  # images that are not written, by class

    def __len__(self) -> int:
        """Number of images that this process has to do."""
        return sum(part.stop - part.start for part in self.parts)

    def __iter__(self) -> Iterator[ConvertStep]:
        """Convert; see the class."""
        one_by_one = self.options.skip_existing
        if one_by_one:
            destination.remove_leftovers(self.parts)
        keys = (self.source.keys[chunk.start : chunk.stop] for part in self.parts for chunk in self._chunks(part))
        num_written = 0
        with closing(convert_chunks(self._converter, keys, num_workers=self.options.workers)) as outcomes:
            for group in [[part] for part in self.parts] if one_by_one else [self.parts]:
                with archive.writing(group, self._head) as writers:
                    for part, writer in zip(group, writers, strict=True):
                        for chunk in self._chunks(part):
                            step = self._write(writer, chunk, next(outcomes))
                            num_written += step.num_written
                            yield step
                    for writer in writers:
                        writer.finish()
                    if not one_by_one and not sum(self._world.all_gather_objects(num_written)):
                        raise ConfigError("no image was left to write")
        self._world.barrier()
        if self._world.is_main:
            destination.remove_stale_shards(self._existing, self._all_parts)

    def summary(self) -> str:
        """Describe in one line what was written; every process must call this at the end."""
        counts = (self.num_kept, self._left_out, self._num_unreadable)
        num_kept, left_out, num_unreadable = map(sum, zip(*self._world.all_gather_objects(counts), strict=True))
        lost: Counter[int] = sum(self._world.all_gather_objects(self._lost), Counter())
        classes = describe_labels(self.source.checked_labels, lost)
        dest, num_parts, images = self.options.dest, len(self._all_parts), f"images of {self.size[0]}x{self.size[1]}"
        if num_kept:
            text = f"{dest}: {num_kept} of {num_parts} files there already"
            text += "" if num_kept == num_parts else f", the others written; {images}"
        else:
            text = f"{dest}: {len(self.source.names) - left_out - num_unreadable} {images}"
            text += f" in {num_parts} files" if num_parts > 1 else ""
            text += f"; left out {left_out} that are smaller" if left_out else ""
            text += f"; left out {num_unreadable} that cannot be read" if num_unreadable else ""
        return f"{text}; {classes}"

    def notes(self) -> list[str]:
        """Return lines on doubtful labels and images; every process must call this at the end."""
        counts = self._world.all_gather_objects((self._num_transparent, self._num_deep, self._largest))
        num_transparent, num_deep, largest = (
            sum(c[0] for c in counts),
            sum(c[1] for c in counts),
            max(c[2] for c in counts),
        )
        lines = [f"Note: {note}" for note in self.source.notes]
        if self._mixed is not None:
            lines.append(f"Note: {self._mixed}")
        if num_transparent:
            background = self.options.background
            fate = {
                None: "which now show the colors stored under them; --background=white puts them on white,"
                f" --background={KEEP_ALPHA} keeps transparency",
                KEEP_ALPHA: "which are kept, in a fourth channel",
            }.get(background, f"which are now on {background}")
            lines.append(f"{num_transparent} of the images have transparent pixels, {fate}")
        if num_deep and largest <= _DARK and self.options.value_range is None:
            lines.append(
                f"{num_deep} of the images have 16 bits, but no value above {largest} of 65535, and come out dark;"
                f" --range=0,{largest} makes that value white"
            )
        return lines

    def _plan(self) -> tuple[list[Part], list[Part], int]:
        """Return all parts, those that this process has to write, and the number of its parts that are kept."""
        options, labels = self.options, self.source.labels
        longest = None if labels is None else max(labels, key=lambda label: len(str(label)))
        each = archive.entry_bytes(self._png_bytes, longest)
        per_shard = None
        if options.shard_size is not None:
            per_shard = archive.images_per_shard(options.shard_size, each, self._head)
        parts = archive.plan_parts(options.dest, len(self.source.names), num_shards=options.shards, per_shard=per_shard)
        mine = parts[self._world.rank :: self._world.size]
        todo = mine
        if options.skip_existing:  # every process looks at all parts, so that all refuse what does not belong
            missing = destination.missing_parts(parts, self._head[MADE_KEY], self._existing, replace=options.overwrite)
            todo = [part for part in missing if part.number % self._world.size == self._world.rank]
            kept = [part for part in parts if part not in missing]
            self._mixed = destination.other_versions(kept, self._head[MADE_WITH_KEY]) if missing else None
        destination.require_disk_space(options.dest, each * sum(part.stop - part.start for part in todo))
        return parts, todo, len(mine) - len(todo)

    def _find_first(self) -> tuple[int, Outcome]:
        """Find the first image that can be converted, which determines the size of all."""
        reason = None
        for index, key in enumerate(self.source.keys):
            outcome = self._converter.convert(key)
            if outcome.png is not None:
                return index, outcome
            if outcome.reason is not None:
                complaint = self._require_skip(index, outcome.reason)
                reason = reason or complaint
        count = len(self.source.names)
        if reason is not None:
            raise ConfigError(f"none of the {count} images can be used; {reason}")
        width, height = self.options.resolution or (0, 0)
        raise ConfigError(f"all {count} images are smaller than --resolution={width}x{height}; choose a smaller one")

    def _chunks(self, part: Part) -> Iterator[range]:
        length = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // self._png_bytes))
        for start in range(part.start, part.stop, length):
            yield range(start, min(start + length, part.stop))

    def _write(self, writer: Writer, chunk: range, outcomes: Sequence[Outcome]) -> ConvertStep:
        num_written, unreadable, labels = 0, [], self.source.labels
        for index, outcome in zip(chunk, outcomes, strict=True):
            if outcome.png is None and labels is not None and isinstance(label := labels[index], int):
                self._lost[label] += 1
            if outcome.reason is not None:
                unreadable.append(self._require_skip(index, outcome.reason))
            elif outcome.png is not None:
                self._require_size(index, outcome.size)
                writer.add(index, outcome.png, None if labels is None else labels[index])
                num_written += 1
                self._num_transparent += outcome.transparent
                if outcome.largest is not None:
                    self._num_deep += 1
                    self._largest = max(self._largest, outcome.largest)
        self._left_out += len(chunk) - num_written - len(unreadable)  # by the transform, which does not enlarge
        self._num_unreadable += len(unreadable)
        return ConvertStep(num_images=len(chunk), num_written=num_written, unreadable=unreadable)

    def _require_skip(self, index: int, reason: str) -> str:
        """Describe why image `index` cannot be read; raises that as a ConfigError unless on_error is 'skip'."""
        name = self._describe(index)
        complaint = reason if reason.startswith(name) else f"{name} cannot be read: {reason}"
        if self.options.on_error == "stop":
            raise ConfigError(f"{complaint}; --on-error=skip leaves such files out and lists them")
        return complaint

    def _require_size(self, index: int, size: Size | None) -> None:
        if size != self.size:
            assert size is not None
            (width, height), (first_width, first_height) = size, self.size
            raise ConfigError(
                f"{self._describe(index)} is {width}x{height}, but {self._describe(self._first)} is "
                f"{first_width}x{first_height}; bring them to one size by --resolution={first_width}x{first_height}, "
                f"with --transform=center-crop to keep their aspect"
            )

    def _describe(self, index: int) -> str:
        return f"{self.source.path}: {self.source.names[index]}"
